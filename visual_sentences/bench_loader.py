"""Time reading rows for training: python -m visual_sentences.bench_loader [--disk DIR].

Rows of 4096 codes in batches of 16, the same rows in each format: our shards by map and by read, a
raw file under np.memmap, WebDataset tars of raw bytes, and Hugging Face datasets. Ours bring where
the documents start, lengths and sources besides. All draw at random but WebDataset, which passes
through its tars with a buffer of 1000. The readers take turns, round after round, so that a change
of the machine's speed meets them all; medians count, and ratios are taken within a round.

    cold      readers that are new each turn, of files dropped from the page cache before (the line
              says how much stayed): the first epoch of much data. np.memmap is told that reads
              are random; else the kernel reads ahead around each row, 8 MiB on some machines,
              and soon holds all of files as small as these
    new       the same with the files in the page cache
    warm      readers whose every row has been read before, with 0 and with 2 processes ahead
    start     from nothing to the first batch, of 1000 shards whose pages are in the cache
    sampler   what the order of 10⁹ rows adds to a process' own memory (RssAnon)
"""

import ctypes
import mmap
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from kernels.timing import options, report
from tokenizer.cli import guarded
from visual_sentences.bench_rivals import BATCH, Stream, in_memmap, ours, streams, write_rows
from visual_sentences.loader import AHEAD
from visual_sentences.mixture import Mixture, Share

TURN = 64  # batches of a turn
SHARDS = 1000
READY = 8  # batches before it, which processes that read ahead may have ready
FRESH = 16  # batches of a turn of a new reader, and as many before them

Row = dict[str, object]


class _Ahead(IterableDataset[torch.Tensor]):
    """A stream as worker processes take it; each of them makes one of its own."""

    def __init__(self, stream: Stream, folder: Path) -> None:
        self.stream, self.folder = stream, folder

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self.stream(self.folder)


def seconds(stream: Iterator[torch.Tensor], *, batches: int, before: int = 0) -> float:
    """Return what `batches` take after the first `before`."""
    for _ in islice(stream, before):
        continue
    start = time.perf_counter()
    for _ in islice(stream, batches):
        continue
    return time.perf_counter() - start


def turns(bodies: Mapping[str, Callable[[], float]], *, repeats: int) -> dict[str, list[float]]:
    """Call all in turn, `repeats` times; a body returns its seconds."""
    found: dict[str, list[float]] = {name: [] for name in bodies}
    for _ in range(repeats):
        for name, body in bodies.items():
            found[name].append(body())
    return found


def lines(about: Row, found: Mapping[str, list[float]], *, rows: int = 0) -> list[Row]:
    """Return a line a reader, in rows a second, or ms without `rows`; the first is the measure."""
    measure, *_ = found.values()
    unit = "rows/s" if rows else "ms"
    table: list[Row] = []
    for name, times in found.items():
        median = statistics.median(times)
        faster = statistics.median(m / t for m, t in zip(measure, times, strict=True))
        value = round(rows / median if rows else 1000 * median, 1)
        table.append({**about, "reader": name, unit: value, "x np.memmap": round(faster, 3)})
    return table


def missing(about: Row, unit: str) -> list[Row]:
    """Return a line for each reader whose package is not here."""
    return [
        {**about, "reader": name, unit: "not installed"}
        for name, stream in streams().items()
        if stream is None
    ]


def warm(folder: Path, *, workers: int, device: str, repeats: int) -> list[Row]:
    """Measure readers that have long been running."""
    packed = {f"ours, packed on {device}": partial(ours, read="mmap", packed=device)}
    with ExitStack() as stack:
        bodies = {}
        batches: Iterator[torch.Tensor]
        for name, stream in {**streams(), **({} if workers else packed)}.items():
            if stream is None:
                continue
            if workers:
                ahead = _Ahead(stream, folder)
                batches = iter(DataLoader(ahead, batch_size=None, num_workers=workers))
            else:
                batches = stack.enter_context(closing(stream(folder)))
            seconds(batches, batches=4 * TURN)  # an epoch of the small files: touches all pages
            bodies[name] = partial(seconds, batches, batches=TURN, before=READY)
        found = turns(bodies, repeats=repeats)
    about: Row = {"case": "warm", "workers": workers}
    return lines(about, found, rows=TURN * BATCH) + missing(about, "rows/s")


def drop(folder: Path) -> float:
    """Drop the pages of the files in `folder` from the cache; returns the share that stayed."""
    libc, stayed, pages = ctypes.CDLL(None, use_errno=True), 0, 0
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # what is not yet on the disk cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                content = np.frombuffer(view, np.uint8)
                held = np.zeros(-(-content.size // mmap.PAGESIZE), np.uint8)
                libc.mincore(
                    ctypes.c_void_p(content.ctypes.data),
                    ctypes.c_size_t(content.size),
                    ctypes.c_void_p(held.ctypes.data),
                )
                del content  # else the map could not be closed
        stayed, pages = stayed + int((held & 1).sum()), pages + held.size
    return stayed / pages


def fresh(folder: Path, *, dropped: bool, repeats: int) -> list[Row]:
    """Measure readers that are new, of files in the page cache or, `dropped`, on the disk alone."""
    kept = [0.0]

    def body(stream: Stream, files: Path) -> float:
        if dropped:
            kept.append(drop(files))
        with closing(stream(folder)) as batches:
            return seconds(batches, batches=FRESH, before=FRESH)  # without the start

    bodies = {
        "np.memmap": partial(body, partial(in_memmap, random=True), folder / "raw"),
        "ours, mmap": partial(body, partial(ours, read="mmap"), folder / "ours"),
        "ours, pread": partial(body, partial(ours, read="pread"), folder / "ours"),
    }
    if not dropped:
        for path in (*(folder / "raw").iterdir(), *(folder / "ours").iterdir()):
            path.read_bytes()
    found = turns(bodies, repeats=repeats)
    about: Row = {"case": "cold" if dropped else "new"}
    if dropped:
        about["stayed"] = f"{100 * max(kept):.0f} %"
    return lines(about, found, rows=FRESH * BATCH)


def start(folder: Path, *, repeats: int) -> list[Row]:
    """Measure the time to a first batch."""

    def body(stream: Stream) -> float:
        with closing(stream(folder)) as batches:
            return seconds(batches, batches=1)

    bodies = {name: partial(body, stream) for name, stream in streams().items() if stream}
    turns(bodies, repeats=1)  # imports, page cache
    about: Row = {"case": "start", "shards": SHARDS}
    return lines(about, turns(bodies, repeats=repeats)) + missing(about, "ms")


def private_mib() -> float:
    """Return the anonymous memory of this process."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None, "wanted Linux"
    return int(found[1]) / 1024


def sampler(*, rows: int = 10**9, draws: int = 10**6) -> Row:
    """Measure what the order of so many rows keeps in memory."""
    before = private_mib()
    mixture = Mixture([Share(name="rows", rows=rows)], seed=0)
    began = time.perf_counter()
    for first in range(0, draws, AHEAD):
        mixture.rows(rows - draws + first + np.arange(AHEAD))  # over the edge of an epoch
    passed = time.perf_counter() - began
    return {
        "case": "sampler",
        "rows": rows,
        "MiB": round(private_mib() - before, 1),
        "MiB of a stored order": round(8 * rows / 2**20),
        "samples/s": round(draws / passed),
    }


def main() -> int:
    found = options(
        "python -m visual_sentences.bench_loader",
        __doc__,
        folders={"disk": "folder on the disk to measure, 1.3 GB; default: that of temporary files"},
    )
    table = [sampler()]
    with tempfile.TemporaryDirectory(dir=found.disk, prefix="bench-loader-") as name:
        folder = Path(name)
        large, small, many = (folder / part for part in ("large", "small", "many"))
        write_rows(large, shards=2, rows=32_768, others=["raw"])  # as large as shards are
        for dropped in (True, False):
            table += fresh(large, dropped=dropped, repeats=found.repeats)
        write_rows(small, shards=16, rows=256)
        for workers in (0, 2):
            table += warm(small, workers=workers, device=found.device, repeats=found.repeats)
        write_rows(many, shards=SHARDS, rows=4)
        table += start(many, repeats=min(found.repeats, 5))
    report("loader", found.device, table)
    return 0


if __name__ == "__main__":
    raise SystemExit(guarded(main, prog="python -m visual_sentences.bench_loader"))
