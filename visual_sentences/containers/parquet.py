"""Parquet files with image files in a column, as Hugging Face writes them.

A column of images is struct<bytes: binary, path: string> or binary; one called `label` or `class`
has the classes, numbers or texts. Rows have no names, so that entry 12 of data.parquet is called
data.parquet/000012.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tokenizer.images import BadImage
from visual_sentences.containers.origin import Contents, Entry, Part
from visual_sentences.containers.paths import path_of

LABELS = ("label", "class")
ROWS = 16  # handed out at once; what is decompressed at once is a page
BUFFER = 1 << 20  # bytes of a column read at once; without it a whole row group is


def contents(part: Part, *, clips: bool) -> Contents:
    """List the rows, reading the labels alone; a file without an image column is one bad name."""
    try:
        with _open(path_of(part)) as file:
            if not _column(file.schema_arrow, part.origin.field):
                reason = "no such column" if part.origin.field else "no image column"
                return Contents(entries=(), bad=((part.name, reason),))
            groups = _groups(file)
            entries = tuple(
                Entry(f"{part.name}/{row:06d}", _stem(part, row), groups[row] if groups else "")
                for row in range(file.metadata.num_rows)
            )
    except FileNotFoundError:
        return Contents(entries=(), bad=((part.name, "missing file"),))
    except (OSError, pa.ArrowException):
        return Contents(entries=(), bad=((part.name, "unreadable Parquet file"),))
    return Contents(entries=entries, bad=())


def read(part: Part, names: Sequence[str]) -> Iterator[tuple[str, bytes | BadImage]]:
    """Yield the bytes of each row; in storage order each row group is decompressed once.

    The rows of a damaged row group are BadImage from the damage on.
    """
    try:
        with _open(path_of(part)) as file:
            rows = _Rows(file, _column(file.schema_arrow, part.origin.field))
            for name in names:
                yield name, rows.image(name)
    except (OSError, pa.ArrowException) as error:
        for name in names:
            yield name, BadImage("unreadable Parquet file", str(error))


class _Rows:
    """The images of a file by row, streamed: some rows of one row group are in memory."""

    def __init__(self, file: pq.ParquetFile, column: str) -> None:
        self.file, self.column = file, column
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        self.edges = [0, *accumulate(sizes)]
        self.group, self.first, self.values = -1, 0, pa.array([], pa.binary())
        self.batches: Iterator[pa.RecordBatch] = iter(())

    def image(self, name: str) -> bytes | BadImage:
        row = int(name.rpartition("/")[2])
        if not 0 <= row < self.edges[-1]:
            return BadImage("missing file", name)
        try:
            group = bisect_right(self.edges, row) - 1
            if group != self.group or row < self.first:
                self._enter(group)
            while row >= self.first + len(self.values):
                self.first += len(self.values)
                self.values = _binary(next(self.batches).column(0))
        except (OSError, pa.ArrowException, StopIteration) as error:
            self.batches, self.values = iter(()), self.values[:0]
            return BadImage("unreadable Parquet file", f"{name}: {error}")
        size = pc.binary_length(self.values[row - self.first]).as_py()
        if not size:
            return BadImage("empty file", name)
        return bytes(self.values[row - self.first].as_buffer())

    def _enter(self, group: int) -> None:
        self.group, self.first, self.values = group, self.edges[group], self.values[:0]
        self.batches = self.file.iter_batches(
            ROWS, row_groups=[group], columns=[self.column], use_threads=False
        )


def _open(path: Path) -> pq.ParquetFile:
    return pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False)


def _column(schema: pa.Schema, field: str) -> str:
    """Return the column of image files, as Parquet names it, or "" if there is none."""
    images = {f.name: _leaf(f) for f in schema if _leaf(f)}
    name = field or ("image" if len(images) > 1 else next(iter(images), ""))
    return images.get(name, "")


def _leaf(field: pa.Field) -> str:
    if _is_binary(field.type):
        return field.name
    if pa.types.is_struct(field.type):
        place = field.type.get_field_index("bytes")
        if place >= 0 and _is_binary(field.type.field(place).type):
            return f"{field.name}.bytes"
    return ""


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _binary(column: pa.Array) -> pa.Array:
    """Return the bytes of a column of bytes, or of a struct with bytes; null where either is."""
    return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


def _groups(file: pq.ParquetFile) -> list[str]:
    """Return the class of each row, by its name where the Hugging Face schema has names."""
    schema = file.schema_arrow
    name = next((label for label in LABELS if label in schema.names), "")
    kind = schema.field(name).type if name else pa.null()
    if not (
        pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
    ):
        return []
    named = _class_names(schema, name)
    return [
        "" if value is None else named.get(value, str(value))
        for batch in file.iter_batches(1 << 14, columns=[name], use_threads=False)
        for value in batch.column(0).to_pylist()
    ]


def _class_names(schema: pa.Schema, label: str) -> dict[object, str]:
    try:
        facts = json.loads((schema.metadata or {})[b"huggingface"])
        return dict(enumerate(facts["info"]["features"][label]["names"]))
    except (KeyError, TypeError, ValueError):
        return {}


def _stem(part: Part, row: int) -> str:
    return f"{part.id}/{row:06d}" if part.id else f"{row:06d}"
