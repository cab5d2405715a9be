"""Store a teacher's largest logits for data: python -m lvm.distil TEACHER --data DIR --out LOGITS

One pass over the rows of the split train, a file of logits for each shard; see `lvm.teacher` for
the format. A student then learns from them with `--distil.logits LOGITS`, and needs no memory or
time for the teacher. Interrupted, the same command goes on with the shard it was at.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

from lvm import interop, parallel
from lvm.config import Layout, ModelConfig, Run
from lvm.generate import reads_of
from lvm.mask import attention_mask
from lvm.model import Transformer
from lvm.teacher import FORMAT, INDEX, check_teacher, files_of
from tokenizer.cli import CommandError, InputError, Progress, run
from tokenizer.devices import Device, pick_device
from tokenizer.files import atomic_write
from tokenizer.world import World
from visual_sentences.manifest import Manifest, ShardEntry
from visual_sentences.pack import pack
from visual_sentences.reading import Reader, require_codes


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """Write a teacher's largest logits beside the data, for students to learn from."""

    teacher: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TEACHER")]
    """Run or model folder of the teacher."""
    data: Path
    """Folder of shards that the student will be trained on; its split train is read."""
    out: Path
    kept: int = 64
    """Logits kept a position: the most likely ids."""
    type: Literal["fp16", "fp32"] = "fp16"
    """Type of the stored logits; fp32 with all of them kept is the teacher itself."""
    micro_rows: int = 8
    """Rows computed at once."""
    precision: Literal["bf16", "fp32"] = "bf16"
    device: Device = "auto"


def bytes_of(manifest: Manifest, kept: int, itemsize: int) -> int:
    """Return the bytes that the logits of a manifest's split train take."""
    ids = 2 if manifest.vocab.size <= 65_536 else 4
    return sum(manifest.rows("train").values()) * manifest.row_len * kept * (itemsize + ids)


@torch.inference_mode()
def store_shard(
    model: Transformer,
    reader: Reader,
    entry: ShardEntry,
    *,
    first: int,
    command: Store,
    whole: bool,
) -> None:
    """Write the logits of one shard, whose rows start at row `first` of their source."""
    manifest = reader.manifest
    source = [s.name for s in manifest.sources].index(entry.source)
    shape = (entry.rows, manifest.row_len, command.kept)
    id_type = np.uint16 if manifest.vocab.size <= 65_536 else np.uint32
    values_path, ids_path = files_of(command.out, entry.name)
    types = {values_path: np.float16 if command.type == "fp16" else np.float32, ids_path: id_type}
    drafts = {path: path.with_name(path.name + ".tmp-store") for path in types}
    values, ids = (
        np.lib.format.open_memmap(drafts[path], mode="w+", dtype=dtype, shape=shape)
        for path, dtype in types.items()
    )
    reads = reads_of(model)
    device = model.head.weight.device
    world = World(device=device)
    for start in range(0, entry.rows, command.micro_rows):
        numbers = np.arange(start, min(start + command.micro_rows, entry.rows))
        rows = reader.read(np.full(len(numbers), source), first + numbers).to(device)
        batch = pack(rows, layout=reads.layout, vocab=manifest.vocab, whole_rows=whole)
        mask = attention_mask(batch.doc, batch.block, exact=batch.exact)
        with parallel.compute(world, precision=command.precision):
            logits = model(
                batch.ids.clamp_max(model.config.vocab_size - 1), pos=batch.pos, mask=mask
            )
        top, index = logits.float().topk(command.kept, dim=-1)
        if command.type == "fp16":  # logits past fp16's range are not: only differences count
            top = top - top[..., :1]
        values[numbers] = top.cpu().numpy()
        ids[numbers] = index.cpu().numpy().astype(id_type)
    for array in (values, ids):
        array.flush()
    for path, draft in drafts.items():
        draft.rename(path)


def store(command: Store, *, show: bool = True) -> Path:
    """Write the folder of logits, or what of it is not there yet; returns its index file."""
    manifest = Manifest.load(command.data)
    require_codes(manifest, command.data)
    model = interop.load(command.teacher)
    reads = reads_of(model)
    layout: Layout = reads.layout
    as_run = Run(
        recipe="", model=ModelConfig(width=2, layers=1, heads=1, ffn=2), layout=layout,
        whole_rows=reads.whole_rows,
    )  # fmt: skip
    check_teacher(reads, manifest, as_run, folder=str(command.teacher))
    if not 1 <= command.kept <= model.config.vocab_size:
        raise InputError(
            f"--kept {command.kept}: wanted 1 to {model.config.vocab_size}, the teacher's table"
        )
    about = {
        "format": FORMAT,
        "manifest": manifest.hash,
        "layout": layout,
        "whole_rows": reads.whole_rows,
        "kept": command.kept,
        "type": command.type,
        "teacher": str(command.teacher),
    }
    index = command.out / INDEX
    begun = index.with_suffix(".begun")  # the same, of a folder that is not finished
    for path in (index, begun):
        if path.exists() and json.loads(path.read_text(encoding="utf-8")) != about:
            raise InputError(f"{command.out} holds other logits; name another --out")
    if index.exists():
        return index
    needed = bytes_of(manifest, command.kept, 2 if command.type == "fp16" else 4)
    command.out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(command.out).free
    if needed > free:
        raise CommandError(
            f"the logits take {needed / 1e9:.1f} GB, {command.out} has {free / 1e9:.1f} GB free; "
            "keep fewer (--kept), or name a larger disk"
        )
    with atomic_write(begun, "w") as file:
        json.dump(about, file, indent=1)
    model.to(pick_device(command.device))
    reader = Reader(command.data, manifest, split="train", random=False)
    total = sum(manifest.rows("train").values())
    with Progress("logits", total=total, unit="rows", enabled=show) as progress:
        for source in manifest.sources:
            first = 0
            for entry in manifest.shards_of(source.name, "train"):
                if not all(path.exists() for path in files_of(command.out, entry.name)):
                    store_shard(
                        model, reader, entry, first=first, command=command, whole=reads.whole_rows
                    )
                first += entry.rows
                progress.update(entry.rows)
    with atomic_write(index, "w") as file:
        json.dump(about, file, indent=1)
    begun.unlink()
    return index


def main(command: Store) -> None:
    print(f"wrote {store(command)}")


if __name__ == "__main__":
    run(Store, main, prog="python -m lvm.distil")
