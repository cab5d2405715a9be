"""A work unit of a build: some items of one source and split become one shard.

Pure: the shard's bytes depend on the unit and the job alone. Which process runs it, when, beside
how many others, and after which crash make no difference.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokenizer.encode import BulkEncoder
from tokenizer.files import atomic_write
from tokenizer.images import BadImage, read_image
from tokenizer.precision import Precision
from visual_sentences.layouts import LAYOUTS, draw_frames
from visual_sentences.sentence import Sample, fill_rows, row_indices
from visual_sentences.shards import code_type, write_shard
from visual_sentences.sources import path_of
from visual_sentences.spec import Source

VERSION = 1  # of the JSON beside each shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What all units of a build share."""

    tokenizer: str  # folder
    tokenizer_id: str
    codebook_size: int
    codes_per_image: int
    image_size: int
    images_per_row: int
    seed: int
    batch: int
    device: str
    precision: Precision  # never auto, which other machines may resolve otherwise
    out: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    source: Source
    split: str
    number: int
    items: Sequence[Sample]

    @property
    def name(self) -> str:
        return f"{self.source.name}-{self.split}-{self.number:05d}"

    @property
    def images(self) -> int:
        """Image files of the items; a clip's frames may not all be drawn."""
        return sum(len(item.keys) for item in self.items)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a unit made, as the JSON beside its shard; rows is 0 and no shard there if nothing."""

    source: str
    split: str
    rows: int
    documents: int
    images: int
    good: int
    bad: Sequence[tuple[str, str]]
    bytes: int = 0
    sha256: str = ""
    offset: int = 0


def finished(unit: Unit, out: Path) -> Result | None:
    """Return the result of a unit that an earlier run finished and whose shard is still whole."""
    try:
        values = json.loads((out / f"{unit.name}.json").read_text(encoding="utf-8"))
        if values.pop("version") != VERSION:
            return None
        result = Result(**values | {"bad": [(key, reason) for key, reason in values["bad"]]})
        if result.rows and (out / f"{unit.name}.arrow").stat().st_size != result.bytes:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result


def run_unit(unit: Unit, *, job: Job, encoder: BulkEncoder) -> Result:
    """Read, encode, lay out and write one unit; first its shard, then its JSON, each by rename."""
    samples = _samples(unit, job)
    keys = list(dict.fromkeys(key for sample in samples for key in sample.keys))
    codes, place, bad = _encode(unit.source, keys, job=job, encoder=encoder)
    samples = _usable(unit.source.kind, samples, place)
    sentences = LAYOUTS[unit.source.kind](samples, images_per_row=job.images_per_row)
    rows = fill_rows(sentences, images_per_row=job.images_per_row)

    used = {key for sentence in sentences for key in sentence.keys}
    spoilt = {"pair": "other half unusable", "video": "clip too short"}.get(unit.source.kind, "")
    bad += [(key, spoilt) for key in place if key not in used]
    facts: dict[str, Any] = {
        "source": unit.source.name,
        "split": unit.split,
        "rows": len(rows),
        "documents": len(sentences),
        "images": sum(len(sentence.keys) for sentence in sentences),
        "good": len(used),
        "bad": bad,
    }
    out = Path(job.out)
    if rows:
        table = row_indices(rows, place, images_per_row=job.images_per_row)
        tokens = codes[table] * (table >= 0).astype(codes.dtype)[:, :, None]
        sizes = [[len(s.keys) * job.codes_per_image for s in row] for row in rows]
        docs = [np.cumsum([0, *row[:-1]]).tolist() for row in sizes]
        written = write_shard(
            out / f"{unit.name}.arrow",
            tokens=tokens.reshape(len(rows), -1),
            docs=docs,
            length=np.array([sum(row) for row in sizes], np.int32),
            keys=[[key for sentence in row for key in sentence.keys] for row in rows],
            metadata=_metadata(unit, job),
        )
        facts |= {"bytes": written.bytes, "sha256": written.sha256, "offset": written.offset}
    result = Result(**facts)
    with atomic_write(out / f"{unit.name}.json", "w") as file:
        json.dump({"version": VERSION, **asdict(result)}, file, indent=1)
    return result


def _samples(unit: Unit, job: Job) -> list[Sample]:
    if unit.source.kind != "video":
        return list(unit.items)
    passes = (
        draw_frames(
            item.stem,
            item.keys,
            strides=unit.source.stride,
            images_per_row=job.images_per_row,
            seed=job.seed,
            source=unit.source.name,
        )
        for item in unit.items
    )
    return [sample for samples in passes for sample in samples]


def _usable(kind: str, samples: list[Sample], place: dict[str, int]) -> list[Sample]:
    """Drop images and pairs of which a file is bad; a clip goes on without its bad frames."""
    if kind != "video":
        return [sample for sample in samples if all(key in place for key in sample.keys)]
    return [Sample(s.stem, tuple(key for key in s.keys if key in place)) for s in samples]


def _encode(
    source: Source, keys: Sequence[str], *, job: Job, encoder: BulkEncoder
) -> tuple[np.ndarray, dict[str, int], list[tuple[str, str]]]:
    """Return codes [good, codes_per_image], the place in them of each good key, the bad keys."""
    place: dict[str, int] = {}
    bad: list[tuple[str, str]] = []
    kind = code_type(job.codebook_size)
    batches = _batches(source, keys, job=job, place=place, bad=bad)
    parts = [codes.astype(kind) for codes in encoder.encode_all(batches)]
    return np.concatenate([np.zeros((0, job.codes_per_image), kind), *parts]), place, bad


def _batches(
    source: Source,
    keys: Sequence[str],
    *,
    job: Job,
    place: dict[str, int],
    bad: list[tuple[str, str]],
) -> Iterator[np.ndarray]:
    """Yield uint8 [batch, H, W, 3] of the images that can be read; all but the last are full."""
    size = job.image_size
    pixels = np.empty((job.batch, size, size, 3), np.uint8)
    count = 0
    for key in keys:
        try:
            pixels[count] = read_image(
                path_of(source, key), size=size, preprocess=source.preprocess
            )
        except BadImage as error:
            bad.append((key, error.reason))
            continue
        place[key] = len(place)
        count += 1
        if count == job.batch:
            yield pixels
            count = 0
    if count:
        yield pixels[:count]


def _metadata(unit: Unit, job: Job) -> dict[str, str | int]:
    return {
        "source": unit.source.name,
        "kind": unit.source.kind,
        "split": unit.split,
        "tokenizer": job.tokenizer_id,
        "encoder": f"{job.precision} {job.device}",
        "codebook_size": job.codebook_size,
        "codes_per_image": job.codes_per_image,
        "image_size": job.image_size,
        "preprocess": unit.source.preprocess,
    }
