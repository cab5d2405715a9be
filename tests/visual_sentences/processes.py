"""Builds as processes of their own: started, watched, killed, compared."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from visual_sentences.build import Build

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

# Builds with the options given, but stops in front of a call, says so, and goes on when it may.
STOPS = """
import sys
from pathlib import Path
import visual_sentences.{module} as module
from visual_sentences.build import Build, main
from tokenizer.cli import run

real, calls, folder = module.{name}, 0, Path(sys.argv.pop(1))
def held(*args, **options):
    global calls
    calls += 1
    if calls == {number}:
        (folder / "reached").touch()
        open(folder / "go_on").close()  # a pipe, which nobody has opened for writing
    return real(*args, **options)
module.{name} = held
run(Build, main, prog="build")
"""

# A cluster that says it has two GPUs, and actors that encode on the CPU.
ACTORS = """
import ray
from tokenizer.cli import run
from visual_sentences import on_ray
from visual_sentences.build import Build, main

def by_actors(job, units, *, workers, log):
    quiet = dict(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.init(address="local", num_cpus=5, num_gpus=2, object_store_memory=on_ray.STORE, **quiet)
    slots = on_ray.by_actors(ray, job, workers=workers)
    yield from on_ray.collect(ray, units, slots, log=log)

on_ray.on_ray = by_actors
run(Build, main, prog="build")
"""


def words(command: Build) -> list[str]:
    """Return the command line of a build, without the program."""
    given = [str(command.spec), "--tokenizer", str(command.tokenizer), "--out", str(command.out)]
    given += ["--batch", str(command.batch), "--shard-rows", str(command.shard_rows)]
    given += ["--workers", str(command.workers), "--engine", command.engine]
    return [*given, "--part", command.part] if command.part else given


def shell(command: Build) -> list[str]:
    return [sys.executable, "-m", "visual_sentences.build", *words(command)]


def start(command: list[str], **env: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, env={**ENV, **env}, stdout=pipe, stderr=pipe, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for a process; returns its exit code and what it printed."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@contextmanager
def stopped(
    command: Build, folder: Path, *, module: str, name: str, number: int = 1
) -> Iterator[subprocess.Popen[str]]:
    """Start a build that stands in front of its n-th call of `module.name`.

    It goes on when `folder/go_on` is opened for writing, and does not outlive the block.
    """
    folder.mkdir()
    os.mkfifo(folder / "go_on")
    program = STOPS.format(module=module, name=name, number=number)
    process = start([sys.executable, "-c", program, str(folder), *words(command)])
    try:
        wait_for(lambda: (folder / "reached").exists() or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        yield process
    finally:
        process.kill()
        process.communicate()


def go_on(folder: Path) -> None:
    (folder / "go_on").open("w").close()


def kill(process: subprocess.Popen[str]) -> None:
    """kill -9, and wait until all that the process had started has gone too."""
    started = descendants(process.pid)
    agents = [pid for pid in started if title(pid).endswith("Agent")]
    process.kill()
    process.wait()
    for pid in agents:  # of Ray, which write nothing, and notice after a minute
        os.kill(pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    wait_for(lambda: not any(map(running, started)))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def wait_for(condition: Callable[[], object], *, seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.001)


def pool_workers() -> list[int]:
    """Return the processes of pools that this process has started."""
    return [pid for pid in descendants(os.getpid()) if "spawn_main(" in title(pid)]


def descendants(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [p for child in map(int, children) for p in (child, *descendants(child))]


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
