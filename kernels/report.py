"""Compile every shipped kernel for a GPU that need not be here: python -m kernels.report.

Prints one line a program and target with what ptxas made of it and exits 1 if one breaks a limit:

    registers spill to the stack (STACK, LDL, STL), beyond the allowance that the program has
    more shared memory than a block has, more registers than a multiprocessor has
    tensor cores that were promised are not used, or not by the instruction that feeds them at full
    speed: HGMMA on sm_90, UTCHMMA on sm_100, HMMA before them
    tensor cores where IEEE fp32 products were promised
    bulk copies (UTMALDG) that were promised are not there
    it does not compile

`--check` also fails where a figure differs from the committed one of this version of triton, in
kernels/compiled/<version>.json: the same source gives other registers, and spills elsewhere, in
another. `--write` commits what is seen to that file; `make gate-write` does so for both versions.

Needs triton and no GPU. Says nothing of speed, races or results.
"""

import argparse
import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import sys
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import triton

import kernels
from kernels.program import Program
from kernels.usage import SHARED_LIMIT, compile_program, faults, is_meant_for

COMMITTED = Path(__file__).parent / "compiled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A program of a module, by name: a kernel does not pass from process to process."""

    module: str
    name: str
    capability: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What became of a task."""

    task: Task
    seconds: float
    figures: dict[str, int] = field(default_factory=dict)  # none where it did not compile
    faults: list[str] = field(default_factory=list)


def modules() -> list[str]:
    """Return the modules of this package that have programs."""
    found = pkgutil.iter_modules(kernels.__path__, "kernels.")
    return sorted(module.name for module in found if module.name.endswith("_triton"))


@functools.cache
def programs_of(module: str) -> dict[str, Program]:
    """Return the programs of a module by name."""
    programs = list(importlib.import_module(module).programs())
    twice = [name for name, n in Counter(p.name for p in programs).items() if n > 1]
    if twice:
        raise ValueError(f"{module} has two programs of the name {twice[0]!r}")
    return {program.name: program for program in programs}


def measure(task: Task) -> Row:
    """Compile a task in this process."""
    start, figures = time.perf_counter(), {}
    try:
        program = programs_of(task.module)[task.name]
        usage = compile_program(program, task.capability)
        figures, found = usage.figures, faults(program, usage, task.capability)
    except Exception as error:  # whatever the compiler raises is the fault of the program
        said = "".join(traceback.format_exception_only(error)).strip()
        found = [f"does not compile: {said}"]
    return Row(task=task, seconds=time.perf_counter() - start, figures=figures, faults=found)


def work(tasks: Connection) -> None:
    """Answer each task with its row until there are no more."""
    with contextlib.suppress(EOFError):
        while True:
            tasks.send(measure(tasks.recv()))


class Worker(threading.local):
    """A process that compiles for one thread; a new one where a bug of the compiler ended it."""

    process: BaseProcess | None = None

    def measure(self, task: Task) -> Row:
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.tasks, other = context.Pipe()
            self.process = context.Process(target=work, args=(other,), daemon=True)
            self.process.start()
            other.close()
        start = time.perf_counter()
        self.tasks.send(task)
        try:
            row: Row = self.tasks.recv()
        except EOFError:
            self.process.join()
            said = f"the compiler ended its process: exit code {self.process.exitcode}"
            row = Row(task=task, seconds=time.perf_counter() - start, faults=[said])
            self.process = None
        return row


def drift(seen: dict[str, int], committed: dict[str, int]) -> list[str]:
    """Name each figure that is not the committed one."""
    names = list(dict.fromkeys([*seen, *committed]))
    pairs = [(name, seen.get(name, 0), committed.get(name, 0)) for name in names]
    return [f"{name}: {now} seen, {then} committed" for name, now, then in pairs if now != then]


def write(path: Path, table: dict[str, dict[str, dict[str, int]]]) -> None:
    """Write figures by capability and program, one program a line, so that a diff is readable."""
    blocks = []
    for capability, rows in sorted(table.items(), key=lambda item: int(item[0])):
        lines = (f"  {json.dumps(n)}: {json.dumps(f)}" for n, f in sorted(rows.items()))
        blocks.append(f'"{capability}": {{\n' + ",\n".join(lines) + "\n}")
    path.parent.mkdir(exist_ok=True)
    path.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SHARED_LIMIT), default=[90])
    parser.add_argument("--only", default="", metavar="REGEX", help="programs with such a name")
    parser.add_argument("--core", action="store_true", help="the few that `make test` compiles")
    parser.add_argument("--check", action="store_true", help="fail on a figure not as committed")
    parser.add_argument("--write", action="store_true", help="commit the figures seen")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compiled at a time")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.exit(2, "python -m kernels.report: unset TRITON_INTERPRET, which compiles nothing\n")
    return parser.parse_args()


def collect() -> tuple[list[tuple[str, Program]], int]:
    """Return all programs with their modules; print those that have none, and count them."""
    programs, broken = [], 0
    for module in modules():
        try:
            programs += [(module, program) for program in programs_of(module).values()]
        except Exception:  # one that does not import leaves the others to be seen
            print(f"{module}\n    FAULT has no programs: {traceback.format_exc(limit=-1)}")
            broken += 1
    return programs, broken


def show(row: Row, width: int) -> None:
    figures = "  ".join(f"{key} {value}" for key, value in row.figures.items())
    print(f"sm_{row.task.capability:<3} {row.task.name:<{width}}  {figures}  {row.seconds:.1f} s")
    for fault in row.faults:
        print("    FAULT " + fault.replace("\n", "\n        "))
    sys.stdout.flush()


def main() -> None:
    found = parse_arguments()
    path = COMMITTED / f"{triton.__version__}.json"
    committed: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    programs, missing = collect()
    tasks: list[Task] = []
    broken, drifted = missing, False
    again: list[str] = []  # what is wrong, once more below the table
    kept: dict[str, Any] = {}
    seen: dict[str, Any] = {str(capability): {} for capability in found.arch}
    for capability in found.arch:
        meant = {p.name: (m, p) for m, p in programs if is_meant_for(p, capability)}
        tasks += [
            Task(module=module, name=name, capability=capability)
            for name, (module, program) in meant.items()
            if re.search(found.only, name) and (program.core or not found.core)
        ]
        known = committed.get(str(capability), {})
        gone = [] if missing else sorted(set(known) - set(meant))
        kept[str(capability)] = {n: figures for n, figures in known.items() if n not in gone}
        if found.check and not known:
            print(
                f"sm_{capability}: no figures of triton {triton.__version__} are committed, "
                "its limits alone are checked"
            )
        if found.check and gone:
            print(f"sm_{capability}\n    FAULT committed and no longer there: {', '.join(gone)}")
            broken, drifted = broken + 1, True
    width = max((len(task.name) for task in tasks), default=0)
    threads = ThreadPoolExecutor(found.jobs)
    for row in threads.map(Worker().measure, tasks):
        capability, name = str(row.task.capability), row.task.name
        known = committed.get(capability, {})
        if found.check and known and row.figures:
            moved = drift(row.figures, known[name]) if name in known else ["nothing committed"]
            row.faults.extend(moved)
            drifted |= bool(moved)
        if row.figures:
            seen[capability][name] = row.figures
        show(row, width)
        broken += bool(row.faults)
        again += [f"    sm_{capability} {name}: {fault.splitlines()[-1]}" for fault in row.faults]
    if drifted:
        print(f"figures moved: if they may, `make gate-write`, read the diff and commit {path}")
    if found.write:
        now = {capability: kept[capability] | rows for capability, rows in seen.items()}
        write(path, {c: rows for c, rows in (committed | now).items() if rows})
    print(
        f"triton {triton.__version__}: {len(tasks)} compiled, {broken} with faults",
        *again,
        sep="\n",
    )
    sys.exit(broken > 0)


if __name__ == "__main__":
    main()
