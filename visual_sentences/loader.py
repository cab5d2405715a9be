"""Shards to rows: by place for evaluation, in the mixture's order for training.

A training run owns one number, the samples it has used. From it, `Loader` continues at any place
with any number of ranks:

    samples      start … start + G - 1 | start + G …          G global rows a step
    rank 0 of 2  the first half        | the first half
    rank 1 of 2  the second half       | the second half
"""

import atexit
import signal
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tokenizer.cli import InputError
from visual_sentences.manifest import Manifest
from visual_sentences.mixture import Mixture
from visual_sentences.pack import Rows
from visual_sentences.sampler import Integers
from visual_sentences.shards import Shard, code_type, open_shard

OPEN = 512  # shards mapped at once; each holds a file descriptor, of which 1024 is a usual limit
AHEAD = 4096  # samples whose places are computed at once: numpy is slow on a few, fast on many


class Reader:
    """Rows of one split by (source, row). Shards are opened on first use."""

    def __init__(self, folder: Path | str, manifest: Manifest, *, split: str, random: bool) -> None:
        self.folder, self.manifest = Path(folder), manifest
        entries = [manifest.shards_of(source.name, split) for source in manifest.sources]
        self._names = [[entry.name for entry in shards] for shards in entries]
        self._ends = [list(accumulate(entry.rows for entry in shards)) for shards in entries]
        self._sizes = {entry.name: entry.rows for shards in entries for entry in shards}
        self._random = random
        self._shard = lru_cache(OPEN)(self._open)

    def read(self, sources: Integers, rows: Integers) -> Rows:
        count, width = len(sources), self.manifest.row_len
        tokens = np.zeros((count, width), code_type(self.manifest.codebook_size))
        starts = np.full((count, self.manifest.images_per_row), -1, np.int32)
        length = np.zeros(count, np.int32)
        for i, (source, row) in enumerate(zip(sources.tolist(), rows.tolist(), strict=True)):
            shard, place = self._place(source, row)
            tokens[i] = shard.tokens[place]
            length[i] = shard.length[place]
            found = shard.starts(place)
            starts[i, : len(found)] = found
        return Rows(
            tokens=torch.from_numpy(tokens if tokens.dtype == np.uint16 else tokens.view(np.int32)),
            starts=torch.from_numpy(starts),
            length=torch.from_numpy(length),
            source=torch.from_numpy(sources.astype(np.int32)),
        )

    def keys(self, source: int, row: int) -> list[str]:
        """Return the names of a row's images, as the build's source folders have them."""
        shard, place = self._place(source, row)
        return shard.keys(place)

    def _place(self, source: int, row: int) -> tuple[Shard, int]:
        ends = self._ends[source]
        number = bisect_right(ends, row)
        return self._shard(self._names[source][number]), row - (ends[number - 1] if number else 0)

    def _open(self, name: str) -> Shard:
        shard, manifest = open_shard(self.folder / name, random=self._random), self.manifest
        seen = (*shard.tokens.shape, shard.metadata["tokenizer"])
        wanted = (self._sizes[name], manifest.row_len, manifest.tokenizer)
        if seen != wanted:
            raise InputError(
                f"the shard {self.folder / name} has rows, row length and tokenizer {seen}, the "
                f"manifest says {wanted}; were files of two builds mixed? Run its build again with "
                "--verify"
            )
        return shard


class Loader:
    """An endless stream of `Rows` of this rank, one for each step.

    `batch_rows` is the global batch, `start` the samples used before. `micro_rows` is how many rows
    a rank computes at once; with `world` it must divide the global batch. With `workers`, processes
    read ahead; a warm local disk needs none. Equal arguments give equal rows, whatever `workers`.
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
    ) -> None:
        check_batch(batch_rows, world=world, micro_rows=micro_rows)
        self.manifest = Manifest.load(folder)
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
        )

    def __iter__(self) -> Iterator[Rows]:
        return _from_workers(self._steps, self.workers) if self.workers else iter(self._steps)


def _from_workers(steps: "_Steps", workers: int) -> Iterator[Rows]:
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
    ) -> None:
        self.folder, self.manifest, self.mixture, self.split = folder, manifest, mixture, split
        self.batch_rows, self.rank, self.world, self.start = batch_rows, rank, world, start

    def __iter__(self) -> Iterator[Rows]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        reader = Reader(self.folder, self.manifest, split=self.split, random=True)
        local = self.batch_rows // self.world
        mine = self.start + self.rank * local + np.arange(local)
        steps = max(1, AHEAD // local)
        step = worker
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
