"""Sentences of codes as other projects store them: one JSON object a line, without any padding.

    LVM     NAME.jsonl       {"tokens": "base64 of little-endian int32"}
    DeLVM   train.bin        {"tokens": [5, 17, …]}
            train.bin.meta   NumPy's .npy, int64 [lines, 2]: offset in bytes, codes of the line

LVM's lines are whole sentences, usually of 16 images; DeLVM's are pairs, or several pairs behind
one another. Neither names the images or the tokenizer. DeLVM's trainer (InternLM's) walks over a
folder and takes every .bin in it whose path has a part "vision";
lines of fewer than 50 codes it passes over.
"""

import base64
import binascii
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from tokenizer.files import atomic_write

LONGEST = 64 << 20  # bytes of a line: 16 million codes of LVM; more is no sentence
META = ".meta"


class BadLine(Exception):
    """A line that is no sentence. `reason` is a short fixed phrase, to be counted by."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Line:
    """A line by its number, from 1: its length in bytes, and its codes, int64 [codes]."""

    number: int
    bytes: int
    codes: np.ndarray | BadLine


def read_jsonl(path: Path) -> Iterator[Line]:
    """Read LVM's format line by line; empty lines are passed over, as LVM's reader does."""
    with open(path, "rb") as file:
        for number, line in enumerate(_lines(file), 1):
            if line.strip():
                yield Line(number, len(line), _caught(_base64_codes, line))


def read_delvm(path: Path) -> Iterator[Line]:
    """Read DeLVM's format: the lines that the .meta names, or all where there is none to read.

    A .meta that cannot be read is line 0 and bad: DeLVM itself would not read such a file.
    """
    try:
        meta = np.load(f"{path}{META}", mmap_mode="r", allow_pickle=False)
        if meta.ndim != 2 or meta.shape[1] != 2 or meta.dtype.kind not in "iu":
            raise ValueError("no pairs of integers")
    except (OSError, ValueError, EOFError) as error:
        missing = isinstance(error, FileNotFoundError)
        yield Line(0, 0, BadLine("missing .meta" if missing else "unreadable .meta"))
        meta = None
    with open(path, "rb") as file:
        if meta is None:
            for number, line in enumerate(_lines(file), 1):
                yield Line(number, len(line), _caught(_listed_codes, line))
            return
        for number, (offset, count) in enumerate(meta, 1):
            file.seek(max(0, int(offset)))
            line = file.readline(LONGEST)
            codes = _caught(_listed_codes, line)
            if offset < 0 or (isinstance(codes, np.ndarray) and len(codes) != count):
                codes = BadLine("not as .meta says")
            yield Line(number, len(line), codes)


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """Yield lines; one that is longer than any sentence comes in pieces, each of them bad."""
    return iter(lambda: file.readline(LONGEST), b"")


def _caught(parse: Callable[[Any], np.ndarray], line: bytes) -> np.ndarray | BadLine:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return BadLine("not JSON")
    if not isinstance(value, dict) or "tokens" not in value:
        return BadLine("no tokens")
    try:
        return parse(value["tokens"])
    except BadLine as bad:
        return bad


def _base64_codes(tokens: Any) -> np.ndarray:
    try:
        content = base64.b64decode(tokens, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise BadLine("not base64") from error
    if len(content) % 4:
        raise BadLine("not int32")
    return np.frombuffer(content, "<i4").astype(np.int64)


def _listed_codes(tokens: Any) -> np.ndarray:
    if not isinstance(tokens, list):
        raise BadLine("not a list of integers")
    try:
        codes = np.array(tokens)
    except ValueError as error:  # lists of unequal lengths
        raise BadLine("not a list of integers") from error
    if codes.ndim != 1 or (codes.size and codes.dtype.kind != "i"):
        raise BadLine("not a list of integers")
    return codes.astype(np.int64)


class JsonlWriter:
    """Writes LVM's format; the file is whole or absent. A context manager."""

    def __init__(self, path: Path) -> None:
        self.path, self._stack = path, ExitStack()

    def __enter__(self) -> Self:
        self._file = self._stack.enter_context(atomic_write(self.path))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def write(self, codes: np.ndarray) -> None:
        """Append one sentence, integer [codes]."""
        text = base64.b64encode(codes.astype("<i4").tobytes()).decode()
        self._file.write(json.dumps({"tokens": text}).encode() + b"\n")


class DelvmWriter:
    """Writes DeLVM's format: a .bin and its .meta, the .meta last. A context manager.

    Memory is 16 bytes a sentence, since the head of the .meta says how many there are.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._stack = path, ExitStack()
        self._places: list[tuple[int, int]] = []
        self._end = 0

    def __enter__(self) -> Self:
        self._file = self._stack.enter_context(atomic_write(self.path))
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        self._stack.__exit__(kind, *error)
        if kind is None:
            with atomic_write(f"{self.path}{META}") as file:
                np.save(file, np.array(self._places, np.int64).reshape(-1, 2))

    def write(self, codes: np.ndarray) -> None:
        """Append one sentence, integer [codes]."""
        line = json.dumps({"tokens": codes.tolist()}).encode() + b"\n"
        self._file.write(line)
        self._places.append((self._end, len(codes)))
        self._end += len(line)
