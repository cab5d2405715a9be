"""Probes: how much of a label small heads read from a frozen trunk's features. See `lvm.probe`."""
