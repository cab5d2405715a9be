"""A work unit of a build: some items of one source become one shard of each split they are in.

Pure: the shards' bytes depend on the unit and the job alone. Which process runs it, when, beside
how many others, and after which crash make no difference.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokenizer.encode import BulkEncoder
from tokenizer.files import atomic_write
from tokenizer.images import BadImage, encode_image
from visual_sentences.containers.origin import Part
from visual_sentences.containers.paths import path_of
from visual_sentences.draw import draw, usable
from visual_sentences.job import Job, excluded_names
from visual_sentences.manifest import ShardEntry
from visual_sentences.pixels import Decoded, Files, base_name, decode
from visual_sentences.plan import Unit, planned
from visual_sentences.seeds import seeded
from visual_sentences.sentence import Item, Picture, Sample
from visual_sentences.shards import code_type
from visual_sentences.sources import Bad, list_items, part_sets, role_of, split_of
from visual_sentences.writing import write_codes, write_jpegs

VERSION = 2  # of the JSON of each unit
JPEG_QUALITY = 95
SHAPES = 0.02  # sides of a sample's images may be rounded, not of another aspect ratio
MISSING = "missing file"  # what `open_image` says, too
SPOILT = {
    "pair": "other half unusable",
    "style": "other half unusable",
    "annotated": "another image of it unusable",
    "video": "clip too short",
    "orbit": "clip too short",
    "annotated_video": "clip too short",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a unit made, as its JSON has it.

    `inputs` counts files: of a folder or list those of the unit's items, of tars and Parquet files
    all that are in them. `excluded` are the names that were left out as the exclude file asks.
    """

    source: str
    shards: Sequence[ShardEntry]
    inputs: int
    good: int
    bad: Sequence[Bad]
    excluded: Sequence[str]
    exclude_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A unit's items by split without the excluded ones, and the files they are in."""

    items: Mapping[str, Sequence[Item]]
    files: Files
    inputs: int
    bad: Sequence[Bad]
    excluded: Sequence[str]


def finished(unit: Unit, job: Job) -> Result | None:
    """Return the result of a unit that an earlier run finished and that is as it should be.

    Its shards are there in full, it left out what the exclude file names now, and no file that was
    missing is there again.
    """
    out = Path(job.out)
    try:
        values = json.loads((out / f"{unit.name}.json").read_text(encoding="utf-8"))
        if values.pop("version") != VERSION:
            return None
        shards = tuple(ShardEntry(**entry) for entry in values["shards"])
        bad = [(key, reason) for key, reason in values["bad"]]
        result = Result(**values | {"shards": shards, "bad": bad})
        if any((out / shard.name).stat().st_size != shard.bytes for shard in shards):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    missing = {name for name, reason in result.bad if reason == MISSING}
    if result.exclude_id != job.exclude_id or missing:
        found = find(unit, job)
        still = {name for name, reason in found.bad if reason == MISSING}
        if unit.split:
            still |= {name for name in missing if not found.files.there(name)}
        if found.excluded != result.excluded or still != missing:
            return None
    return result


def find(unit: Unit, job: Job) -> Found:
    """Return what a unit has to work with; tars and Parquet files are listed here."""
    items = planned(Path(job.out), unit)
    if unit.split:
        sets, _ = part_sets(unit.source)
        files = Files(source=unit.source, listed=sets[0])
        inputs, bad = sum(len(item.names) for item in items), list[Bad]()
    else:
        items, files, inputs, bad = _list_parts(unit, items)
    names = excluded_names(job.exclude, job.exclude_id)
    excluded: list[str] = []
    splits: dict[str, list[Item]] = {}
    for item in items:
        if names and _is_excluded(item, unit, names):
            excluded += item.names
        else:
            split = unit.split or split_of(item.stem, unit.source.splits)
            splits.setdefault(split, []).append(item)
    bad += [(name, "excluded") for name in excluded]
    return Found(items=splits, files=files, inputs=inputs, bad=bad, excluded=sorted(excluded))


def run_unit(unit: Unit, *, job: Job, encoder: BulkEncoder | None) -> Result:
    """Read, encode, lay out and write one unit; first its shards, then its JSON, each by rename."""
    found = find(unit, job)
    bad = dict(found.bad)
    samples = {
        split: _draw_all(items, unit=unit, job=job, files=found.files, bad=bad)
        for split, items in sorted(found.items.items())
    }
    pictures = dict.fromkeys(p for drawn in samples.values() for s in drawn for p in s.pictures)
    place: dict[Picture, int] = {}
    shapes: dict[Picture, tuple[int, int]] = {}

    def good(decoded: Iterable[Decoded]) -> Iterator[Any]:
        for entry in decoded:
            if isinstance(entry.value, BadImage):
                bad[entry.picture.name] = entry.value.reason
            else:
                place[entry.picture] = len(place)
                shapes[entry.picture] = entry.shape
                yield entry.value

    if encoder is not None:
        pixels = decode(found.files, pictures, size=job.image_size, threads=job.threads)
        values: Any = _codes(good(pixels), job=job, encoder=encoder)
    else:
        files = decode(found.files, pictures, size=job.image_size, threads=job.threads, finish=jpeg)
        values = list(good(files))

    shards, used = [], set[str]()
    for split, drawn in samples.items():
        whole = [s for sample in drawn if (s := usable(sample, place, kind=unit.source.kind))]
        whole = [s for s in whole if _of_one_shape(s, unit, shapes, bad)]
        used |= {base_name(p.name) for sample in whole for p in sample.pictures}
        if whole:
            write = write_codes if encoder is not None else write_jpegs
            shards.append(write(unit, split, whole, values, place=place, job=job))
    spoilt = SPOILT.get(unit.source.kind, "")
    for name in {base_name(picture.name): None for picture in place}:
        if name not in used:
            bad.setdefault(name, spoilt)
    result = Result(
        source=unit.source.name,
        shards=shards,
        inputs=found.inputs,
        good=len(used),
        bad=list(bad.items()),
        excluded=found.excluded,
        exclude_id=job.exclude_id,
    )
    with atomic_write(Path(job.out) / f"{unit.name}.json", "w") as file:
        json.dump({"version": VERSION, **asdict(result)}, file, indent=1)
    return result


def _list_parts(unit: Unit, chosen: Sequence[Item]) -> tuple[list[Item], Files, int, list[Bad]]:
    """List the tars or Parquet files of a unit, by their names alone: there may be many others."""
    items: list[Item] = []
    bad: list[Bad] = []
    files = Files(source=unit.source)
    inputs = 0
    for planned_set in chosen:
        together = {
            role: Part(origin=origin, name=name, id=planned_set.stem)
            for (role, origin), name in zip(
                unit.source.origins.items(), planned_set.names, strict=True
            )
        }
        if not all(path_of(part).is_file() for part in together.values()):
            bad += [(name, MISSING) for name in planned_set.names]
            inputs += len(planned_set.names)
            continue
        listing = list_items(unit.source, together)
        items += listing.items
        bad += listing.bad
        inputs += listing.inputs
        for name in listing.order:
            files.parts[name] = together[role_of(unit.source, name)[0]]
            files.order[name] = len(files.order)
    return items, files, inputs, bad


def _is_excluded(item: Item, unit: Unit, names: frozenset[str]) -> bool:
    return item.stem in names or any(
        name in names or role_of(unit.source, name)[1] in names for name in item.names
    )


def _draw_all(
    items: Sequence[Item], *, unit: Unit, job: Job, files: Files, bad: dict[str, str]
) -> list[Sample]:
    """Return the samples of all passes over the items, in seeded order."""
    drawn: list[Sample] = []
    for item in items:
        try:
            whole = files.expand(item)
        except BadImage as error:
            bad.update(dict.fromkeys(item.names, error.reason))
            continue
        drawn += draw(
            whole,
            source=unit.source,
            images_per_row=job.images_per_row,
            image_size=job.image_size,
            seed=job.seed,
        )
    name = unit.source.name
    drawn.sort(key=lambda s: (seeded(job.seed, name, "pass", s.stem, s.number), s.pictures[0].name))
    return drawn


def _codes(pixels: Iterator[np.ndarray], *, job: Job, encoder: BulkEncoder) -> np.ndarray:
    """Return codes [images, codes_per_image]; all batches but the last are full."""
    kind = code_type(job.codebook_size)
    parts = [codes.astype(kind) for codes in encoder.encode_all(_batches(pixels, job))]
    return np.concatenate([np.zeros((0, job.codes_per_image), kind), *parts])


def _batches(pixels: Iterator[np.ndarray], job: Job) -> Iterator[np.ndarray]:
    batch = np.empty((job.batch, job.image_size, job.image_size, 3), np.uint8)
    count = 0
    for image in pixels:
        batch[count] = image
        count += 1
        if count == job.batch:
            yield batch
            count = 0
    if count:
        yield batch[:count]


def jpeg(pixels: np.ndarray) -> bytes:
    return encode_image(pixels, format="JPEG", quality=JPEG_QUALITY)


def _of_one_shape(
    sample: Sample, unit: Unit, shapes: Mapping[Picture, tuple[int, int]], bad: dict[str, str]
) -> bool:
    """Say whether the images of a sample show the same part of what they show.

    A crop keeps another part of an image of another aspect ratio; `squash` keeps all of both, and
    images that were squashed before still fit.
    """
    if unit.source.preprocess == "squash" or len(unit.source.origins) == 1:
        return True
    width, height = shapes[sample.pictures[0]]
    for picture in sample.pictures:
        w, h = shapes[picture]
        if abs(w * height - h * width) > SHAPES * w * height:
            bad.update((base_name(p.name), "shapes differ") for p in sample.pictures)
            return False
    return True
