"""Teachers: a trained model that runs beside the student, or its largest logits from disk.

Stored logits are a folder of `python -m lvm.distil`: for each shard of the data, in the order of
its rows,

    NAME.values.npy   float16 [rows, row_len, K]   logits of the K most likely ids, largest first
    NAME.ids.npy      uint16 (uint32 above 65,536 ids)   those ids
    logits.json       the data's manifest, layout, K and teacher; written last

at the positions of `visual_sentences.pack`. A row of 2,048 positions and K = 64 takes 512 KiB.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from kernels.mask import Mask
from lvm import parallel
from lvm.config import Reads, Run
from lvm.model import Transformer
from lvm.objectives.distil import Soft
from tokenizer.cli import InputError
from tokenizer.world import World
from visual_sentences.batch import Batch
from visual_sentences.manifest import Manifest
from visual_sentences.pack import Rows

INDEX, FORMAT = "logits.json", 1


class Guide(Protocol):
    """What gives the soft targets of a batch."""

    def soft(self, batch: Batch, mask: Mask) -> Soft: ...

    def attach(self, batch: Batch, rows: Rows) -> Batch:
        """Add to a packed batch what is read from disk for its rows."""
        ...


class Live:
    """A teacher that runs beside the student, sharded like it, without gradients."""

    def __init__(self, model: Transformer, world: World, *, run: Run) -> None:
        self.module = _Logits(model.requires_grad_(False).eval())
        parallel.parallelize(
            self.module, model.layers, world, precision=run.precision, shards=run.shards
        )

    @torch.no_grad()
    def soft(self, batch: Batch, mask: Mask) -> Soft:
        return Soft(self.module(batch, mask))

    def attach(self, batch: Batch, rows: Rows) -> Batch:
        return batch


class _Logits(nn.Module):
    """A model as a root whose forward pass gives logits, so that FSDP gathers the head too."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, mask: Mask) -> Tensor:
        ids = batch.ids.clamp_max(self.model.config.vocab_size - 1)  # pad, where it has no row
        return self.model(ids, pos=batch.pos, mask=mask)


class Stored:
    """Logits from disk, by source and row."""

    def __init__(self, folder: Path | str, manifest: Manifest, *, run: Run) -> None:
        self.folder = Path(folder)
        found = read_index(self.folder)
        wanted = {"manifest": manifest.hash, "layout": run.layout, "whole_rows": run.whole_rows}
        if wrong := [
            f"{key} {str(found.get(key))[:12]}, wanted {str(value)[:12]}"
            for key, value in wanted.items()
            if found.get(key) != value
        ]:
            raise InputError(
                f"the logits in {folder} are of other data: {'; '.join(wrong)}; make them again "
                "with `python -m lvm.distil`"
            )
        self.kept = int(found["kept"])
        entries = [e for s in manifest.sources for e in manifest.shards_of(s.name, "train")]
        self._ends = np.cumsum([entry.rows for entry in entries], dtype=np.int64)
        rows = np.array(list(manifest.rows("train").values()), np.int64)
        self._first = np.cumsum(rows) - rows
        self._names = [entry.name for entry in entries]
        self._open: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def attach(self, batch: Batch, rows: Rows) -> Batch:
        places = self._first[rows.source.numpy()] + rows.row.numpy()
        values, ids = zip(*(self._row(int(place)) for place in places), strict=True)
        device = batch.ids.device
        return replace(
            batch,
            soft=torch.from_numpy(np.stack(values)).to(device, non_blocking=True),
            soft_id=torch.from_numpy(np.stack(ids).astype(np.int32)).to(device, non_blocking=True),
        )

    def soft(self, batch: Batch, mask: Mask) -> Soft:
        assert batch.soft is not None, "attach came before"
        return Soft(batch.soft, batch.soft_id)

    def _row(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        number = int(np.searchsorted(self._ends, place, side="right"))
        if number not in self._open:
            self._open[number] = open_logits(self.folder, self._names[number])
        values, ids = self._open[number]
        inner = place - (int(self._ends[number - 1]) if number else 0)
        return values[inner], ids[inner]


def files_of(folder: Path, shard: str) -> tuple[Path, Path]:
    """Return the names of values and ids of a shard."""
    stem = shard.removesuffix(".arrow")
    return folder / f"{stem}.values.npy", folder / f"{stem}.ids.npy"


def open_logits(folder: Path, shard: str) -> tuple[np.ndarray, np.ndarray]:
    """Map the logits of a shard; raises InputError where they are absent or damaged."""
    try:
        values, ids = (
            np.load(path, mmap_mode="r", allow_pickle=False) for path in files_of(folder, shard)
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"the logits of {shard} in {folder} cannot be read ({error}); run `python -m "
            "lvm.distil` again"
        ) from error
    return values, ids


def read_index(folder: Path) -> dict[str, Any]:
    """Return what a folder of logits says of itself."""
    path = folder / INDEX
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"there is no {INDEX} that can be read in {folder}; wanted the --out of a finished "
            "`python -m lvm.distil`"
        ) from error
    if found.get("format") != FORMAT:
        raise InputError(f"{path} is of format {found.get('format')}; wanted {FORMAT}")
    return found


def check_teacher(reads: Reads, manifest: Manifest, run: Run, *, folder: str) -> None:
    """Refuse a teacher that does not read what the student is trained on."""
    wanted: Sequence[tuple[str, object, object]] = (
        ("codes", reads.codes, manifest.codebook_size),
        ("codes an image", reads.codes_per_image, manifest.codes_per_image),
        ("layout", reads.layout, run.layout),
        ("one document a row", reads.whole_rows, run.whole_rows),
    )
    wrong = [f"{name} {has}, the run has {needs}" for name, has, needs in wanted if has != needs]
    if reads.tokenizer and manifest.tokenizer and reads.tokenizer != manifest.tokenizer:
        wrong.append(f"tokenizer {reads.tokenizer[:12]}, the data's is {manifest.tokenizer[:12]}")
    if manifest.row_len > reads.row_len:
        wrong.append(f"rows of {reads.row_len}, the data's are {manifest.row_len}")
    if wrong:
        raise InputError(
            f"the teacher in {folder} does not fit: {'; '.join(wrong)}; wanted a model that was "
            "trained on data of the same codes and layout"
        )


def guide_of(run: Run, manifest: Manifest, world: World) -> Guide | None:
    """Return the teacher of a run, or None; raises InputError where it does not fit."""
    if not run.distil.on:
        return None
    if run.distil.logits:
        return Stored(run.distil.logits, manifest, run=run)
    from lvm import interop  # reads any folder of a model; a run without a teacher needs none

    model = interop.load(run.distil.teacher)
    assert model.reads is not None, "interop.load sets it"
    check_teacher(model.reads, manifest, run, folder=run.distil.teacher)
    return Live(model, world, run=run)
