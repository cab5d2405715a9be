"""The file of many prompts and that of their results: lines in, records out.

A line is {"input": [paths], "output": path}, and where it is known {"target": path or paths}, as
LVM's scripts take them. The results have a line for each, in the same order: what it was answered
with, or why it could not be. While processes are at work each has a part of the results of its own.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvm.prompting.answers import IMAGE_FORMATS
from tokenizer.cli import InputError
from tokenizer.files import atomic_write

RESULTS = "results.jsonl"
PARTS = "results-*.part.jsonl"  # of each process; joined at the end, or at the next start


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line of the file, its paths resolved."""

    number: int  # from 1
    input: tuple[Path, ...]
    target: tuple[Path, ...]
    output: Path
    name: str  # the output as the file has it
    key: str  # of all that decides the answer; a finished line with another is done again


class BadLine(Exception):
    """A line that cannot be answered. `reason` is a short fixed phrase, to be counted by."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def read_lines(
    file: Path, *, root: Path, out: Path, anywhere: bool, room: int, settings: str
) -> tuple[list[Line], list[dict[str, Any]]]:
    """Return the lines of a JSONL file, and a record of each that is wrong in itself.

    `room` is how many images a row of the model has. Blank lines are passed over. Raises InputError
    where the file cannot be read or has no line.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--batch {file} cannot be read: {error}") from error
    lines: list[Line] = []
    bad: list[dict[str, Any]] = []
    outputs: dict[str, int] = {}
    for number, row in enumerate(text.split("\n"), 1):
        if not row.strip():
            continue
        try:
            line = _line(row, number, root=root, out=out, anywhere=anywhere, settings=settings)
            _check_lengths(line, room)
            before = outputs.setdefault(os.path.realpath(line.output), number)
            if before != number:
                raise BadLine("output given twice", f"{line.name}, first in line {before}")
            lines.append(line)
        except BadLine as error:
            bad.append(failure(number, error))
    if not lines and not bad:
        raise InputError(f"--batch {file} has no line; wanted one JSON object a line")
    return lines, bad


def _line(row: str, number: int, *, root: Path, out: Path, anywhere: bool, settings: str) -> Line:
    try:
        found = json.loads(row)
    except (ValueError, RecursionError) as error:
        raise BadLine("not JSON", str(error)) from error
    if not isinstance(found, dict):
        raise BadLine("no object", f"a {type(found).__name__}")
    target = found.get("target") or []
    target = [target] if isinstance(target, str) else target
    for key, names in (("input", found.get("input")), ("target", target)):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise BadLine(f"no {key}", f"{key} is {json.dumps(names)[:60]}; wanted paths")
    name = found.get("output")
    if not found["input"]:
        raise BadLine("no input", "input is []; wanted at least one path")
    if not isinstance(name, str) or not name:
        raise BadLine("no output", f"output is {json.dumps(name)[:60]}; wanted a path")
    if Path(name).suffix.lower() not in IMAGE_FORMATS:
        raise BadLine("output is no image", f"{name}; wanted {', '.join(IMAGE_FORMATS)}")
    paths = [
        tuple(resolve(root, path, anywhere=anywhere) for path in names)
        for names in (found["input"], target)
    ]
    output = resolve(out, name, anywhere=anywhere)
    what = json.dumps([[list(map(os.path.abspath, part)) for part in paths], name, settings])
    return Line(
        number=number,
        input=paths[0],
        target=paths[1],
        output=output,
        name=name,
        key=hashlib.sha256(what.encode()).hexdigest()[:16],
    )


def resolve(folder: Path, name: str, *, anywhere: bool) -> Path:
    """Return a path of a line below `folder`; raises BadLine where it leads elsewhere.

    Links are followed before that is judged: what is read or written is below the folder.
    """
    if "\0" in name:
        raise BadLine("path cannot be", json.dumps(name))
    path = folder / name
    if anywhere:
        return path
    if Path(name).is_absolute():
        raise BadLine("absolute path", f"{name}; --anywhere allows it")
    top = os.path.realpath(folder)
    if os.path.commonpath([os.path.realpath(path), top]) != top:
        raise BadLine("path leaves the folder", f"{name}; --anywhere allows it")
    return path


def _check_lengths(line: Line, room: int) -> None:
    images = len(line.input) + max(1, len(line.target))
    if images > room:
        after = "an answer" if len(line.target) < 2 else f"{len(line.target)} targets"
        raise BadLine(
            "prompt too long", f"{len(line.input)} images and {after}; a row has {room} images"
        )


def failure(number: int, error: BadLine) -> dict[str, Any]:
    """Return the record of a line that was not answered."""
    return {"line": number, "error": error.reason, "detail": error.detail}


def finished(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the records of earlier runs by line; the torn last line of a killed one is none."""
    found: dict[int, dict[str, Any]] = {}
    for file in [folder / RESULTS, *sorted(folder.glob(PARTS))]:
        if not file.is_file():
            continue
        for row in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                record = json.loads(row)
                found[record["line"]] = record
            except (ValueError, TypeError, KeyError):
                continue
    return found


def seal(folder: Path, records: Mapping[int, dict[str, Any]]) -> None:
    """Write the results in the order of the lines, and remove the parts that they are made of."""
    with atomic_write(folder / RESULTS, "w") as file:
        for number in sorted(records):
            file.write(json.dumps(records[number]) + "\n")
    for part in folder.glob(PARTS):
        part.unlink(missing_ok=True)
