"""A sweep: one run for each combination of values, as an array of jobs of one script.

    SWEEP/tasks.tsv      line n is task n: the name of its run folder, a tab, its options
    SWEEP/lr=0.001,…/    a run folder each

An array and not submitit: its tasks are the committed scripts, so that each is checked, saved,
requeued and resumed like any other run, where submitit would call its checkpoint on rank 0 alone.
"""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from tokenizer.cli import InputError
from tokenizer.files import atomic_write

TASKS = "tasks.tsv"


def combinations(vary: Sequence[str]) -> list[dict[str, str]]:
    """Return every combination of `option=value,value,…` texts, the last option fastest."""
    grid: dict[str, list[str]] = {}
    for text in vary:
        name, equals, values = text.removeprefix("--").partition("=")
        listed = values.split(",")
        if not re.fullmatch(r"[\w.-]+", name) or not equals or not all(listed):
            raise InputError(f"--vary {text}: wanted option=value,value,… as in optim.lr=1e-4,3e-4")
        if wrong := [value for value in listed if not re.fullmatch(r"[\w.+-]+", value)]:
            raise InputError(f"--vary {text}: {wrong[0]!r} cannot be part of a folder's name")
        if name in grid or len(set(listed)) < len(listed):
            raise InputError(f"--vary {text}: an option or a value of it is there twice")
        grid[name] = listed
    if not grid:
        raise InputError("--vary is missing; give option=value,value,… as in optim.lr=1e-4,3e-4")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def name_of(values: dict[str, str]) -> str:
    """Return the run folder's name, as `optim.lr=1e-4,seed=1`."""
    return ",".join(f"{name}={value}" for name, value in values.items())


def options_of(values: dict[str, str]) -> list[str]:
    """Return the trainer's options of a combination."""
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def write_tasks(folder: Path, tasks: Sequence[dict[str, str]]) -> None:
    """Write tasks.tsv; raises InputError where the folder has another, which jobs may read."""
    text = "".join(f"{name_of(values)}\t{' '.join(options_of(values))}\n" for values in tasks)
    path = folder / TASKS
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise InputError(
            f"{path} lists other runs; give the same --vary to go on with those, or another "
            "--run-dir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as file:
        file.write(text)
