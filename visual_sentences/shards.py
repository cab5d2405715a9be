"""Arrow shards: rows of codes that are read in place, by memory map.

One IPC file, one record batch, no compression (it saves at most a tenth and makes random reads 24
to 100 times slower). Columns:

    tokens  fixed_size_list<uint16>[row_len]   codes, 0 after `length`; uint32 above 65,536 codes
    docs    list<int32>                        where the row's documents start
    length  int32                              valid codes
    keys    list<string>                       one an image, in order

The schema's metadata says what the codes are: format and version, source, kind, split, tokenizer,
encoder (precision and device), geometry, preprocessing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from visual_sentences.arrow import Written, encode, open_batch, store

FORMAT, VERSION = "visual-sentences-shard", 1
WIDE = 65_536  # codebooks above this need uint32


def code_type(codes: int) -> np.dtype[Any]:
    """Return the smallest type of the format that holds codes 0 … codes-1."""
    return np.dtype(np.uint16 if codes <= WIDE else np.uint32)


def write_shard(
    path: Path | str,
    *,
    tokens: np.ndarray,
    docs: Sequence[Sequence[int]],
    length: np.ndarray,
    keys: Sequence[Sequence[str]],
    metadata: Mapping[str, str | int],
) -> Written:
    """Write rows [rows, row_len] as one shard; equal arguments give equal bytes."""
    rows, row_len = tokens.shape
    columns = {
        "tokens": pa.FixedSizeListArray.from_arrays(pa.array(tokens.reshape(-1)), row_len),
        "docs": pa.array(docs, pa.list_(pa.int32())),
        "length": pa.array(length, pa.int32()),
        "keys": pa.array(keys, pa.list_(pa.string())),
    }
    content = encode(columns, {"format": FORMAT, "version": VERSION, **metadata})
    stored = pa.ipc.open_file(content).get_batch(0).column("tokens").flatten()
    offset = stored.buffers()[1].address - content.address
    return store(path, content, rows=rows, offset=offset)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """An open shard. Arrays are views of the mapped file: nothing is read before it is used.

    Row i has tokens[i], length[i] valid codes and documents at docs[edges[i] : edges[i + 1]].
    """

    tokens: np.ndarray  # [rows, row_len] uint16 or uint32
    length: np.ndarray  # [rows] int32
    docs: np.ndarray  # int32, all rows behind one another
    edges: np.ndarray  # [rows + 1] int32
    names: pa.ListArray
    metadata: Mapping[str, str]

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    def starts(self, row: int) -> np.ndarray:
        return self.docs[self.edges[row] : self.edges[row + 1]]

    def keys(self, row: int) -> list[str]:
        return self.names[row].as_py()


def open_shard(path: Path | str, *, random: bool = False) -> Shard:
    """Map a shard; raises CommandError where the file is missing, damaged or of another version.

    `random` tells the kernel not to read ahead, which makes cold random rows about 5 times faster.
    """
    batch, notes = open_batch(path, format=FORMAT, version=VERSION, random=random)
    docs = batch.column("docs")
    row_len = batch.schema.field("tokens").type.list_size
    return Shard(
        tokens=batch.column("tokens").flatten().to_numpy(zero_copy_only=True).reshape(-1, row_len),
        length=batch.column("length").to_numpy(zero_copy_only=True),
        docs=docs.values.to_numpy(zero_copy_only=True),
        edges=docs.offsets.to_numpy(zero_copy_only=True),
        names=batch.column("keys"),
        metadata=notes,
    )
