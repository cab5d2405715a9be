"""Tars in the manner of WebDataset: files of equal path up to the first dot are one sample.

    0001.jpg  0001.depth.png  0001.cls     sample 0001: fields jpg, depth.png, cls
    0002.jpg  0002.depth.png  0002.cls     sample 0002

Nothing is extracted. The headers are walked once, 512 bytes and a seek a file, and images are read
from where they lie.
"""

import io
import os
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from tokenizer.images import SUFFIXES, BadImage
from visual_sentences.containers.headers import DamagedTar, Member, members
from visual_sentences.containers.names import CLIPS, fault, shown
from visual_sentences.containers.origin import Contents, Entry, Part
from visual_sentences.containers.paths import path_of

SAMPLE = re.compile(r"((?:.*/|)[^./][^./]*)[.]([^/]*)")
MOST_BYTES = 1 << 30  # of one image file
LONGEST_CLASS = 256  # bytes


def contents(part: Part, *, clips: bool) -> Contents:
    """List the samples' images in the order in which they are stored.

    One image a sample: with the usual field that of an image's suffix alone, jpg or png, else what
    the origin's field says, "depth.png" or "jpg;png". Kinds of frames take all of a sample's,
    numbered as in 0001.0007.jpg, and its files of video. A file `cls` has the sample's class;
    without one it is the folder inside the tar.
    """
    samples: dict[str, list[str]] = {}  # key → names of its images
    groups: dict[str, str] = {}
    seen: set[str] = set()
    spoilt: set[str] = set()  # keys of samples with something bad
    bad: list[tuple[str, str]] = []
    wanted = _Field(part.origin.field, clips=clips)
    try:
        with open(path_of(part), "rb", buffering=0) as file:
            for member in members(file):
                key, field = _split(member.name)
                if not key:
                    continue
                images = samples.setdefault(key, [])
                if field not in wanted and field != "cls":
                    continue
                twice = member.name in seen or (images and field in wanted and not clips)
                seen.add(member.name)
                reason = member.fault or fault(member.name) or ("same name twice" if twice else "")
                if reason:
                    bad.append((_named(part, shown(member.name)), reason))
                    spoilt.add(key)
                elif field == "cls":
                    groups[key] = _class_of(file, member)
                else:
                    images.append(member.name)
    except DamagedTar as error:
        bad.append((part.name, error.reason))
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        bad.append((part.name, "missing file" if missing else "unreadable tar"))
    entries = []
    for key, names in samples.items():
        group = groups.get(key, key.rpartition("/")[0])
        stem = f"{part.id}/{key}" if part.id else key
        entries += [Entry(_named(part, name), stem, group) for name in names]
        if not names and key not in spoilt:
            bad.append((_named(part, shown(key)), "missing field"))
    return Contents(entries=tuple(entries), bad=tuple(bad))


def read(part: Part, names: Sequence[str]) -> Iterator[tuple[str, bytes | BadImage]]:
    """Yield the bytes of each name's file, or BadImage where it cannot be read any more."""
    try:
        with _Open(part) as tar:
            for name in names:
                yield name, tar.file(name)
    except OSError as error:
        for name in names:
            yield name, BadImage("unreadable tar", str(error))


def window(part: Part, name: str) -> "Window":
    """Return a file object over one file in the tar, for video; raises BadImage."""
    with _Open(part) as tar:
        return Window(path_of(part), *tar.place(name))


class Window(io.RawIOBase):
    """The bytes [start, start + size) of a file, read-only, as a file of their own."""

    def __init__(self, path: Path, start: int, size: int) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        self.start, self.size, self.at = start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        self.at = max(0, base + offset)
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: "bytearray | memoryview", /) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self.size - self.at))
        data = os.pread(self.descriptor, count, self.start + self.at)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            os.close(self.descriptor)
        super().close()


class _Open:
    """An open tar and where its files lie."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def __enter__(self) -> "_Open":
        path = path_of(self.part)
        status = path.stat()
        self.places = _places(path, status.st_size, status.st_mtime_ns)
        self.descriptor = os.open(path, os.O_RDONLY)
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.descriptor)

    def place(self, name: str) -> tuple[int, int]:
        found = self.places.get(name.removeprefix(f"{self.part.name}/"))
        if found is None:
            raise BadImage("missing file", name)
        return found

    def file(self, name: str) -> bytes | BadImage:
        try:
            start, size = self.place(name)
            if size > MOST_BYTES:
                return BadImage("too large", f"{name}: {size} bytes")
            data = os.pread(self.descriptor, size, start)
        except BadImage as error:
            return error
        except OSError as error:  # of the disk; the next file may be read
            return BadImage("unreadable tar", f"{name}: {error}")
        return data if len(data) == size else BadImage("truncated", name)


@lru_cache(maxsize=8)  # a tar of 100,000 images is 20 MB of names; units of a tar come in a row
def _places(path: Path, size: int, changed: int) -> dict[str, tuple[int, int]]:
    """Return (first byte, bytes) of each file; of two of one name the first."""
    places: dict[str, tuple[int, int]] = {}
    try:
        with open(path, "rb", buffering=0) as file:
            for member in members(file):
                if not member.fault:
                    places.setdefault(member.name, (member.start, member.size))
    except DamagedTar:
        return places  # what stands before the damage, as `contents` has it
    return places


class _Field:
    """Tell which fields of a sample are images that were asked for."""

    def __init__(self, written: str, *, clips: bool) -> None:
        if written:
            self.exact = frozenset(field.lower().strip(". ") for field in written.split(";"))
        else:
            suffixes = SUFFIXES | CLIPS.keys() if clips else SUFFIXES
            self.exact = frozenset(suffix[1:] for suffix in suffixes)
        self.numbered = clips

    def __contains__(self, field: str) -> bool:
        if self.numbered:
            number, _, rest = field.partition(".")
            if number.isdecimal() and rest in self.exact:
                return True
        return field in self.exact


def _split(name: str) -> tuple[str, str]:
    """Return the key and the field in lower case; no field where WebDataset has none."""
    match = SAMPLE.fullmatch(name)
    return (match[1], match[2].lower()) if match else ("", "")


def _class_of(file: io.FileIO, member: Member) -> str:
    data = os.pread(file.fileno(), min(member.size, LONGEST_CLASS), member.start)
    return shown(data.decode("utf-8", "surrogateescape").strip())


def _named(part: Part, name: str) -> str:
    return f"{part.name}/{name}"
