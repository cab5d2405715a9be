"""Time a build beside what bounds it: python -m visual_sentences.bench_build [--data DIR].

    decode   the same images read, decoded and resized, and nothing done with them: the limit
    images   a build of JPEG shards
    free     a build of codes that cost nothing, 16 × 16 of an image's own pixels: what is left for
             the processor to do where GPUs encode and are never waited for
    codes    a build of codes by the tokenizer of --tokenizer, where it is given

All with as many processes as there are cores, in turns, round after round; the rate is that between
the first unit and the last, so that the start of processes does not count. Ratios are taken within
a round. Without --data the images are 500 × 375 JPEGs of smooth noise, some 26 kB each.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import numpy as np
from PIL import Image

import tokenizer
from kernels.timing import options, report
from tokenizer.cli import guarded
from tokenizer.encode import BulkEncoder
from tokenizer.images import encode_image
from visual_sentences.build import Build, prepare
from visual_sentences.job import Job
from visual_sentences.pixels import decode
from visual_sentences.plan import Unit, load_plans, make_plan, write_plan
from visual_sentences.sentence import Picture
from visual_sentences.spec import load_spec
from visual_sentences.unit import find, run_unit
from visual_sentences.workers import cores, in_pool

IMAGES, DIFFERENT, ROUNDS = 1536, 128, 3
HEIGHT, WIDTH, QUALITY = 375, 500, 88
SIDE = 16  # places of a free code
SPEC = """
image_size = {size}
[[source]]
name = "images"
kind = "image"
path = "{path}"
"""


def write_photos(folder: Path, count: int) -> None:
    """Write JPEGs whose detail is spread over scales as in photographs, each under some names."""
    folder.mkdir()
    for number in range(min(count, DIFFERENT)):
        rng = np.random.default_rng(number)
        image = np.full((HEIGHT, WIDTH, 3), 128, np.float32)
        for scale in (4, 8, 16, 32, 64, 128):
            shape = (scale * 3 // 4 + 1, scale, 3)
            noise = Image.fromarray(rng.integers(0, 256, shape, np.uint8))
            grown = np.asarray(noise.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32)
            image += (grown - 128) * (2 / scale**0.5)
        pixels = image.clip(0, 255).astype(np.uint8)
        data = encode_image(pixels, format="JPEG", quality=QUALITY)
        for name in range(number, count, DIFFERENT):
            (folder / f"{name:05d}.jpg").write_bytes(data)


class Free:
    """Takes the place of an encoder: codes are the red of some pixels."""

    def encode_all(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for pixels in batches:
            step = pixels.shape[1] // SIDE
            yield pixels[:, ::step, ::step, 0].reshape(len(pixels), -1).astype(np.int64)


def decode_only(job: Job, unit: Unit) -> int:
    """Do what no build can do without; returns how many images were read."""
    found = find(unit, job)
    pictures = [Picture(name) for i in found.items.values() for item in i for name in item.names]
    read = decode(found.files, pictures, size=job.image_size, threads=1)
    return sum(isinstance(entry.value, np.ndarray) for entry in read)


def free_unit(job: Job, unit: Unit) -> int:
    """Build a unit, its encoding aside."""
    run_unit(unit, job=job, encoder=cast(BulkEncoder, Free()))
    _remove(job, unit)
    return unit.images


def rate(finished: Iterator[int]) -> float:
    """Return images a second from when the first unit was done."""
    next(finished)
    start, images = time.perf_counter(), 0
    for count in finished:
        images += count
    return images / (time.perf_counter() - start)


def pooled(body: Callable[[Job, Unit], int], job: Job, units: Sequence[Unit]) -> Iterator[int]:
    with ProcessPoolExecutor(cores(), mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(body, job, unit) for unit in units]):
            yield future.result()


def built(job: Job, units: Sequence[Unit]) -> Iterator[int]:
    for unit, _ in in_pool(job, units, workers=cores(), log=print):
        yield unit.images
        _remove(job, unit)


def _remove(job: Job, unit: Unit) -> None:
    for path in Path(job.out).glob(f"{unit.name}.*"):
        path.unlink()


def table(
    data: Path | None,
    tok: Path | None,
    *,
    rounds: int = ROUNDS,
    count: int = IMAGES,
    size: int = 256,
) -> list[dict[str, object]]:
    with TemporaryDirectory() as made:
        root = Path(made)
        if tok is not None:
            size = tokenizer.load(tok).image_size
        if data is None:
            data = root / "photos"
            write_photos(data, count)
        spec = root / "mix.toml"
        spec.write_text(SPEC.format(size=size, path=data.absolute().as_posix()))
        build = Build(spec=spec, out=root / "out", images=True)
        ways: dict[str, tuple[Callable[[Job, Sequence[Unit]], Iterator[int]], Build]] = {
            "decode": (partial(pooled, decode_only), build),
            "images": (built, build),
            "free": (partial(pooled, free_unit), build),
        }
        if tok is not None:
            ways["codes"] = (built, replace(build, images=False, tokenizer=tok))
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, (run, command) in ways.items():
                job, units = _planned(command, root / name)
                rates[name].append(rate(run(_free(job) if name == "free" else job, units)))
    return [
        {
            "what": name,
            "images/s": round(statistics.median(found), 1),
            "of the limit": round(
                statistics.median(a / b for a, b in zip(found, rates["decode"], strict=True)), 3
            ),
        }
        for name, found in rates.items()
    ]


def _free(job: Job) -> Job:
    """Return the job for codes of `Free`."""
    codes = SIDE * SIDE
    return replace(job, form="codes", codebook_size=256, codes_per_image=codes, tokenizer_id="free")


def _planned(command: Build, out: Path) -> tuple[Job, Sequence[Unit]]:
    """Return the job and units of 64 images each, planned in `out`."""
    out.mkdir(exist_ok=True)
    spec = load_spec(command.spec)
    job, _ = prepare(replace(command, out=out), spec)
    rows = 64 if job.form == "images" else max(1, 64 // job.images_per_row)
    if not (out / "plan-001.arrow").exists():
        write_plan(make_plan(spec, job, shard_rows=rows, before=[], out=out), out)
    return job, load_plans(spec, out)[0].units


def main() -> int:
    found = options(
        "python -m visual_sentences.bench_build",
        __doc__,
        folders={"data": "folder of images", "tokenizer": "folder of a tokenizer to build with"},
    )
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = table(found.data, found.tokenizer, rounds=min(found.repeats, ROUNDS))
    report("build", found.device, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(guarded(main, prog="python -m visual_sentences.bench_build"))
