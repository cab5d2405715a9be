"""Write a model for others to use: a folder of transformers and vLLM, or ours.

    python -m lvm.export runs/lvm_300m --format hf --out exported

The Hugging Face folder is a `LlamaForCausalLM`, or a `Qwen3ForCausalLM` where QK-norm is on, whose
logits equal ours; DeLVM's codebook and projection are folded into one table. Its
generation_config.json keeps `generate` to whole images: no eos, no ids but codes, one image at a
time. Both kinds carry `lvm.json`, which says how to build the input.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from lvm import interop, models, weights
from lvm.config import Reads
from lvm.model import Transformer
from lvm.vision import VisionModel
from tokenizer.cli import InputError, run
from tokenizer.files import TEMPORARY, sync_folder, temporary_name

Format = Literal["hf", "native"]
SHARD_GB = 5.0  # above this a weight file is split, as transformers does
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GENERATION = "generation_config.json"
INTERNLM = ("model_config.pt", "model_tp0_pp0.pt")  # what lvm.internlm writes besides lvm.json


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """Write a trained model as a Hugging Face folder, or in this project's own format."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder of lvm.train (its latest checkpoint), or any model folder."""
    format: Format = "hf"
    """hf: LlamaForCausalLM, with QK-norm Qwen3ForCausalLM, for transformers and vLLM; native: for
    lvm.load."""
    out: Path
    """Folder to write: new, empty, or an earlier export, which is replaced."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the stored weights."""
    shard_gb: float = SHARD_GB
    """Weights above this many GB (10^9 bytes) are split into numbered files and an index."""


def write(
    model: Transformer | VisionModel,
    out: Path | str,
    *,
    format: Format = "hf",
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = int(SHARD_GB * 1e9),
) -> list[Path]:
    """Write `model` to the folder `out`, whole or not at all; returns the files.

    Raises InputError where `out` holds anything but an earlier export.
    """
    out = Path(out)
    if isinstance(model, VisionModel) and format == "hf":
        raise InputError(
            "a model of pixels has no form that transformers reads; use --format native"
        )
    with draft_of(out) as draft:
        if isinstance(model, VisionModel):
            described = interop.native_config(model.config) | {"patches": asdict(model.patches)}
            write_json(draft / interop.CONFIG, described)
            state = model.state_dict()
        else:
            state = _describe(model, draft, format=format, dtype=dtype)
        weights.write(draft, state, dtype=dtype, limit=shard_bytes)
    return sorted(out.iterdir())


@contextmanager
def draft_of(out: Path) -> Iterator[Path]:
    """Give a folder to write, which becomes `out` when all is written, or is deleted.

    Raises InputError where `out` holds anything but an earlier export.
    """
    check_out(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = temporary_name(out)
    draft.mkdir()
    try:
        yield draft
        for file in draft.iterdir():
            _sync(file)
        _swap(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _describe(
    model: Transformer, draft: Path, *, format: Format, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Write the configs of a model of codes; return its tensors by the format's names."""
    config, reads, state = model.config, model.reads, model.state_dict()
    if reads is None:
        raise ValueError("the model does not know what it reads; set model.reads")
    if format == "hf":
        config, state = interop.folded(config, state)
        names = interop.hf_names(config)
        state = {names[k]: v for k, v in state.items()}
        write_json(draft / interop.CONFIG, interop.to_hf(config, reads, dtype=dtype))
        write_json(draft / GENERATION, generation_config(reads, config.vocab_size))
    else:
        write_json(draft / interop.CONFIG, interop.native_config(config))
    reads.save(draft)
    return state


def check_out(out: Path) -> None:
    """Refuse a folder with files that no export writes."""
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"--out {out} is a file; wanted a folder to write")
    known = {interop.CONFIG, weights.WEIGHTS, weights.INDEX, GENERATION, "lvm.json", *INTERNLM}
    there = {p.name for p in out.iterdir()}
    foreign = sorted(
        n for n in there - known if not (n.startswith("model-") and n.endswith(".safetensors"))
    )
    if foreign or (there and not _is_export(out)):
        raise InputError(
            f"--out {out} already holds {', '.join(foreign[:3] or sorted(there)[:3])}, which is no "
            "export; name a new or empty folder"
        )


def _is_export(out: Path) -> bool:
    """Say whether a folder is one of ours: a model of pixels has no lvm.json, but its config says
    so. A downloaded model has neither, and is never replaced."""
    if (out / "lvm.json").is_file():
        return True
    try:
        found = json.loads((out / interop.CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("format") == interop.FORMAT


def shard_bytes(gb: float) -> int:
    """Return the bytes of --shard-gb."""
    if not 1e-9 <= gb < math.inf:
        raise InputError(f"--shard-gb {gb}: wanted a size above 0, such as {SHARD_GB:g}")
    return int(gb * 1e9)


def generation_config(reads: Reads, vocab_size: int) -> dict[str, Any]:
    """Return settings under which transformers' `generate` gives one whole image of codes."""
    vocab = reads.vocab
    return {
        "bos_token_id": vocab.bos if reads.layout == "bos" else None,
        "eos_token_id": None,
        "pad_token_id": vocab.pad if vocab.pad < vocab_size else None,
        "suppress_tokens": list(range(reads.codes, vocab_size)),
        "max_new_tokens": reads.codes_per_image,
        "do_sample": True,
        "top_k": 0,
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(draft: Path, out: Path) -> None:
    """Put `draft` in the place of `out`; an earlier export is deleted only when that is done."""
    old = out.with_name(f"{out.name}{TEMPORARY}old-{os.getpid()}")
    if out.exists():
        out.replace(old)
    draft.replace(out)
    sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def main(command: Export) -> None:
    check_out(command.out)
    limit, dtype = shard_bytes(command.shard_gb), DTYPES[command.dtype]
    model = models.load(command.model, dtype=dtype)
    files = write(model, command.out, format=command.format, dtype=dtype, shard_bytes=limit)
    size = sum(f.stat().st_size for f in files)
    print(f"{command.out}: {len(files)} files, {size / 1e6:.1f} MB, {command.format}")


if __name__ == "__main__":
    run(Export, main, prog="python -m lvm.export")
