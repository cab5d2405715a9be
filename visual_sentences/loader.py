"""Rows in the mixture's order for training, and rows of a split each once to validate on.

A training run owns one number, the samples it has used. From it, `Loader` continues at any place
with any number of ranks:

    samples      start … start + G - 1 | start + G …          G global rows a step
    rank 0 of 2  the first half        | the first half
    rank 1 of 2  the second half       | the second half

Ranks that share a model's work on the same rows (tensor, context or pipeline parallel) are one rank
here: of a mesh, `rank` and `world` are place and size along its data-parallel dimensions alone.
"""

import atexit
import signal
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tokenizer.cli import InputError
from visual_sentences.manifest import Manifest
from visual_sentences.mixture import Mixture
from visual_sentences.pack import Rows
from visual_sentences.reading import Read, Reader, require_codes

T = TypeVar("T")
AHEAD = 4096  # samples whose places are computed at once: numpy is slow on a few, fast on many


class Loader:
    """An endless stream of `Rows` of this rank, one for each step.

    `batch_rows` is the global batch, `start` the samples used before. `micro_rows` is how many rows
    a rank computes at once; with `world` it must divide the global batch. With `workers`, processes
    read ahead; a warm local disk needs none. Equal arguments give equal rows, whatever `workers`
    and `read`, the way of `Reader`; `mix` is as in `Mixture.of`.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        batch_rows: int,
        seed: int,
        split: str = "train",
        rank: int = 0,
        world: int = 1,
        micro_rows: int = 1,
        start: int = 0,
        workers: int = 0,
        mix: Mapping[str, float] | None = None,
        read: Read = "auto",
    ) -> None:
        check_batch(batch_rows, world=world, micro_rows=micro_rows)
        self.manifest = Manifest.load(folder)
        require_codes(self.manifest, folder)
        self.mixture = Mixture.of(self.manifest, split=split, seed=seed, mix=mix)
        self.workers = workers
        self._steps = _Steps(
            folder=Path(folder),
            manifest=self.manifest,
            mixture=self.mixture,
            split=split,
            batch_rows=batch_rows,
            rank=rank,
            world=world,
            start=start,
            read=read,
        )

    def __iter__(self) -> Iterator[Rows]:
        return from_workers(self._steps, self.workers) if self.workers else iter(self._steps)


def held_out(
    folder: Path | str,
    *,
    rows: int,
    micro_rows: int,
    split: str = "val",
    rank: int = 0,
    world: int = 1,
) -> Iterator[Rows]:
    """Yield `rows` rows of a split, or all if there are fewer: evenly spread, in order, each once.

    Which rows these are depends on the data alone. A step has `micro_rows` rows, and all ranks have
    as many steps, which a model that is sharded over them needs; where rows run out, rows of length
    0 stand in, which predict nothing.
    """
    manifest = Manifest.load(folder)
    counts = np.array(list(manifest.rows(split).values()), np.int64)
    total = int(counts.sum())
    chosen = np.arange(min(rows, total)) * total // min(rows, total)
    sources = np.searchsorted(np.cumsum(counts), chosen, side="right")
    places = chosen - (np.cumsum(counts) - counts)[sources]
    with closing(Reader(folder, manifest, split=split, random=False)) as reader:
        for first in range(0, len(chosen), micro_rows * world):
            mine = np.arange(first + rank, first + micro_rows * world, world)
            there = mine < len(chosen)
            mine = np.where(there, mine, 0)
            found = reader.read(sources[mine], places[mine])
            found.length[torch.from_numpy(~there)] = 0
            found.starts[torch.from_numpy(~there)] = -1
            yield found


def from_workers(steps: IterableDataset[T], workers: int) -> Iterator[T]:
    """Read ahead in processes, which end when this generator or the program does.

    The workers ignore SIGTERM, and Python waits at exit for children it has sent that to; so the
    iterator, which tells them to stop, has to be let go before.
    """
    loader = DataLoader(steps, batch_size=None, num_workers=workers, worker_init_fn=_ignore_signals)
    held = [iter(loader)]
    atexit.register(held.clear)
    try:
        while True:
            yield next(held[0])
    finally:
        held.clear()
        atexit.unregister(held.clear)


def check_batch(batch_rows: int, *, world: int, micro_rows: int = 1) -> None:
    """Raise InputError, with the nearest values that work, if ranks cannot share the batch."""
    each = world * micro_rows
    if batch_rows < 1 or batch_rows % each:
        below = batch_rows // each * each
        near = [str(value) for value in (below, below + each) if value > 0]
        ranks = f"{world} rank{'s' if world > 1 else ''} × {micro_rows} rows at once"
        raise InputError(
            f"a global batch of {batch_rows} rows does not divide over {ranks}; "
            f"use {' or '.join(near)} rows, or other numbers of ranks or rows at once"
        )


class _Steps(IterableDataset[Rows]):
    """The steps of a loader; of W worker processes, number w makes steps w, w + W, w + 2W, …"""

    def __init__(
        self,
        *,
        folder: Path,
        manifest: Manifest,
        mixture: Mixture,
        split: str,
        batch_rows: int,
        rank: int,
        world: int,
        start: int,
        read: Read,
    ) -> None:
        self.folder, self.manifest, self.mixture, self.split = folder, manifest, mixture, split
        self.batch_rows, self.rank, self.world, self.start = batch_rows, rank, world, start
        self.read = read

    def __iter__(self) -> Iterator[Rows]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        reader = Reader(self.folder, self.manifest, split=self.split, random=True, read=self.read)
        local = self.batch_rows // self.world
        mine = self.start + self.rank * local + np.arange(local)
        steps = max(1, AHEAD // local)
        step = worker
        with closing(reader):
            while True:
                numbers = step + workers * np.arange(steps)
                samples = (mine[None, :] + self.batch_rows * numbers[:, None]).reshape(-1)
                sources, rows = self.mixture.rows(samples)
                for s, r in zip(sources.reshape(steps, -1), rows.reshape(steps, -1), strict=True):
                    yield reader.read(s, r)
                step += workers * steps


def _ignore_signals(worker: int) -> None:
    """Leave signals to the trainer, which still needs its workers for the steps before it saves."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
