"""Write a tokenizer in the format of another project, and make sure that it is still the same.

    python -m tokenizer.convert vqvae --to diffusers --out vqvae-diffusers
    python -m tokenizer.convert vqgan_f16_16384.pt --from taming --to ours --out vqgan

What was written is read again before it gets its name: the tokenizer id, which goes by every
tensor, and all else that decides codes must be those of the source.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tokenizer import interop
from tokenizer.cli import CommandError, InputError, run
from tokenizer.files import sync_folder, temporary_name
from tokenizer.formats import diffusers, muse, taming
from tokenizer.vqgan import VQGAN

Target = Literal["ours", "muse", "diffusers", "taming"]
WRITERS: dict[Target, Callable[[VQGAN, Path], None]] = {
    "ours": interop.save,
    "muse": muse.write,
    "diffusers": diffusers.write,
    "taming": taming.write,
}
# What decides codes or their number and is not in the tensors, which the id compares.
KEPT = ("image_size", "patch", "normalize_codes", "pixel_range")


@dataclass(frozen=True, slots=True, kw_only=True)
class Convert:
    """Write a tokenizer in another format, with the same tokenizer id.

    Reads ours, muse (LVM, DeLVM), VQModel of diffusers, VQGANs of taming-transformers and LlamaGen,
    from a folder or a single .bin, .pt, .pth, .ckpt or .safetensors file. A format that cannot hold
    the tokenizer is refused. Commitment weight and dropout, which matter to training alone, are
    kept where the format has a place for them.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Folder or file of the tokenizer."""
    to: Target
    """Format to write."""
    out: Path
    """Folder to write: new or empty."""
    family: Annotated[interop.Family | None, tyro.conf.arg(name="from")] = None
    """Whose checkpoint SRC is, where tensors alone do not tell it."""


def convert(
    source: Path, out: Path, *, to: Target, family: interop.Family | None = None
) -> tuple[interop.Family, VQGAN]:
    """Write the tokenizer at `source` to the folder `out`, whole or not at all.

    Returns the family it was of, and the tokenizer as it is read from `out`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} already holds something; name a new or empty folder")
    found, model = interop.read(source, family=family)
    draft = temporary_name(out.absolute())
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"--out {out} cannot be made: {error}") from error
    try:
        WRITERS[to](model, draft)
        written = interop.load(draft, family=to)
        check_same(model, written)
        os.replace(draft, out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return found, written


def check_same(model: VQGAN, written: VQGAN) -> None:
    """Raise CommandError unless both give the same codes: id and config are equal."""
    if model.id != written.id:
        raise CommandError(f"the tokenizer id changed from {model.id} to {written.id}")
    for field in KEPT:
        before, after = getattr(model.config, field), getattr(written.config, field)
        if before != after:
            raise CommandError(f"{field} changed from {json.dumps(before)} to {json.dumps(after)}")


def main(command: Convert) -> None:
    found, model = convert(command.source, command.out, to=command.to, family=command.family)
    config = model.config
    print(
        f"{command.out}: {found} → {command.to}, {config.num_params() / 1e6:.1f} M parameters, "
        f"{config.image_size} px → {config.grid} × {config.grid} codes of {config.codebook_size}\n"
        f"id {model.id}"
    )


if __name__ == "__main__":
    run(Convert, main, prog="python -m tokenizer.convert")
