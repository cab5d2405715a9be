"""Build shards of visual sentences from folders of images: plan, run, seal.

    plan    list every source, order it by seed, cut it into units of a fixed number of items
    run     each unit → shard and JSON, in as many processes as wanted
    seal    the manifest, written last: where it is, everything is there

A build that was killed goes on where it was: run the same command again.
"""

import errno
import fcntl
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

import tokenizer
from tokenizer.cli import CommandError, InputError, Progress, run
from tokenizer.files import atomic_write, remove_temporaries
from tokenizer.precision import Precision, resolve
from visual_sentences.manifest import FILE as MANIFEST
from visual_sentences.manifest import Manifest, ShardEntry, SourceEntry
from visual_sentences.plan import FILE as PLAN
from visual_sentences.plan import Plan, identity, make_plan, refuse_another
from visual_sentences.report import describe_plan, describe_unusable, table, verify
from visual_sentences.spec import load_spec
from visual_sentences.unit import Job, Result, finished
from visual_sentences.workers import cores, in_pool, in_process

UNUSABLE = "unusable.tsv"


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """Turn folders of images into shards of visual sentences.

    The same command again goes on with what is missing. Files that cannot be used are counted by
    reason, listed in unusable.tsv, and do not stop the work.
    """

    spec: Annotated[Path, tyro.conf.Positional]
    """The mixture spec, such as mix.toml."""
    tokenizer: Path
    """Folder of the tokenizer that encodes the images."""
    out: Path
    """Folder for the shards; made if need be."""
    workers: int = 0
    """Processes that read and encode; 0: one for each core. The bytes do not depend on it."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where images are encoded; with cuda each worker uses the GPU for its own batches."""
    precision: Precision = "auto"
    """Of the encoder's convolutions: auto is the fastest that keeps 99 % of the codes on a trained
    tokenizer, exact gives the codes of tokenizer.encode in fp32; the shards say which it was."""
    batch: int = 64
    """Images encoded at once."""
    shard_rows: int = 128
    """Most rows of a shard; for billions of images choose 16384 or more, so that files are few."""
    dry_run: bool = False
    """Say what would be built, and stop."""
    verify: bool = False
    """Afterwards read every shard again and compare its size and sha256 with the manifest."""


def main(command: Build) -> int:
    if command.batch < 1 or command.shard_rows < 1 or command.workers < 0:
        raise InputError("wanted --batch and --shard-rows of 1 or more, and --workers of 0 or more")
    if command.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here; use --device cpu")
    manifest = build(command, log=print)
    if manifest is None:
        return 0
    if command.verify:
        verify(command.out, manifest, log=print)
    with_rows = {shard.source for shard in manifest.shards}
    empty = [s.name for s in manifest.sources if s.name not in with_rows]
    if empty:
        raise CommandError(
            f"no image of {', '.join(empty)} could be used ({command.out / UNUSABLE} says why); "
            "all other sources are finished"
        )
    return 0


def build(command: Build, *, log: Callable[[str], None]) -> Manifest | None:
    """Do what `command` says; returns the manifest, or None after a dry run."""
    spec, out = load_spec(command.spec), command.out
    tok = tokenizer.load(command.tokenizer)
    row_len, images_per_row = spec.geometry(
        codes_per_image=tok.codes_per_image,
        image_size=tok.image_size,
        tokenizer=str(command.tokenizer),
    )
    job = Job(
        tokenizer=str(command.tokenizer),
        tokenizer_id=tok.id,
        codebook_size=tok.codebook_size,
        codes_per_image=tok.codes_per_image,
        image_size=tok.image_size,
        images_per_row=images_per_row,
        seed=spec.seed,
        batch=command.batch,
        device=command.device,
        precision=resolve(command.precision, tok=tok, device=command.device),
        out=str(out),
    )
    wanted = identity(spec, job, row_len=row_len, shard_rows=command.shard_rows)
    if not command.dry_run:
        refuse_another(out, wanted)
        if done := _whole(out):
            log(f"{out} is finished, nothing is left to do (its inputs were not listed again)")
            log(table(done))
            return done
    plan = make_plan(spec, job, row_len=row_len, shard_rows=command.shard_rows)
    unusable = [
        (source.name, reason, key)
        for source, listing in zip(spec.sources, plan.listings, strict=True)
        for key, reason in listing.bad
    ]
    describe_unusable(unusable, log=log)
    if command.dry_run:
        describe_plan(plan, log=log)
        return None
    out.mkdir(parents=True, exist_ok=True)
    with _only_writer(out):
        refuse_another(out, wanted | {"inputs": plan.inputs})
        (out / MANIFEST).unlink(missing_ok=True)  # it was there for shards that are not
        remove_temporaries(out)
        with atomic_write(out / PLAN, "w") as file:
            json.dump(wanted | {"inputs": plan.inputs}, file, indent=1)
        results = run_units(plan, workers=command.workers or cores())
        found = [(r.source, reason, key) for r in results for key, reason in r.bad]
        describe_unusable(found, log=log)
        with atomic_write(out / UNUSABLE, "w") as file:
            file.writelines("\t".join(entry) + "\n" for entry in sorted(unusable + found))
        manifest = seal(plan, results)
        manifest.save(out)
    log(table(manifest))
    return manifest


def run_units(plan: Plan, *, workers: int) -> list[Result]:
    """Run the units that are not there yet; returns the results of all, in the plan's order."""
    out = Path(plan.job.out)
    results = {unit.name: finished(unit, out) for unit in plan.units}
    todo = [unit for unit in plan.units if results[unit.name] is None]
    total = sum(unit.images for unit in plan.units)
    bad = sum(len(result.bad) for result in results.values() if result is not None)
    resumed = total - sum(unit.images for unit in todo)
    here = min(workers, len(todo)) <= 1
    work = in_process(plan.job, todo) if here else in_pool(plan.job, todo, workers=workers)
    with Progress("build", total=total, unit="images", done=resumed) as progress:
        for unit, result in work:
            results[unit.name] = result
            bad += len(result.bad)
            progress.update(unit.images, bad=bad)
    return [result for result in results.values() if result is not None]


def seal(plan: Plan, results: Sequence[Result]) -> Manifest:
    """Make the manifest of a plan whose units are all done."""
    bad = {
        source.name: Counter(reason for _, reason in listing.bad)
        for source, listing in zip(plan.spec.sources, plan.listings, strict=True)
    }
    good: Counter[str] = Counter()
    for result in results:
        bad[result.source].update(reason for _, reason in result.bad)
        good[result.source] += result.good
    return Manifest(
        tokenizer=plan.job.tokenizer_id,
        codebook_size=plan.job.codebook_size,
        codes_per_image=plan.job.codes_per_image,
        image_size=plan.job.image_size,
        row_len=plan.row_len,
        seed=plan.spec.seed,
        sources=tuple(
            SourceEntry(
                name=source.name,
                kind=source.kind,
                weight=source.weight,
                repeat=source.repeat,
                preprocess=source.preprocess,
                license=source.license,
                note=source.note,
                inputs=listing.inputs,
                good=good[source.name],
                bad=dict(sorted(bad[source.name].items())),
            )
            for source, listing in zip(plan.spec.sources, plan.listings, strict=True)
        ),
        shards=tuple(
            ShardEntry(
                name=f"{unit.name}.arrow",
                source=result.source,
                split=result.split,
                rows=result.rows,
                documents=result.documents,
                images=result.images,
                bytes=result.bytes,
                sha256=result.sha256,
                offset=result.offset,
            )
            for unit, result in zip(plan.units, results, strict=True)
            if result.rows
        ),
    )


def _whole(out: Path) -> Manifest | None:
    """Return the manifest of a finished build all of whose shards are there, else None."""
    if not (out / MANIFEST).exists():
        return None
    manifest = Manifest.load(out)
    for shard in manifest.shards:
        path = out / shard.name
        if not path.exists() or path.stat().st_size != shard.bytes:
            return None
    return manifest


@contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    """Hold `out` for this process; the lock goes when the process does, however it ends."""
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another build is writing to {out}; wait for it, or end it"
            ) from error
        except OSError as error:  # some network file systems have no locks
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
        yield
    finally:
        os.close(folder)


if __name__ == "__main__":
    run(Build, main, prog="python -m visual_sentences.build")
