"""Which device a command runs on."""

from typing import TYPE_CHECKING, Literal

from tokenizer.cli import InputError

if TYPE_CHECKING:
    import torch

Device = Literal["auto", "cpu", "cuda"]


def pick_device(wanted: Device) -> "torch.device":
    """Return the device; `auto` is the GPU if there is one."""
    import torch  # so that a command's --help need not wait for it

    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise InputError("--device cuda: torch sees no GPU here; use --device cpu or auto")
    return torch.device("cuda" if available and wanted != "cpu" else "cpu")
