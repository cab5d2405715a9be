"""The headers of a tar, one after another, in bounded memory and with every damage seen.

Python's `tarfile` keeps all it has passed, takes a damaged header in the middle for the end of the
file, loads extended headers of any size, and is slower. Formats: POSIX ustar and pax, GNU and v7.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass

BLOCK = 512
LARGEST_EXTENSION = 1 << 20  # bytes of a pax header or a long name
EXTENSIONS = b"xXgLK"  # type flags of what tells more about the next file, g: about all
NO_DATA = b"123456"  # of links, devices, folders and pipes, whatever size they claim
FAULTS = {b"\0": "", b"0": "", b"7": "", b"1": "link", b"2": "link", b"S": "sparse file"}
READ_AHEAD = 1 << 15  # bytes; small files stand close together


class DamagedTar(Exception):
    """The headers cannot be followed any further. `reason` is a short fixed phrase."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Member:
    """A name in a tar; its bytes are [start, start + size). `fault`: why it must not be read."""

    name: str  # surrogates where it is not UTF-8
    start: int
    size: int
    fault: str = ""


def members(file: io.FileIO) -> Iterator[Member]:
    """Yield all names but folders', without "./"; raises DamagedTar where the rest is not found."""
    source = _Ahead(file)
    end = file.seek(0, io.SEEK_END)
    at, name, size, sparse = 0, "", -1, False  # the latter three as told before the header
    while True:
        header = source.read(at, BLOCK)
        if len(header) < BLOCK:
            raise DamagedTar("truncated tar" if end else "empty file")
        if not header.strip(b"\0"):
            return
        kind = _checked_kind(header)
        start = at + BLOCK
        more = kind == b"S" and header[482] != 0  # the map of a sparse file goes on
        while more:
            more = source.read(start, BLOCK)[504:505] not in (b"\0", b"")
            start += BLOCK
        length = 0 if kind in NO_DATA else _number(header[124:136])
        if size >= 0 and kind not in EXTENSIONS + NO_DATA:
            length = size
        at = start + -(-length // BLOCK) * BLOCK
        if start + length > end:
            raise DamagedTar("truncated tar")
        if kind in EXTENSIONS:
            if length > LARGEST_EXTENSION:
                raise DamagedTar("unreadable tar")
            data = source.read(start, length)
            if kind in b"xX":
                facts = _pax(data)
                name = facts.get("path", name)
                size = int(facts["size"]) if facts.get("size", "").isdecimal() else size
                sparse = any(key.startswith("GNU.sparse") for key in facts)
            elif kind == b"L":
                name = _text(data)
            continue
        if kind != b"5":
            fault = "sparse file" if sparse else FAULTS.get(kind, "not a file")
            yield Member((name or _name(header)).removeprefix("./"), start, length, fault)
        name, size, sparse = "", -1, False


class _Ahead:
    """Reads at places that mostly move forward by little."""

    def __init__(self, file: io.FileIO) -> None:
        self.file, self.at, self.data = file, 0, b""

    def read(self, at: int, count: int) -> bytes:
        if not self.at <= at <= at + count <= self.at + len(self.data):
            self.file.seek(at)
            self.at, self.data = at, self.file.read(max(count, READ_AHEAD)) or b""
        return self.data[at - self.at : at - self.at + count]


def _checked_kind(header: bytes) -> bytes:
    """Return the type flag of a header whose sum is right; old writers summed signed bytes."""
    wanted = _number(header[148:156])
    blank = header[:148] + b" " * 8 + header[156:]
    unsigned = sum(blank)
    if wanted != unsigned and wanted != unsigned - 256 * sum(byte > 127 for byte in blank):
        raise DamagedTar("unreadable tar")
    return header[156:157]


def _number(field: bytes) -> int:
    """Read an octal field, or GNU's base 256 for large files."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.replace(b"\0", b" ").strip()
    try:
        value = int(text or b"0", 8)
    except ValueError:
        raise DamagedTar("unreadable tar") from None
    if value < 0:
        raise DamagedTar("unreadable tar")
    return value


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _pax(data: bytes) -> dict[str, str]:
    """Read records "LENGTH KEY=VALUE\\n"."""
    facts, at = {}, 0
    while at < len(data) and data[at] != 0:
        length, space, _ = data[at : at + 20].partition(b" ")
        if not space or not length.isdigit() or not at + int(length) <= len(data):
            raise DamagedTar("unreadable tar")
        key, _, value = data[at + len(length) + 1 : at + int(length) - 1].partition(b"=")
        facts[_text(key)] = _text(value)
        at += int(length)
    return facts


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
