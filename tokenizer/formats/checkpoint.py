"""Read checkpoint files without running what they hold.

safetensors files are data by design. All others are pickles, read by torch's restricted loader
(`weights_only=True`), which builds tensors and plain containers. Lightning's `.ckpt` files also
name classes of Lightning, of its callbacks above all; those names get a class that does nothing,
so that the tensors beside them can be had without Lightning and without its code.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from tokenizer.cli import InputError

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
# Whose classes may be named in a file: of trainers, their settings, LlamaGen's arguments.
INERT = ("pytorch_lightning.", "lightning.", "omegaconf.", "argparse.Namespace")


class Inert:
    """Stands for a class that a checkpoint names: takes any arguments and state, keeps none."""

    def __new__(cls, *_: object, **__: object) -> "Inert":
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        """Forget the state; it may hold anything."""


def read_checkpoint(path: Path) -> Any:
    """Return what the file holds, tensors on the CPU; raises InputError where it cannot be read."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path} is no checkpoint by its name; wanted {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        named = globals_of(path)
        if refused := [name for name in named if not name.startswith(INERT)]:
            raise InputError(
                f"{path} cannot be read: it asks for {some(refused)}, which could run code; only "
                "tensors are taken from files. Save its table of tensors alone, where you trust it"
            )
        # One class each: torch tells them apart by the class, not by the name alone.
        with safe_globals([(type("Inert", (Inert,), {}), name) for name in named]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (InputError, OSError, MemoryError):
        raise
    except Exception as error:  # a broken pickle can fail at any instruction, in any way
        raise InputError(f"{path} cannot be read ({reason(error)}); copy it again") from error


def reason(error: Exception) -> str:
    """Return the first sentence of what went wrong, without torch's advice to trust the file."""
    text = str(error).rpartition("WeightsUnpickler error: ")[2]
    lines = [line for line in text.splitlines() if line and not line.startswith("Weights only")]
    return lines[0].split(". ")[0].rstrip(".") if lines else type(error).__name__


def globals_of(path: Path) -> list[str]:
    """Return the names that torch's restricted loader would refuse; none for files before 1.6."""
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return []
    return get_unsafe_globals_in_checkpoint(str(path))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file that holds a table of them and nothing else."""
    return plain_table(read_checkpoint(path), path)


def plain_table(content: Any, path: Path) -> dict[str, Tensor]:
    """Return `content` if it is a table of tensors by name, else raise InputError."""
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path} holds no plain table of tensors")
    if odd := [str(k) for k, v in content.items() if not isinstance(v, Tensor)]:
        raise InputError(f"{path} holds no plain table of tensors: {some(odd)} is none")
    return content


def some(names: list[str] | set[str], limit: int = 5) -> str:
    """Write the first of `names`, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
