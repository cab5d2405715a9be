"""The samples of a unit to a shard: of codes, laid out and packed into rows, or of JPEG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from visual_sentences.arrow import Written
from visual_sentences.image_shards import NO_LABEL, write_images
from visual_sentences.job import Job
from visual_sentences.layouts import LAYOUTS
from visual_sentences.manifest import ShardEntry
from visual_sentences.plan import Unit
from visual_sentences.sentence import Picture, Sample, fill_rows, row_indices
from visual_sentences.shards import write_shard


def write_codes(
    unit: Unit,
    split: str,
    samples: Sequence[Sample],
    codes: np.ndarray,
    *,
    place: Mapping[Picture, int],
    job: Job,
) -> ShardEntry:
    """Lay out the samples of a split as rows of codes; `place` is where a picture's codes are."""
    sentences = LAYOUTS[unit.source.kind](
        samples, images_per_row=job.images_per_row, source=unit.source, seed=job.seed
    )
    rows = fill_rows(sentences, images_per_row=job.images_per_row)
    table = row_indices(rows, place, images_per_row=job.images_per_row)
    tokens = codes[table] * (table >= 0).astype(codes.dtype)[:, :, None]
    sizes = [[len(s.pictures) * job.codes_per_image for s in row] for row in rows]
    written = write_shard(
        Path(job.out) / _shard_name(unit, split),
        tokens=tokens.reshape(len(rows), -1),
        docs=[np.cumsum([0, *row[:-1]]).tolist() for row in sizes],
        length=np.array([sum(row) for row in sizes], np.int32),
        keys=[[p.key for sentence in row for p in sentence.pictures] for row in rows],
        metadata=_metadata(unit, split, job)
        | {
            "tokenizer": job.tokenizer_id,
            "encoder": f"{job.precision} {job.device}",
            "codebook_size": job.codebook_size,
            "codes_per_image": job.codes_per_image,
        },
    )
    return _entry(unit, split, written, documents=len(sentences), images=int((table >= 0).sum()))


def write_jpegs(
    unit: Unit,
    split: str,
    samples: Sequence[Sample],
    files: Sequence[bytes],
    *,
    place: Mapping[Picture, int],
    job: Job,
) -> ShardEntry:
    """Write one row a sample."""
    classes = job.classes.get(unit.source.name, ())
    label = {name: number for number, name in enumerate(classes)}
    written = write_images(
        Path(job.out) / _shard_name(unit, split),
        jpegs=[[files[place[p]] for p in sample.pictures] for sample in samples],
        labels=[_label(sample.group, label) for sample in samples],
        keys=[[p.key for p in sample.pictures] for sample in samples],
        metadata=_metadata(unit, split, job),
    )
    images = sum(len(sample.pictures) for sample in samples)
    return _entry(unit, split, written, documents=written.rows, images=images)


def _label(group: str, classes: Mapping[str, int]) -> int:
    if classes:
        return classes.get(group, NO_LABEL)
    return int(group) if group.isdecimal() else NO_LABEL


def _shard_name(unit: Unit, split: str) -> str:
    return f"{unit.source.name}-{split}-{unit.number:05d}.arrow"


def _entry(unit: Unit, split: str, written: Written, *, documents: int, images: int) -> ShardEntry:
    return ShardEntry(
        name=_shard_name(unit, split),
        source=unit.source.name,
        split=split,
        rows=written.rows,
        documents=documents,
        images=images,
        bytes=written.bytes,
        sha256=written.sha256,
        offset=written.offset,
    )


def _metadata(unit: Unit, split: str, job: Job) -> dict[str, str | int]:
    return {
        "source": unit.source.name,
        "kind": unit.source.kind,
        "split": split,
        "image_size": job.image_size,
        "preprocess": unit.source.preprocess,
    }
