"""Whoever runs the units of a build, and however many there are: the bytes are the same."""

import os
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from tokenizer.cli import guarded, run
from visual_sentences import build as module
from visual_sentences.build import Build, build, main
from visual_sentences.on_ray import cores_for_a_gpu
from visual_sentences.plan import Plan


def quiet(message: str) -> None:
    """Take the place of the log."""


def exit_code(command: Build) -> int:
    return guarded(lambda: main(command), prog="build")


MANY = [(1, 3), (2, 6), pytest.param(4, 4, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("workers", "cores"), MANY)
def test_workers_and_threads_change_no_byte(
    undisturbed: Build,
    processes: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    cores: int,
) -> None:
    """Seconds with several workers, since each is a process that imports torch."""
    threads = []
    for name in ("in_process", "in_pool"):
        real = getattr(module, name)

        def seen(job, units, *, real=real, **options):
            threads.append(job.threads)
            yield from real(job, units, **options)

        monkeypatch.setattr(module, name, seen)
    monkeypatch.setattr(module, "cores", lambda: cores)
    made = replace(undisturbed, out=tmp_path / "out", workers=workers)
    assert build(made, log=quiet) is not None
    assert threads == [cores // workers]
    assert processes.content(made.out) == processes.content(undisturbed.out)


def test_parts_in_any_order_and_one_seal_make_the_same_bytes(
    undisturbed: Build, processes: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = replace(undisturbed, out=tmp_path / "out")
    for part in ("2/3", "3/3", "1/3"):
        assert not (command.out / "manifest.json").exists()
        assert exit_code(replace(command, part=part)) == 0
        assert f"part {part} is done; when all are, the same command" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in command.out.iterdir()}
    assert not (command.out / "manifest.json").exists()
    assert build(command, log=quiet) is not None
    assert {path: path.stat().st_mtime_ns for path in before} == before, "made again by the seal"
    assert processes.content(command.out) == processes.content(undisturbed.out)


def test_the_seal_does_what_a_lost_part_left(
    undisturbed: Build, processes: ModuleType, tmp_path: Path
) -> None:
    command = replace(undisturbed, out=tmp_path / "out")
    for part in ("1/4", "4/4"):
        build(replace(command, part=part), log=quiet)
    assert build(command, log=quiet) is not None
    assert processes.content(command.out) == processes.content(undisturbed.out)


def test_parts_that_start_together_share_one_plan(
    write_images: Callable[..., None],
    every: Path,
    undisturbed: Build,
    processes: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Part 2 lists the sources, of which one has got an image, while part 1 writes its plan."""
    root = tmp_path / "every"
    shutil.copytree(every, root)
    command = replace(undisturbed, spec=root / "every.toml", out=tmp_path / "out")
    real = module.make_plan

    def later(*args, **options) -> Plan:
        monkeypatch.setattr(module, "make_plan", real)
        build(replace(command, part="1/2"), log=quiet)
        write_images(root / "classes", ["ant/new.png"], seed=1)
        write_images(root / "styled", ["ant/new.png"], seed=2)
        return real(*args, **options)

    monkeypatch.setattr(module, "make_plan", later)
    build(replace(command, part="2/2"), log=quiet)
    manifest = build(command, log=quiet)
    assert manifest is not None and manifest.generation == 2
    after, known = processes.content(command.out), processes.content(undisturbed.out)
    first = {name for name in known if "-" in name}
    assert {name: after[name] for name in first} == {name: known[name] for name in first}
    again = [source.good for source in manifest.sources if source.name == "style"]
    assert again == [44], "the new pair comes after it, once"


@pytest.mark.slow
def test_parts_at_the_same_time_make_the_same_bytes(
    undisturbed: Build, processes: ModuleType, tmp_path: Path
) -> None:
    command = replace(undisturbed, out=tmp_path / "out")
    parts = [replace(command, part=f"{i}/3") for i in (1, 2, 3)]
    started = [processes.start(processes.shell(part)) for part in parts]
    for process, part in zip(started, parts, strict=True):
        code, out, err = processes.finish(process)
        assert (code, err) == (0, "") and f"part {part.part} is done" in out
    assert build(command, log=quiet) is not None
    assert processes.content(command.out) == processes.content(undisturbed.out)


@pytest.mark.parametrize("part", ["0/3", "4/3", "1", "a/b", "-1/3"])
def test_a_part_that_is_none_is_refused(
    undisturbed: Build, tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(replace(undisturbed, out=tmp_path / "out", part=part)) == 2
    assert f"--part {part}: wanted i/n with i from 1 to n" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(Build, main, prog="python -m visual_sentences.build", args=["--help"])
    assert ended.value.code == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name in Build.__dataclass_fields__:
        assert (f"--{name.replace('_', '-')}" if name != "spec" else "mix.toml") in printed
    assert "{local,ray}" in printed and "as in a Slurm array" in printed


def test_ray_that_is_not_installed_is_named(
    undisturbed: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert exit_code(replace(undisturbed, out=tmp_path / "out", engine="ray")) == 2
    message = capsys.readouterr().err
    assert "pip install 'large-vision-models[ray]', or --engine local" in message


@pytest.mark.parametrize(
    ("nodes", "cores"),
    [
        ([{"CPU": 16, "GPU": 8}], 2),
        ([{"CPU": 15, "GPU": 2}], 7),  # 8 would leave a GPU without an actor, and units waiting
        ([{"CPU": 64}, {"CPU": 12, "GPU": 4}], 3),  # cores of nodes without GPUs do not help
        ([{"CPU": 32, "GPU": 4}, {"CPU": 8, "GPU": 4}], 2),
        ([{"CPU": 2, "GPU": 4}], 0),
    ],
)
def test_every_gpu_finds_the_cores_that_its_actor_asks_for(
    nodes: list[dict[str, float]], cores: int
) -> None:
    assert cores_for_a_gpu(nodes) == cores


@pytest.mark.slow
def test_ray_makes_the_same_bytes(
    undisturbed: Build, processes: ModuleType, tmp_path: Path
) -> None:
    """Ten seconds: Ray starts, and each of its processes imports torch. So below."""
    command = replace(undisturbed, out=tmp_path / "out", engine="ray", workers=2)
    code, out, err = processes.finish(processes.start(processes.shell(command)))
    assert (code, err) == (0, "") and "66 rows" in out
    assert processes.content(command.out) == processes.content(undisturbed.out)


@pytest.mark.slow
def test_actors_of_ray_make_the_same_bytes(
    undisturbed: Build, processes: ModuleType, tmp_path: Path
) -> None:
    """On processors: that two actors share the work, not what a GPU computes."""
    command = replace(undisturbed, out=tmp_path / "out", engine="ray")
    words = [sys.executable, "-c", processes.ACTORS, *processes.words(command)]
    code, _, err = processes.finish(processes.start(words))
    assert (code, err) == (0, "")
    assert processes.content(command.out) == processes.content(undisturbed.out)


@pytest.mark.slow
def test_ray_symmetric_run_makes_the_same_bytes(
    undisturbed: Build, processes: ModuleType, tmp_path: Path
) -> None:
    """As launch/build_ray.sh starts it, in a PID namespace: it stops all that is called Ray."""
    command = replace(undisturbed, out=tmp_path / "out", engine="ray", workers=0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    script = 'ray symmetric-run --address "$RAY_ADDRESS" --num-cpus 2 -- "$@"; exit $?'
    alone = ["unshare", *(() if os.geteuid() == 0 else ("-r",)), "--pid", "--fork", "--mount-proc"]
    process = processes.start(
        [*alone, "--kill-child", "bash", "-c", script, "bash", *processes.shell(command)],
        RAY_ADDRESS=address,
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN="0123456789abcdef" * 4,
        RAY_USAGE_STATS_ENABLED="0",
    )
    code, out, err = processes.finish(process)
    if code == 1 and "unshare" in err:
        pytest.skip(f"no namespaces here: {err.strip()}")
    assert code == 0, out + err
    assert processes.content(command.out) == processes.content(undisturbed.out)


@pytest.mark.slow
def test_a_cluster_that_cannot_be_reached_is_named(
    undisturbed: Build, processes: ModuleType, tmp_path: Path
) -> None:
    command = replace(undisturbed, out=tmp_path / "out", engine="ray")
    process = processes.start(processes.shell(command), RAY_ADDRESS="127.0.0.1:9")
    code, _, err = processes.finish(process)
    assert code == 2 and "no Ray cluster can be reached at RAY_ADDRESS=127.0.0.1:9 (" in err
    assert err.count("\n") == 1, "one message"
