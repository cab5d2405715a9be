"""The engine under `lvm.generate`: caches, steps, windows, how a code is chosen."""
