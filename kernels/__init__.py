"""Kernels of the pipeline, each with its plain-torch reference. Imports torch, and triton where
present; never another package of this project."""
