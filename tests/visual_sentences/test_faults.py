"""What goes wrong during a build: nothing is lost or doubled, and one message says what it was.

Processes are killed by SIGKILL, disks are small ones that are really full. Every test compares with
a build that nothing happened to, byte by byte.
"""

import functools
import io
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tokenizer.cli import guarded
from tokenizer.files import TEMPORARY
from visual_sentences import build as module
from visual_sentences import workers
from visual_sentences.build import Build, build, main
from visual_sentences.manifest import Manifest

FULL = "the disk is full ([Errno 28] No space left on device"


def quiet(message: str) -> None:
    """Take the place of the log."""


def exit_code(command: Build) -> int:
    return guarded(lambda: main(command), prog="build")


def units(out: Path) -> list[str]:
    return [path.name for path in out.glob("*-*-*.json")]


# Killed workers


@pytest.mark.parametrize("losses", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_build_goes_on_when_a_worker_is_killed(
    undisturbed: Build,
    processes: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    losses: int,
) -> None:
    """Seconds, since each worker is a process that imports torch; four of them at least."""
    command = replace(undisturbed, out=tmp_path / "out", workers=2)
    with during(lambda: kill_workers(command.out, processes, losses=losses)):
        assert exit_code(command) == 0
    printed = capsys.readouterr()
    assert printed.out.count("a worker process was killed; what it was at is done again") == losses
    assert printed.err == ""
    assert processes.content(command.out) == processes.content(undisturbed.out)


def kill_workers(out: Path, processes: ModuleType, *, losses: int) -> None:
    """Kill one of two workers when three units were finished, so that one result has come."""
    for _ in range(losses):
        before = len(units(out))
        processes.wait_for(lambda before=before: len(units(out)) >= before + 3)
        pid = processes.pool_workers()[0]
        # What it would leave if it was writing just then.
        (out / f"pair-train-00001.arrow{TEMPORARY}{pid}-0").write_bytes(b"half")
        os.kill(pid, signal.SIGKILL)
        processes.wait_for(lambda pid=pid: not processes.running(pid))


class during:
    """Run a function in a thread while the block runs; an error in it is raised at the end."""

    def __init__(self, body: Callable[[], None]) -> None:
        self.body, self.error = body, None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self.body()
        except BaseException as error:
            self.error = error

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *raised: object) -> None:
        self.thread.join()
        if self.error is not None:
            raise self.error


def test_workers_that_are_killed_again_and_again_end_the_build(
    undisturbed: Build,
    processes: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As a machine without the memory for them does."""
    command = replace(undisturbed, out=tmp_path / "out", workers=2)
    ended = threading.Event()

    def kill_all() -> None:
        while not ended.wait(0.01):
            for pid in processes.pool_workers():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    with during(kill_all):
        code = exit_code(command)
        ended.set()
    assert code == 1
    printed = capsys.readouterr()
    assert printed.out.count("a worker process was killed; what it was at") == 2
    assert printed.err.startswith("build: a worker process was killed 3 times before anything was")
    assert "fewer --workers" in printed.err and printed.err.count("\n") == 1


@pytest.mark.slow
def test_what_a_worker_raises_is_told_once(
    undisturbed: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A tokenizer that the driver could open and the workers cannot is not a killed process."""
    real = module.prepare

    def moved(*args: Any) -> Any:
        job, row_len = real(*args)
        return replace(job, tokenizer=str(tmp_path / "moved")), row_len

    monkeypatch.setattr(module, "prepare", moved)
    assert exit_code(replace(undisturbed, out=tmp_path / "out", workers=2)) == 2
    printed = capsys.readouterr()
    assert str(tmp_path / "moved") in printed.err and printed.err.count("build: ") == 1
    assert "killed" not in printed.out + printed.err


class Odd(Exception):
    """Cannot be made again from its arguments, as pickle does."""

    def __init__(self, name: str, number: int) -> None:
        super().__init__(name)


def test_an_error_reaches_the_driver_with_what_led_to_it() -> None:
    for error, kind in ((ValueError("wrong"), ValueError), (Odd("wrong", 1), RuntimeError)):
        try:
            raise error
        except Exception as caught:
            passed = workers.portable(caught)
        assert type(passed) is kind
        passed = pickle.loads(pickle.dumps(passed))
        story = "".join(traceback.format_exception(passed))
        assert "wrong" in story and "raise error" in story


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["_run", "Worker.run"])
def test_ray_goes_on_when_a_worker_of_its_is_killed(
    undisturbed: Build, processes: ModuleType, tmp_path: Path, kind: str
) -> None:
    """A task and an actor, at their first unit, which takes seconds since they import torch."""
    command = replace(undisturbed, out=tmp_path / "out", engine="ray", workers=2)
    words = processes.shell(command)
    if kind == "Worker.run":
        words = [sys.executable, "-c", processes.ACTORS, *processes.words(command)]
    process = processes.start(words)
    at_work = functools.partial(titled, processes, process.pid, f"ray::{kind}")
    processes.wait_for(lambda: at_work() or process.poll() is not None)
    os.kill(at_work()[0], signal.SIGKILL)
    code, out, err = processes.finish(process)
    assert code == 0, out + err
    if kind == "_run":
        assert out.count("a worker of Ray was lost; what it was at is done again") == 1
        assert err == ""
    assert processes.content(command.out) == processes.content(undisturbed.out)


def titled(processes: ModuleType, pid: int, title: str) -> list[int]:
    return [p for p in processes.descendants(pid) if processes.title(p).startswith(title)]


# Killed drivers

MOMENTS = {
    "before a plan": ("build", "write_plan", 1),
    "after the plan": ("build", "run_units", 1),
    "in the middle": ("workers", "run_unit", 12),
    "after the last unit": ("build", "seal", 1),
    "before the manifest": ("build", "describe_unusable", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_driver_is_started_again(
    undisturbed: Build, processes: ModuleType, tmp_path: Path, moment: str
) -> None:
    """Four seconds: a process that imports torch. So all below that start one."""
    command = replace(undisturbed, out=tmp_path / "out")
    module, name, number = MOMENTS[moment]
    with processes.stopped(
        command, tmp_path / "stop", module=module, name=name, number=number
    ) as process:
        processes.kill(process)
    assert not (command.out / "manifest.json").exists()
    done = units(command.out)
    last = len(units(undisturbed.out))
    assert len(done) == {"in the middle": 11}.get(moment, 0 if "plan" in moment else last)
    (command.out / f"image-train-00000.arrow{TEMPORARY}1-0").write_bytes(b"half")
    before = {name: (command.out / name).stat().st_mtime_ns for name in done}
    assert build(command, log=quiet) is not None
    assert {name: (command.out / name).stat().st_mtime_ns for name in done} == before, "made again"
    assert processes.content(command.out) == processes.content(undisturbed.out)


@pytest.mark.slow
def test_a_killed_driver_of_ray_is_started_again(
    undisturbed: Build, processes: ModuleType, tmp_path: Path
) -> None:
    command = replace(undisturbed, out=tmp_path / "out", engine="ray", workers=2)
    process = processes.start(processes.shell(command))
    processes.wait_for(lambda: len(units(command.out)) > 3 or process.poll() is not None)
    processes.kill(process)
    process.communicate()
    assert not (command.out / "manifest.json").exists()
    code, out, err = processes.finish(processes.start(processes.shell(command)))
    assert (code, err) == (0, ""), out
    assert processes.content(command.out) == processes.content(undisturbed.out)


# Two at once


@pytest.mark.slow
def test_a_second_build_on_the_same_folder_is_refused(
    undisturbed: Build,
    processes: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """While another process, or a part of the same build, is at it; that one is not disturbed."""
    command = replace(undisturbed, out=tmp_path / "out")
    stop = tmp_path / "stop"
    with processes.stopped(command, stop, module="workers", name="run_unit", number=5) as first:
        temporary = command.out / f"pair-train-00000.arrow{TEMPORARY}{first.pid}-0"
        temporary.write_bytes(b"half")  # it might be writing
        for second in (command, replace(command, part="1/2")):
            assert exit_code(second) == 2
            message = capsys.readouterr().err
            assert message.startswith("build: another build is writing to ")
            assert message.count("\n") == 1
        assert temporary.exists()
        processes.go_on(stop)
        code, _, err = processes.finish(first)
        assert (code, err) == (0, "")
    assert processes.content(command.out) == processes.content(undisturbed.out)


@pytest.mark.slow
def test_of_two_builds_that_start_together_one_does_it(
    undisturbed: Build, processes: ModuleType, tmp_path: Path
) -> None:
    command = replace(undisturbed, out=tmp_path / "out")
    both = [processes.start(processes.shell(command)) for _ in range(2)]
    ends = [processes.finish(process) for process in both]
    # The second finds a finished build if the first was much faster.
    assert sorted(code for code, _, _ in ends) in ([0, 2], [0, 0])
    for code, out, err in ends:
        wanted = "another build is writing" if code else "66 rows"
        assert wanted in (err if code else out)
    assert processes.content(command.out) == processes.content(undisturbed.out)


# Disks


def as_root(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test that mounts; anyone but root runs it in a namespace where he is root."""

    @functools.wraps(test)
    def wrapper(*, request: pytest.FixtureRequest, **fixtures: Any) -> None:
        if os.geteuid() == 0:
            test(request=request, **fixtures)
            return
        inner = [sys.executable, "-m", "pytest", request.node.nodeid, "-p", "no:cacheprovider"]
        command = ["unshare", "--user", "--map-root-user", "--mount", *inner]
        done = subprocess.run(
            command, cwd=request.config.rootpath, capture_output=True, text=True, timeout=300
        )
        if "unshare" in done.stderr:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        assert done.returncode == 0, done.stdout

    return wrapper


class Disk:
    """A file system of its own, of some KiB, in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        done = self._mount("-t", "tmpfs", "tmpfs")
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")

    def remount(self, options: str) -> bool:
        return self._mount("-o", f"remount,{options}").returncode == 0

    def _mount(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(["mount", *words, str(self.path)], capture_output=True, text=True)

    def remove(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() != 0:
        yield None  # type: ignore[misc]  # `as_root` does not come here
        return
    made = Disk(tmp_path / "disk")
    yield made
    made.remove()


SIZES = {  # KiB of the disk: the finished build has about 250
    "for the plan": 12,
    "for the shards": 100,
}


@pytest.mark.parametrize("wanted", SIZES)
@as_root
def test_a_full_disk_is_one_message_and_no_loss(
    request: pytest.FixtureRequest,
    undisturbed: Build,
    processes: ModuleType,
    disk: Disk,
    capsys: pytest.CaptureFixture[str],
    wanted: str,
) -> None:
    assert disk.remount(f"size={SIZES[wanted]}k")
    command = replace(undisturbed, out=disk.path / "out")
    finished = refuse_then_go_on(command, undisturbed, processes, disk, capsys)
    assert (finished > 0) == (wanted == "for the shards")


def refuse_then_go_on(
    command: Build,
    undisturbed: Build,
    processes: ModuleType,
    disk: Disk,
    capsys: pytest.CaptureFixture[str],
) -> int:
    """Return how many units were finished before the disk was full."""
    assert exit_code(command) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"build: {FULL}") and printed.err.count("\n") == 1
    assert "free some space and run the command again" in printed.err
    assert not (command.out / "manifest.json").exists()
    assert not list(command.out.glob(f"*{TEMPORARY}*"))
    before = len(units(command.out))
    assert disk.remount("size=4m")
    assert exit_code(command) == 0
    assert processes.content(command.out) == processes.content(undisturbed.out)
    return before


@pytest.mark.slow
@as_root
def test_a_disk_that_is_full_for_workers_is_one_message_and_no_loss(
    request: pytest.FixtureRequest,
    undisturbed: Build,
    processes: ModuleType,
    disk: Disk,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert disk.remount("size=100k")
    command = replace(undisturbed, out=disk.path / "out", workers=2)
    assert refuse_then_go_on(command, undisturbed, processes, disk, capsys) > 0


@pytest.mark.slow
@as_root
def test_a_disk_that_is_full_for_ray_is_one_message_and_no_loss(
    request: pytest.FixtureRequest, undisturbed: Build, processes: ModuleType, disk: Disk
) -> None:
    assert disk.remount("size=100k")
    command = replace(undisturbed, out=disk.path / "out", engine="ray", workers=2)
    code, _, err = processes.finish(processes.start(processes.shell(command)))
    assert code == 1 and err.count("\n") == 1, err
    assert err.startswith(f"python -m visual_sentences.build: {FULL}")
    assert disk.remount("size=4m")
    assert build(replace(command, engine="local", workers=1), log=quiet) is not None
    assert processes.content(command.out) == processes.content(undisturbed.out)


@as_root
def test_an_output_that_can_only_be_read_is_refused(
    request: pytest.FixtureRequest,
    undisturbed: Build,
    disk: Disk,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (disk.path / "out").mkdir()
    assert disk.remount("ro")
    for out in (disk.path / "out", disk.path / "new"):
        assert exit_code(replace(undisturbed, out=out)) == 2
        message = capsys.readouterr().err
        assert message == (
            f"build: --out {out} cannot be written to (Read-only file system); "
            "choose another folder\n"
        )


@as_root
def test_a_disk_that_becomes_read_only_is_one_message_and_no_loss(
    request: pytest.FixtureRequest,
    undisturbed: Build,
    processes: ModuleType,
    disk: Disk,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As a disk with errors does. A worker of a pool tells it its driver as it tells a full one."""
    command = replace(undisturbed, out=disk.path / "out")
    real = workers.run_unit

    def last(*args: Any, **options: Any) -> Any:
        if len(units(command.out)) == 5:
            assert disk.remount("ro")
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(workers, "run_unit", last)
        assert exit_code(command) == 1
    message = capsys.readouterr().err
    assert message.startswith("build: the disk can only be read ([Errno 30] Read-only file system")
    assert "have it made writable and run the command again" in message
    assert message.count("\n") == 1
    assert len(units(command.out)) == 5
    assert disk.remount("rw")
    assert exit_code(command) == 0
    assert processes.content(command.out) == processes.content(undisturbed.out)


# Damaged containers

TARS = """
row_len = 512
[[source]]
name = "tars"
kind = "image"
path = "tars/*.tar"
[[source]]
name = "photos"
kind = "image"
path = "photos"
"""


def test_a_damaged_tar_is_counted_and_the_rest_is_built(
    every: Path, undisturbed: Build, tmp_path: Path
) -> None:
    """Cut in the middle of a file, in the middle of a header, no tar at all, and one that is well.

    Every name of a cut tar that stands before the cut is used.
    """
    whole = (every / "tars/rgb-0.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        members = tar.getmembers()
    tars = {
        "cut.tar": whole[: members[5].offset_data + members[5].size // 2],
        "header.tar": whole[: members[3].offset + 100],
        "none.tar": b"this is not a tar at all " * 99,
        "well.tar": whole,
    }
    (tmp_path / "tars").mkdir()
    for name, data in tars.items():
        (tmp_path / "tars" / name).write_bytes(data)
    (tmp_path / "photos").symlink_to(every / "photos")
    (tmp_path / "mix.toml").write_text(TARS)
    command = replace(undisturbed, spec=tmp_path / "mix.toml", out=tmp_path / "out")
    assert exit_code(command) == 0
    source, photos = Manifest.load(command.out).sources
    assert source.good == 5 + 3 + 8 and photos.good == 13 and not photos.bad
    assert source.bad == {"truncated tar": 2, "unreadable tar": 1}
    listed = (command.out / "unusable.tsv").read_text().splitlines()
    assert listed == [
        "tars\ttruncated tar\tcut.tar",
        "tars\ttruncated tar\theader.tar",
        "tars\tunreadable tar\tnone.tar",
    ]
