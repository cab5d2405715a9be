"""A process for every place: what it does, and how it is ended with everything it started."""

import json
import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from examples.place import Look, Place, render
from tokenizer.files import TEMPORARY, atomic_write

PATIENCE = 180.0  # seconds after which a process counts as hung; it needs 1 to 3


def report_path(out: Path, place: Place) -> Path:
    """Return the file that is there when all pictures of a place are."""
    return out / ".render" / f"{place.name}.json"


def render_all(
    todo: list[Place],
    look: Look,
    out: Path,
    *,
    workers: int,
    finished: Callable[[Place, str], None],
) -> None:
    """Render each place in a process of its own; call `finished` with how it failed, or nothing."""
    for left in out.glob(f"*{TEMPORARY}*"):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    # Forked from a small server that has the imports, not from here, where threads may run.
    context = get_context("forkserver")
    context.set_forkserver_preload(["examples.child"])
    waiting = list(reversed(todo))
    running: dict[ForkServerProcess, tuple[Place, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < max(1, workers):
                place = waiting.pop()
                process = context.Process(target=_child, args=(place, look, out.resolve()))
                process.start()
                running[process] = (place, time.monotonic())
            wait([process.sentinel for process in running], timeout=1.0)
            for process, (place, since) in list(running.items()):
                if process.is_alive() and time.monotonic() - since < PATIENCE:
                    continue
                del running[process]
                finished(place, _end(process, place, out))
    finally:
        for process, (place, _) in running.items():
            _end(process, place, out)


def _child(place: Place, look: Look, out: Path) -> None:
    os.setpgid(0, 0)  # the engine is a process too: both can then be ended together
    part = _temporary(out, place, os.getpid())
    (part / "engine").mkdir(parents=True)
    os.chdir(part / "engine")  # the engine leaves its settings where it runs
    try:
        report = render(place, look, part / "pictures")
        for clip in sorted((part / "pictures").rglob(f"{place.name}-*/")):
            final = out / place.split / clip.relative_to(part / "pictures")
            final.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(final, ignore_errors=True)  # of a run that was killed right here
            clip.rename(final)
        with atomic_write(report_path(out, place), "w") as file:
            json.dump(report, file)
    except Exception:
        traceback.print_exc()
        os._exit(1)


def _end(process: ForkServerProcess, place: Place, out: Path) -> str:
    """End a child and the engine that it started; say how it failed, or nothing."""
    hung = process.is_alive()
    try:
        os.killpg(process.pid or 0, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()  # nothing of the group is left, or the child has not made it yet
    process.join()
    shutil.rmtree(_temporary(out, place, process.pid), ignore_errors=True)
    code = process.exitcode or 0
    if hung:
        return f"ended after {PATIENCE:.0f} s"
    return f"exit code {code}" if code > 0 else f"signal {-code}" if code else ""


def _temporary(out: Path, place: Place, pid: int | None) -> Path:
    return out / f"{place.name}{TEMPORARY}{pid}"
