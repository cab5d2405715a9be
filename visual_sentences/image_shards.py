"""Arrow shards of encoded images: what models read that have no tokenizer, such as AIM.

One IPC file like a shard of codes (`arrow`), one row a sentence. Columns:

    jpeg   list<large_binary>   the images of a sentence, each a whole JPEG file
    label  int32                its class by the manifest's list; -1 where it has none
    keys   list<string>         one an image, in order

The schema's metadata says format and version, source, kind, split, image size and preprocessing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from visual_sentences.arrow import Written, encode, open_batch, store

FORMAT, VERSION = "visual-sentences-images", 1
NO_LABEL = -1


def write_images(
    path: Path | str,
    *,
    jpegs: Sequence[Sequence[bytes]],
    labels: Sequence[int] | np.ndarray,
    keys: Sequence[Sequence[str]],
    metadata: Mapping[str, str | int],
) -> Written:
    """Write sentences as one shard; equal arguments give equal bytes. Its `offset` is 0."""
    assert len(jpegs) == len(labels) == len(keys), "one label and one list of keys a sentence"
    assert all(len(row) == len(names) for row, names in zip(jpegs, keys, strict=True)), (
        "one key an image"
    )
    columns = {
        "jpeg": pa.array(jpegs, pa.list_(pa.large_binary())),
        "label": pa.array(labels, pa.int32()),
        "keys": pa.array(keys, pa.list_(pa.string())),
    }
    content = encode(columns, {"format": FORMAT, "version": VERSION, **metadata})
    return store(path, content, rows=len(jpegs), offset=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageShard:
    """An open shard. Nothing of the mapped file is read before it is used."""

    labels: np.ndarray  # [rows] int32, -1 where there is none
    images: pa.ListArray
    names: pa.ListArray
    metadata: Mapping[str, str]

    @property
    def rows(self) -> int:
        return len(self.labels)

    def jpegs(self, row: int) -> list[bytes]:
        return self.images[row].as_py()

    def keys(self, row: int) -> list[str]:
        return self.names[row].as_py()


def open_images(path: Path | str, *, random: bool = False) -> ImageShard:
    """Map a shard; raises CommandError where the file is missing, damaged or of another version.

    `random` tells the kernel not to read ahead, for rows in shuffled order from a cold disk.
    """
    batch, notes = open_batch(path, format=FORMAT, version=VERSION, random=random)
    return ImageShard(
        labels=batch.column("label").to_numpy(zero_copy_only=True),
        images=batch.column("jpeg"),
        names=batch.column("keys"),
        metadata=notes,
    )
