"""Arrow files of one record batch: written in one piece, read in place by memory map.

What the shards of codes and of images have in common. Uncompressed IPC files; the schema's metadata
says format and version, and what the columns hold.
"""

import hashlib
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from tokenizer.cli import CommandError
from tokenizer.files import atomic_write


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """Facts of a finished shard for the manifest; `offset` is where its tokens start, in bytes."""

    rows: int
    bytes: int
    sha256: str
    offset: int


def encode(columns: Mapping[str, pa.Array], notes: Mapping[str, str | int]) -> pa.Buffer:
    """Return the bytes of a file; equal arguments give equal bytes."""
    schema = pa.schema(
        [pa.field(name, column.type, nullable=False) for name, column in columns.items()],
        metadata={name: str(value) for name, value in notes.items()},
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(list(columns.values()), schema=schema))
    return sink.getvalue()


def store(path: Path | str, content: pa.Buffer, *, rows: int, offset: int) -> Written:
    """Write `content` to `path`, whole or not at all."""
    with atomic_write(path) as file:
        file.write(content)
    return Written(
        rows=rows, bytes=content.size, sha256=hashlib.sha256(content).hexdigest(), offset=offset
    )


def open_batch(
    path: Path | str, *, format: str, version: int, random: bool = False
) -> tuple[pa.RecordBatch, dict[str, str]]:
    """Map a file of `format`; returns its batch and its metadata.

    `random` tells the kernel not to read ahead. Raises CommandError where the file is missing,
    damaged, or of another format or version.
    """
    try:
        with open(path, "rb") as file:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if random and hasattr(mmap, "MADV_RANDOM"):
            view.madvise(mmap.MADV_RANDOM)
        reader = pa.ipc.open_file(pa.py_buffer(view))
        notes = {k.decode(): v.decode() for k, v in (reader.schema.metadata or {}).items()}
        if notes.get("format") != format:
            seen = notes.get("format", "no format of ours")
            raise CommandError(f"{path} is an Arrow file of {seen}; wanted {format}")
        if notes["version"] != str(version):
            raise CommandError(
                f"{path} has shard version {notes['version']}; this program reads version {version}"
            )
        return reader.get_batch(0), notes
    except FileNotFoundError as error:
        raise CommandError(
            f"the shard {path} is missing; run its build again, which makes what is not there"
        ) from error
    except (pa.ArrowInvalid, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise CommandError(
            f"the shard {path} is damaged ({error}); delete it and run its build again"
        ) from error
