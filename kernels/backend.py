"""Which form of an operator runs: the one in Triton or the one in plain torch."""

from typing import Literal, get_args

import torch

Backend = Literal["auto", "triton", "torch"]


def has_triton() -> bool:
    """Say whether triton imports here."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def choose(backend: Backend, device: torch.device, *, what: str) -> str:
    """Return the backend that `auto` stands for on this device; refuse names that are unknown.

    `what` names the operator in messages. `auto` is triton on CUDA, where it imports.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"{what} backend {backend!r}: wanted one of {get_args(Backend)}")
    if backend == "auto":
        return "triton" if device.type == "cuda" and has_triton() else "torch"
    if backend == "triton" and not has_triton():
        raise ValueError(f"{what} backend 'triton': triton does not import here; take 'torch'")
    return backend
