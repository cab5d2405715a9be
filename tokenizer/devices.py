"""Which device a command runs on."""

from typing import Literal

import torch

from tokenizer.cli import InputError

Device = Literal["auto", "cpu", "cuda"]


def pick_device(wanted: Device) -> torch.device:
    """Return the device; `auto` is the GPU if there is one."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise InputError("--device cuda: torch sees no GPU here; use --device cpu or auto")
    return torch.device("cuda" if available and wanted != "cpu" else "cpu")
