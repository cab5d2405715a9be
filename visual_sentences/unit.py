"""A work unit of a build: some items of one source and split become one shard.

Pure: the shard's bytes depend on the unit and the job alone. Which process runs it, when, beside
how many others, and after which crash make no difference.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tokenizer.cli import CommandError
from tokenizer.files import atomic_write
from tokenizer.images import BadImage, read_image
from visual_sentences.layouts import LAYOUTS, draw_frames
from visual_sentences.sentence import Sample, fill_rows, row_indices
from visual_sentences.shards import code_type, write_shard
from visual_sentences.sources import path_of
from visual_sentences.spec import Source

if TYPE_CHECKING:
    from tokenizer.protocol import Tokenizer

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


def run_unit(unit: Unit, *, job: Job, tok: "Tokenizer") -> Result:
    """Read, encode, lay out and write one unit; first its shard, then its JSON, each by rename."""
    samples = _samples(unit, job)
    keys = list(dict.fromkeys(key for sample in samples for key in sample.keys))
    codes, place, bad = _encode(unit.source, keys, job=job, tok=tok)
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
    source: Source, keys: Sequence[str], *, job: Job, tok: "Tokenizer"
) -> tuple[np.ndarray, dict[str, int], list[tuple[str, str]]]:
    """Return codes [good, codes_per_image], the place of each good key in them, and the bad ones.

    The codes of a batch are fetched only after the next one was started: on a GPU, reading images
    and encoding then run beside each other.
    """
    place: dict[str, int] = {}
    bad: list[tuple[str, str]] = []
    parts: list[np.ndarray] = []
    running: torch.Tensor | None = None
    for pixels in _batches(source, keys, job=job, place=place, bad=bad):
        images = torch.from_numpy(pixels).to(job.device).permute(0, 3, 1, 2).float().div(255)
        started = tok.encode(images)
        if running is not None:
            parts.append(_fetch(running, job))
        running = started
    if running is not None:
        parts.append(_fetch(running, job))
    empty = np.zeros((0, job.codes_per_image), code_type(job.codebook_size))
    return np.concatenate([empty, *parts]), place, bad


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


def _fetch(codes: torch.Tensor, job: Job) -> np.ndarray:
    values = codes.cpu().numpy()
    if values.shape[1:] != (job.codes_per_image,) or values.max() >= job.codebook_size:
        raise CommandError(
            f"the tokenizer in {job.tokenizer} made codes of shape {values.shape[1:]} up to "
            f"{values.max()}, but it says {job.codes_per_image} codes below {job.codebook_size}"
        )
    return values.astype(code_type(job.codebook_size))


def _metadata(unit: Unit, job: Job) -> dict[str, str | int]:
    return {
        "source": unit.source.name,
        "kind": unit.source.kind,
        "split": unit.split,
        "tokenizer": job.tokenizer_id,
        "encoder": f"float32 {job.device}",
        "codebook_size": job.codebook_size,
        "codes_per_image": job.codes_per_image,
        "image_size": job.image_size,
        "preprocess": unit.source.preprocess,
    }
