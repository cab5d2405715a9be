"""Write a model for others to use: a folder of transformers and vLLM, or ours.

    python -m lvm.export runs/lvm_300m --format hf --out exported

The Hugging Face folder is a `LlamaForCausalLM` whose logits equal ours; its generation_config.json
keeps `generate` to whole images: no eos, no ids but codes, one image at a time. Both kinds carry
`lvm.json`, which says how to build the input.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor

from lvm import interop
from lvm.config import Reads
from lvm.model import Transformer
from tokenizer.cli import InputError, run
from tokenizer.files import TEMPORARY, sync_folder, temporary_name

Format = Literal["hf", "native"]
SHARD_BYTES = 5 * 10**9  # above this a weight file is split, as transformers does
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GENERATION = "generation_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """Write a trained model as a Hugging Face LLaMA folder, or in this project's own format."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder of lvm.train (its latest checkpoint), or any model folder."""
    format: Format = "hf"
    """hf: LlamaForCausalLM for transformers and vLLM; native: for lvm.load."""
    out: Path
    """Folder to write: new, empty, or an earlier export, which is replaced."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the stored weights."""


def write(
    model: Transformer,
    out: Path | str,
    *,
    format: Format = "hf",
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write `model` to the folder `out`, whole or not at all; returns the files.

    Raises InputError where `out` holds anything but an earlier export.
    """
    out = Path(out)
    config, reads = model.config, model.reads
    if reads is None:
        raise ValueError("the model does not know what it reads; set model.reads")
    check_out(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = temporary_name(out)
    draft.mkdir()
    try:
        if format == "hf":
            names = interop.hf_names(config)
            state = {names[k]: v for k, v in model.state_dict().items()}
            write_weights(draft, state, dtype=dtype, limit=shard_bytes)
            write_json(draft / interop.CONFIG, interop.to_llama(config, reads, dtype=dtype))
            write_json(draft / GENERATION, generation_config(reads, config.vocab_size))
        else:
            save_file(_stored(model.state_dict(), dtype), draft / interop.WEIGHTS)
            write_json(draft / interop.CONFIG, interop.native_config(config))
        reads.save(draft)
        for file in draft.iterdir():
            _sync(file)
        _swap(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return sorted(out.iterdir())


def check_out(out: Path) -> None:
    """Refuse a folder with files that no export writes."""
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"--out {out} is a file; wanted a folder to write")
    known = {interop.CONFIG, interop.WEIGHTS, interop.INDEX, GENERATION, "lvm.json"}
    there = {p.name for p in out.iterdir()}
    foreign = sorted(
        n for n in there - known if not (n.startswith("model-") and n.endswith(".safetensors"))
    )
    if foreign or (there and "lvm.json" not in there):
        raise InputError(
            f"--out {out} already holds {', '.join(foreign[:3] or sorted(there)[:3])}, which is no "
            "export; name a new or empty folder"
        )


def write_weights(
    folder: Path, state: dict[str, Tensor], *, dtype: torch.dtype, limit: int
) -> None:
    """Write tensors as one safetensors file, or as numbered ones of at most `limit` bytes.

    A tensor larger than `limit` gets a file of its own. One file at a time is converted.
    """
    parts: list[dict[str, Tensor]] = [{}]
    filled = total = 0
    for name, tensor in state.items():
        size = tensor.numel() * dtype.itemsize
        if parts[-1] and filled + size > limit:
            parts.append({})
            filled = 0
        parts[-1][name] = tensor
        filled += size
        total += size
    table = {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        file = file if len(parts) > 1 else interop.WEIGHTS
        save_file(_stored(part, dtype), folder / file, metadata={"format": "pt"})
        table.update(dict.fromkeys(part, file))
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": table}
        write_json(folder / interop.INDEX, index)


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


def _stored(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: v.detach().to("cpu", dtype).contiguous() for k, v in state.items()}


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
    model = interop.load(command.model)
    files = write(model, command.out, format=command.format, dtype=DTYPES[command.dtype])
    size = sum(f.stat().st_size for f in files)
    print(f"{command.out}: {len(files)} files, {size / 1e6:.1f} MB, {command.format}")


if __name__ == "__main__":
    run(Export, main, prog="python -m lvm.export")
