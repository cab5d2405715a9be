"""Build shards of visual sentences: plan, run, seal.

    plan    list every source, order it by seed, cut it into units; kept in plan-NNN.arrow
    run     each unit → shards and JSON, by as many processes or machines as wanted
    seal    the manifest, written last: where it is, everything is there

A build that was killed goes on where it was: run the same command again. Run it later, and what the
sources have got since becomes further shards; nothing of the old ones is touched.
"""

import re
import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

import tokenizer
from tokenizer.cli import CommandError, InputError, Progress, run
from tokenizer.files import atomic_write, remove_temporaries
from tokenizer.precision import Precision, resolve
from visual_sentences.dry_run import dry_run
from visual_sentences.identity import identity, refuse_another, save_identity
from visual_sentences.job import Job, exclude_id
from visual_sentences.manifest import FILE as MANIFEST
from visual_sentences.manifest import Manifest
from visual_sentences.output import held, make_folder, withdraw
from visual_sentences.plan import Plan, Unit, load_plans, make_plan, write_plan
from visual_sentences.report import describe_unusable, table, verify
from visual_sentences.seal import seal, unusable
from visual_sentences.spec import IMAGES_PER_ROW, Spec, load_spec
from visual_sentences.unit import Result, finished
from visual_sentences.workers import Done, cores, in_pool, in_process

UNUSABLE = "unusable.tsv"

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """Turn images and videos into shards of visual sentences.

    The same command again goes on with what is missing, or adds what is new. Files that cannot be
    used are counted by reason, listed in unusable.tsv, and do not stop the work.
    """

    spec: Annotated[Path, tyro.conf.Positional]
    """The mixture spec, such as mix.toml."""
    out: Path
    """Folder for the shards; made if need be."""
    tokenizer: Path | None = None
    """Folder of the tokenizer that encodes the images."""
    images: bool = False
    """Store the images as JPEG with their labels, one item a row, instead of codes; needs no
    tokenizer, but image_size in the spec."""
    engine: Literal["local", "ray"] = "local"
    """Who runs the work: processes of this machine, or a Ray cluster."""
    part: str = ""
    """i/n: this is job i of n, from 1, that share the work, as in a Slurm array; when all are done,
    the same command without --part writes the manifest."""
    workers: int = 0
    """Processes that read and encode; 0: one for each core, or each GPU. No byte depends on it."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where images are encoded."""
    precision: Precision = "auto"
    """Of the encoder's convolutions: auto is the fastest that keeps 99 % of the codes on a trained
    tokenizer, exact gives the codes of tokenizer.encode in fp32; the shards say which it was."""
    batch: int = 64
    """Images encoded at once."""
    shard_rows: int = 128
    """Rows of a shard, about; for billions of images choose 16384 or more, so that files are few.
    A tar or Parquet file is never cut."""
    exclude: Path | None = None
    """Text file of names or stems, one a line, that must not be used. Where a finished shard has
    one of them, it is made again without."""
    dry_run: bool = False
    """Say what would be built and how long it would take, and stop."""
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


def build(command: Build, *, log: Log) -> Manifest | None:
    """Do what `command` says; returns the manifest, or None after a dry run or a part."""
    spec, out, mine = load_spec(command.spec), command.out, _part(command.part)
    job, row_len = prepare(command, spec)
    wanted = identity(spec, job, row_len=row_len, shard_rows=command.shard_rows)
    if command.dry_run:
        dry_run(spec, job, shard_rows=command.shard_rows, workers=_workers(command), log=log)
        return None
    make_folder(out)
    with held(out, alone=mine is None):
        refuse_another(out, wanted)
        if mine is None:
            remove_temporaries(out)
        plans = load_plans(spec, out)
        sealed = Manifest.load(out) if (out / MANIFEST).exists() else None
        results: dict[str, Result] = {}
        if plans:  # what was begun or lost comes first, then what is new since
            results = run_units(command, _labelled(job, plans), plans, part=mine, log=log)
        begun = bool(plans) and (sealed is None or sealed.generation < len(plans))
        if mine is None or not begun:  # parts share one plan until it is sealed
            new = make_plan(spec, job, shard_rows=command.shard_rows, before=plans, out=out)
            if new.units or not plans:
                save_identity(out, wanted)  # first: a plan is nothing without what it is for
                write_plan(new, out)
                plans = load_plans(spec, out)  # of parts that start together one was first
        job = _labelled(job, plans)
        results |= run_units(command, job, plans, part=mine, known=results, log=log)
        if mine is not None:
            log(
                f"part {command.part} is done; when all are, the same command without --part "
                "writes the manifest"
            )
            return None
        manifest = seal(spec, job, plans, list(results.values()), row_len=row_len)
        if sealed is not None and manifest == sealed and (out / MANIFEST).exists():
            log(f"{out} is finished, nothing is left to do")
        else:
            entries = unusable(plans, results.values())
            describe_unusable(entries, log=log)
            with atomic_write(out / UNUSABLE, "w") as file:
                file.writelines("\t".join(entry) + "\n" for entry in sorted(entries))
            older = sealed is not None and sealed.generation < manifest.generation
            if sealed is not None and older and (out / MANIFEST).exists():
                shutil.copy(out / MANIFEST, out / f"manifest-{sealed.generation:03d}.json")
            manifest.save(out)
    log(table(manifest))
    return manifest


def run_units(
    command: Build,
    job: Job,
    plans: Sequence[Plan],
    *,
    part: tuple[int, int] | None,
    known: dict[str, Result] | None = None,
    log: Log,
) -> dict[str, Result]:
    """Run the units that are not there yet; returns the results of all, in the plans' order."""
    units = [unit for plan in plans for unit in plan.units]
    if part is not None:
        units = units[part[0] - 1 :: part[1]]
    known = known or {}
    results = {unit.name: known.get(unit.name) or finished(unit, job) for unit in units}
    todo = [unit for unit in units if results[unit.name] is None]
    withdraw(job, todo)
    total = sum(unit.images for unit in units)
    bad = sum(len(result.bad) for result in results.values() if result is not None)
    resumed = total - sum(unit.images for unit in todo)
    try:
        with (
            Progress("build", total=total, unit="images", done=resumed) as progress,
            closing(_engine(command, job, todo, log=log)) as done,
        ):
            for unit, result in done:
                results[unit.name] = result
                bad += len(result.bad)
                progress.update(unit.images, bad=bad)
    finally:
        if part is None:
            remove_temporaries(Path(job.out))  # of workers that were killed
    return {name: result for name, result in results.items() if result is not None}


def _engine(command: Build, job: Job, units: Sequence[Unit], *, log: Log) -> Generator[Done]:
    """Yield results as they come; when it is closed, nobody works on units any more."""
    if not units:
        return
    if command.engine == "ray":
        from visual_sentences.on_ray import on_ray

        yield from on_ray(job, units, workers=command.workers, log=log)
        return
    workers = _workers(command)
    job = replace(job, threads=max(1, cores() // workers))
    if min(workers, len(units)) == 1:
        yield from in_process(job, units)
    else:
        yield from in_pool(job, units, workers=workers, log=log)


def _workers(command: Build) -> int:
    return command.workers or (cores() if command.device == "cpu" else torch.cuda.device_count())


def prepare(command: Build, spec: Spec) -> tuple[Job, int]:
    """Return the job and the length of a row, 0 for images."""
    shared: dict[str, Any] = {
        "seed": spec.seed,
        "batch": command.batch,
        "out": str(command.out.absolute()),  # for workers elsewhere
        "exclude": str(command.exclude.absolute()) if command.exclude else "",
        "exclude_id": exclude_id(command.exclude),
    }
    if command.images:
        if command.tokenizer is not None:
            raise InputError("--images stores no codes: leave out --tokenizer, or --images")
        if spec.image_size is None:
            raise InputError(
                f"--images needs a size: write image_size = 256, or another, into {command.spec}"
            )
        images = Job(
            form="images",
            tokenizer="",
            tokenizer_id="",
            codebook_size=0,
            codes_per_image=0,
            image_size=spec.image_size,
            images_per_row=IMAGES_PER_ROW,
            device="cpu",
            precision="exact",
            **shared,
        )
        return images, 0
    if command.tokenizer is None:
        raise InputError(
            "wanted --tokenizer DIR, which encodes the images, or --images to store them as JPEG"
        )
    tok = tokenizer.load(command.tokenizer)
    row_len, images_per_row = spec.geometry(
        codes_per_image=tok.codes_per_image,
        image_size=tok.image_size,
        tokenizer=str(command.tokenizer),
    )
    job = Job(
        form="codes",
        tokenizer=str(command.tokenizer.absolute()),
        tokenizer_id=tok.id,
        codebook_size=tok.codebook_size,
        codes_per_image=tok.codes_per_image,
        image_size=tok.image_size,
        images_per_row=images_per_row,
        device=command.device,
        precision=resolve(command.precision, tok=tok, device=command.device),
        **shared,
    )
    return job, row_len


def _labelled(job: Job, plans: Sequence[Plan]) -> Job:
    return replace(job, classes={name: entry.classes for name, entry in plans[-1].listed.items()})


def _part(written: str) -> tuple[int, int] | None:
    if not written:
        return None
    found = re.fullmatch(r"(\d+)/(\d+)", written)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise InputError(f"--part {written}: wanted i/n with i from 1 to n, such as 3/16")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    run(Build, main, prog="python -m visual_sentences.build")
