"""What a build would make and how long it would take, by looking at a little of each source."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from shutil import copy
from tempfile import TemporaryDirectory

import numpy as np
import torch

from tokenizer.cli import duration
from tokenizer.images import BadImage
from visual_sentences.draw import draw
from visual_sentences.job import Job
from visual_sentences.layouts import LAYOUTS
from visual_sentences.mixture import Mixture, Share
from visual_sentences.pixels import decode
from visual_sentences.plan import Plan, Unit, load_plans, make_plan, write_plan
from visual_sentences.report import align, describe_unusable
from visual_sentences.seal import unusable
from visual_sentences.sentence import Sample, fill_rows
from visual_sentences.spec import Source, Spec
from visual_sentences.unit import Found, find, jpeg
from visual_sentences.workers import Worker

ITEMS = 256  # of each source that are laid out
PICTURES = 32  # of each source that are read and encoded

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a source will become; `seconds` are those of one process."""

    files: int
    images: float
    sentences: float
    rows: float
    seconds: float


def dry_run(spec: Spec, job: Job, *, shard_rows: int, workers: int, log: Log) -> None:
    """Plan, measure and tell; nothing is written to the build's folder."""
    with TemporaryDirectory() as folder:
        for path in Path(job.out).glob("plan-*.arrow"):
            copy(path, folder)
        before = load_plans(spec, Path(folder))
        plan = make_plan(spec, job, shard_rows=shard_rows, before=before, out=Path(folder))
        write_plan(plan, Path(folder))
        describe_unusable(unusable([plan], []), log=log)
        done = f"; {_files_in(before)} files are in {job.out} already" if before else ""
        table = _table(plan, spec, replace(job, out=folder), workers=workers)
    log(table)
    log(
        f"figures are for what is new, extrapolated from {ITEMS} items of each source, times from "
        f"{PICTURES} images of each and {workers} workers; nothing was written{done}"
    )


def _files_in(plans: Sequence[Plan]) -> int:
    return sum(unit.images for plan in plans for unit in plan.units)


def _table(plan: Plan, spec: Spec, job: Job, *, workers: int) -> str:
    threads = torch.get_num_threads()
    try:
        worker = Worker(job)
        estimates = {
            source.name: _estimate(source, [u for u in plan.units if u.source is source], worker)
            for source in spec.sources
        }
    finally:
        torch.set_num_threads(threads)
    shares = [
        Share(name=s.name, rows=round(estimates[s.name].rows), weight=s.weight, repeat=s.repeat)
        for s in spec.sources
    ]
    mixed = any(share.rows for share in shares)
    slots = Mixture(shares, seed=spec.seed).counts() if mixed else {}
    whole = sum(slots.values()) or 1
    row = job.images_per_row * job.codes_per_image
    lines = [("source", "kind", "files", "images", "sentences", "tokens", "share", "time")]
    for source in spec.sources:
        e = estimates[source.name]
        lines.append(
            (
                source.name,
                source.kind,
                f"{e.files:,}",
                f"{e.images:,.0f}",
                f"{e.sentences:,.0f}",
                f"{e.rows * row:,.0f}",
                f"{slots.get(source.name, 0) / whole:.1%}",
                duration(e.seconds / workers),
            )
        )
    sums = [sum(getattr(e, name) for e in estimates.values()) for name in Estimate.__slots__]
    files, images, sentences, rows, seconds = sums
    lines.append(
        (
            "all",
            "",
            f"{files:,}",
            f"{images:,.0f}",
            f"{sentences:,.0f}",
            f"{rows * row:,.0f}",
            "100.0%",
            duration(seconds / workers),
        )
    )
    return align(lines)


def _estimate(source: Source, units: Sequence[Unit], worker: Worker) -> Estimate:
    files = sum(unit.images for unit in units)
    nothing = Estimate(files=files, images=0, sentences=0, rows=0, seconds=0)
    if not units:
        return nothing
    job = worker.job
    found = find(units[0], job)
    samples, looked_at = _samples(found, source, job)
    if not samples:
        return nothing
    if job.form == "images":
        sentences = rows = len(samples)
    else:
        made = LAYOUTS[source.kind](
            samples, images_per_row=job.images_per_row, source=source, seed=job.seed
        )
        sentences = len(made)
        rows = len(fill_rows(made, images_per_row=job.images_per_row))
    images = sum(len(sample.pictures) for sample in samples)
    times = files / looked_at
    return Estimate(
        files=files,
        images=images * times,
        sentences=sentences * times,
        rows=rows * times,
        seconds=images * times * _seconds_an_image(found, samples, worker),
    )


def _samples(found: Found, source: Source, job: Job) -> tuple[list[Sample], int]:
    """Return the samples of some items, and how many files these have."""
    samples: list[Sample] = []
    files = 0
    for item in islice((i for items in found.items.values() for i in items), ITEMS):
        files += len(item.names)
        try:
            whole = found.files.expand(item)
        except BadImage:
            continue
        samples += draw(
            whole,
            source=source,
            images_per_row=job.images_per_row,
            image_size=job.image_size,
            seed=job.seed,
        )
    return samples, files


def _seconds_an_image(found: Found, samples: Sequence[Sample], worker: Worker) -> float:
    """Read and encode a few images; the first batch is not timed, which may have to compile."""
    job = worker.job
    pictures = dict.fromkeys(p for sample in samples for p in sample.pictures)
    chosen = list(islice(pictures, PICTURES))
    start = time.perf_counter()
    finish = jpeg if worker.encoder is None else (lambda pixels: pixels)
    read = decode(found.files, chosen, size=job.image_size, threads=1, finish=finish)
    good = [entry.value for entry in read if not isinstance(entry.value, BadImage)]
    taken = time.perf_counter() - start
    if worker.encoder is not None and good:
        batches = [np.stack(good[i : i + job.batch]) for i in range(0, len(good), job.batch)]
        worker.encoder.encode(batches[0])
        start = time.perf_counter()
        for _ in worker.encoder.encode_all(batches):
            continue
        taken += time.perf_counter() - start
    return taken / len(chosen)
