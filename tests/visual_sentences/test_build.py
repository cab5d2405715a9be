"""A build: the same bytes whatever the workers and crashes, and an answer to every bad input."""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import tokenizer
from tokenizer.cli import InputError, guarded
from tokenizer.files import TEMPORARY
from tokenizer.images import read_image
from tokenizer.precision import resolve
from visual_sentences.build import Build, build, main
from visual_sentences.manifest import Manifest
from visual_sentences.shards import open_shard

ROOT = Path(__file__).parents[2]


def quiet(message: str) -> None:
    """Take the place of the log."""


@pytest.fixture(scope="session")
def command(data: Path, tok_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The undisturbed build of one process that the others are compared with."""
    out = tmp_path_factory.mktemp("reference") / "out"
    made = Build(
        spec=data / "mix.toml", tokenizer=tok_dir, out=out, workers=1, batch=8, shard_rows=2
    )
    assert build(made, log=quiet) is not None
    return made


@pytest.fixture(scope="session")
def exact(command: Build, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The same build, with the codes of `encode` in fp32."""
    made = replace(command, out=tmp_path_factory.mktemp("exact") / "out", precision="exact")
    assert build(made, log=quiet) is not None
    return made


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def exit_code(command: Build) -> int:
    return guarded(lambda: main(command), prog="build")


def test_tokens_are_the_codes_of_the_images_that_the_keys_name(exact: Build, data: Path) -> None:
    manifest, tok = Manifest.load(exact.out), tokenizer.load(exact.tokenizer)
    folders = {"photos": data / "photos", "clips": data / "clips", "depth": data}
    names = {"inputs": "frames", "targets": "depth"}
    for entry in manifest.shards:
        shard = open_shard(exact.out / entry.name)
        for row in range(shard.rows):
            keys = shard.keys(row)
            if entry.source == "depth":
                keys = [f"{names[key.split('/')[0]]}/{key.split('/', 1)[1]}" for key in keys]
            pixels = np.stack([read_image(folders[entry.source] / key, size=32) for key in keys])
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
            codes = tok.encode(images).reshape(-1)
            assert shard.length[row] == len(codes)
            # Batches of another size may round a distance differently: nearly all, not all, equal.
            same = shard.tokens[row, : len(codes)] == codes.numpy()
            assert same.mean() > 0.99
            assert not shard.tokens[row, len(codes) :].any()


def test_another_precision_changes_few_codes_and_is_recorded(command: Build, exact: Build) -> None:
    tok = tokenizer.load(command.tokenizer)
    pairs = []
    for made, precision in (
        (command, resolve("auto", tok=tok, device="cpu")),
        (exact, "exact"),
    ):
        shards = [open_shard(made.out / entry.name) for entry in Manifest.load(made.out).shards]
        assert {shard.metadata["encoder"] for shard in shards} == {f"{precision} cpu"}
        pairs.append(np.concatenate([shard.tokens for shard in shards]))
    # A codebook as initialised, whose codes lie close together; trained ones keep more than 99 %.
    assert (pairs[0] == pairs[1]).mean() > 0.9


def test_a_build_is_not_resumed_in_another_precision(
    exact: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(replace(exact, precision="fp16")) == 2
    assert "precision: there 'exact', now 'fp16'" in capsys.readouterr().err
    assert exit_code(replace(exact, precision="tf32")) == 2
    assert "precision tf32: only a GPU has it" in capsys.readouterr().err


def test_a_build_of_an_older_version_is_read_but_not_added_to(
    exact: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = tmp_path / "out"
    shutil.copytree(exact.out, older)
    known = json.loads((older / "build.json").read_text())
    (older / "build.json").write_text(json.dumps(known | {"version": 1}))
    assert exit_code(replace(exact, out=older)) == 2
    assert "version: there 1, now 2" in capsys.readouterr().err
    assert Manifest.load(older) == Manifest.load(exact.out)


def test_sentences_are_what_their_kinds_say(command: Build) -> None:
    manifest = Manifest.load(command.out)
    for entry in manifest.shards:
        shard = open_shard(command.out / entry.name)
        for row in range(shard.rows):
            keys = shard.keys(row)
            edges = [*(shard.starts(row) // 64).tolist(), shard.length[row] // 64]
            parts = [keys[a:b] for a, b in pairwise(edges)]
            if entry.source == "photos":
                assert [len(part) for part in parts] == [1] * len(keys)
            for part in parts if entry.source == "depth" else []:
                assert [key.split("/")[0] for key in part] == ["inputs", "targets"] * (
                    len(part) // 2
                )
                stems = [key.split("/")[1].split(".")[0] for key in part]
                assert stems[::2] == stems[1::2]
            for part in parts if entry.source == "clips" else []:
                assert len({key.split("/")[0] for key in part}) == 1
                assert 2 <= len(part) <= 4


def test_every_image_and_pair_is_used_once(command: Build) -> None:
    manifest = Manifest.load(command.out)
    keys: dict[str, list[str]] = {"photos": [], "depth": [], "clips": []}
    for entry in manifest.shards:
        shard = open_shard(command.out / entry.name)
        keys[entry.source] += [key for row in range(shard.rows) for key in shard.keys(row)]
    assert sorted(keys["photos"]) == sorted(f"{i % 3}/{i}.jpg" for i in range(30))
    assert len(keys["depth"]) == len(set(keys["depth"])) == 40
    assert {key.split("/")[0] for key in keys["clips"]} == {f"clip{c}" for c in range(6)}


def test_the_manifest_tells_what_is_there(command: Build) -> None:
    manifest = Manifest.load(command.out)
    photos, depth, clips = manifest.sources
    assert (photos.inputs, photos.good, photos.bad, photos.license) == (30, 30, {}, "CC0")
    assert (depth.inputs, depth.good, depth.repeat) == (40, 40, 2)
    assert (depth.note, clips.kind) == ("nearest neighbours", "video")
    assert manifest.splits == ["train", "val"]
    assert manifest.rows("train")["photos"] + manifest.rows("val")["photos"] >= 8
    assert sum(shard.images for shard in manifest.shards_of("depth", "train")) == 40
    for entry in manifest.shards:
        assert entry.rows == open_shard(command.out / entry.name).rows <= command.shard_rows


SEEDS = [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 7))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_build_goes_on_to_the_same_bytes(
    command: Build, tmp_path: Path, workers: int, seed: int
) -> None:
    """kill -9 when a seeded number of shards is there; its workers must end by themselves.

    Seconds each, since a real process imports torch; with 2 workers three of them.
    """
    again = replace(command, out=tmp_path / "out", workers=workers)
    total = len(Manifest.load(command.out).shards)
    wanted = random.Random(10 * seed + workers).randint(1, total // 4)
    options = f"--workers {workers} --batch 8 --shard-rows 2".split()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "visual_sentences.build", str(again.spec), "--tokenizer"),
            *(str(again.tokenizer), "--out", str(again.out), *options),
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_for(
            lambda: len(list(again.out.glob("*.arrow"))) >= wanted or process.poll() is not None
        )
        workers_running = children(process.pid)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    assert not (again.out / "manifest.json").exists()
    wait_for(lambda: not any(running(pid) for pid in workers_running))
    before = {p.name: p.stat().st_mtime_ns for p in again.out.glob("*.json") if "-" in p.name}

    assert build(replace(again, workers=1), log=quiet) is not None
    assert content(again.out) == content(command.out)
    assert not list(again.out.glob(f"*{TEMPORARY}*"))
    kept = {name: (again.out / name).stat().st_mtime_ns for name in before}
    assert kept == before, "a finished unit was made again"


def wait_for(condition: Callable[[], bool], *, seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.001)


def children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_left_over_temporary_is_removed(command: Build, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(command.out, out)
    (out / "manifest.json").unlink()
    (out / f"photos-train-00000.arrow{TEMPORARY}1-x").write_bytes(b"half")
    assert build(replace(command, out=out), log=quiet) is not None
    assert content(out) == content(command.out)


def test_a_finished_build_says_so_and_touches_nothing(
    command: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in command.out.iterdir()}
    assert exit_code(command) == 0
    assert "is finished, nothing is left to do" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in command.out.iterdir()} == before


@pytest.mark.parametrize("how", ["deleted", "cut"])
def test_a_lost_shard_is_made_again(command: Build, tmp_path: Path, how: str) -> None:
    out = tmp_path / "out"
    shutil.copytree(command.out, out)
    shard = out / "depth-train-00001.arrow"
    if how == "deleted":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-8])
    assert build(replace(command, out=out), log=quiet) is not None
    assert content(out) == content(command.out)


def test_verify_finds_a_flipped_bit(
    command: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(command.out, out)
    check = replace(command, out=out, verify=True)
    assert exit_code(check) == 0
    assert "shards are as the manifest says" in capsys.readouterr().out
    shard = out / "depth-train-00001.arrow"
    flipped = bytearray(shard.read_bytes())
    flipped[Manifest.load(out).shards[0].offset] ^= 1
    shard.write_bytes(flipped)
    assert exit_code(check) == 1
    message = capsys.readouterr().err
    assert "1 of" in message and "depth-train-00001.arrow: wrong content (sha256)" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seed = 3", "seed = 4"), "seed: there 3, now 4"),
        (("stride = [1, 2]", "stride = [1]"), "source.clips.stride: there [1, 2], now [1]"),
        (('[[source]]\nname = "clips"', '[[source]]\nname = "other"'), "source.clips.kind: there"),
    ],
)
def test_another_spec_on_the_same_folder_is_refused(
    command: Build,
    data: Path,
    change: tuple[str, str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = data / "other.toml"
    spec.write_text(command.spec.read_text().replace(*change))
    before = content(command.out)
    assert exit_code(replace(command, spec=spec)) == 2
    assert message in capsys.readouterr().err
    assert content(command.out) == before


def test_another_tokenizer_on_the_same_folder_is_refused(
    small_tokenizer: Callable[..., Path],
    command: Build,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = small_tokenizer(tmp_path / "other", seed=1)
    assert exit_code(replace(command, tokenizer=other)) == 2
    assert "tokenizer: there " in capsys.readouterr().err


def test_a_tokenizer_that_does_not_fit_the_spec_is_refused(
    small_tokenizer: Callable[..., Path],
    command: Build,
    tmp_path: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = small_tokenizer(tmp_path / "other", image_size=48)
    assert exit_code(replace(command, tokenizer=other, out=tmp_path / "out")) == 2
    assert "row_len = 256 does not hold whole images" in capsys.readouterr().err
    spec = data / "sized.toml"
    spec.write_text("image_size = 64\n" + command.spec.read_text())
    assert exit_code(replace(command, spec=spec, out=tmp_path / "out")) == 2
    assert "image_size = 64, but the tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_added_during_an_interrupted_build_come_after_it(
    write_images: Callable[..., None], command: Build, data: Path, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    shutil.copytree(data, root)
    again = replace(command, spec=root / "mix.toml", out=tmp_path / "out")
    build(again, log=quiet)
    before = content(again.out)
    (again.out / "manifest.json").unlink()
    (again.out / "depth-train-00001.json").unlink()  # it was interrupted there
    write_images(root / "photos", ["new.jpg"], seed=9)
    manifest = build(again, log=quiet)
    assert manifest is not None and manifest.sources[0].good == 31
    after = content(again.out)
    assert {name: after[name] for name in before if "-" in name} == {
        name: data for name, data in before.items() if "-" in name
    }


def test_two_builds_do_not_write_one_folder(command: Build, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    holder = os.open(out, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    try:
        with pytest.raises(InputError, match="another build is writing"):
            build(replace(command, out=out), log=quiet)
    finally:
        os.close(holder)


def test_a_dry_run_tells_what_would_be_made_and_writes_nothing(
    command: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(replace(command, out=tmp_path / "out", dry_run=True)) == 0
    printed = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in printed.splitlines() if line}
    assert lines["source"][2:] == ["files", "images", "sentences", "tokens", "share", "time"]
    # 20 pairs in rows of two; units of two rows hold four pairs, so the estimate is exact.
    assert lines["depth"][:6] == ["depth", "pair", "40", "40", "10", "2,560"]
    assert lines["photos"][:3] == ["photos", "image", "30"]
    assert "nothing was written" in printed
    assert not (tmp_path / "out").exists()


def test_a_new_weight_changes_the_manifest_alone(
    command: Build, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(command.out, out)
    before = content(out)
    spec = data / "weighted.toml"
    spec.write_text(command.spec.read_text().replace("repeat = 2\n", "weight = 0.4\n"))
    manifest = build(replace(command, spec=spec, out=out), log=quiet)
    assert manifest is not None and manifest.sources[1].weight == 0.4
    assert Manifest.load(out) == manifest
    changed = {name for name, data in content(out).items() if data != before.get(name)}
    assert changed <= {"manifest.json", "build.json"}


BAD_SPEC = """
row_len = 256
[[source]]
name = "photos"
kind = "image"
path = "photos"
[[source]]
name = "depth"
kind = "pair"
inputs = "frames"
targets = "depth"
[[source]]
name = "clips"
kind = "video"
path = "clips"
"""


@pytest.fixture
def spoilt(write_images: Callable[..., None], tmp_path: Path) -> Path:
    """Good images with one bad one of each sort among them."""
    write_images(tmp_path / "photos", [f"{i}.jpg" for i in range(8)], seed=1)
    write_images(tmp_path / "frames", [f"{i}.png" for i in range(6)], seed=2)
    write_images(tmp_path / "depth", [f"{i}.png" for i in range(6)], seed=3)
    write_images(tmp_path / "clips", [f"{c}/{i}.png" for c in "ab" for i in range(3)], seed=4)
    whole = (tmp_path / "photos" / "0.jpg").read_bytes()
    (tmp_path / "photos" / "0.jpg").write_bytes(whole[: len(whole) - 40])
    (tmp_path / "photos" / "1.png").write_text("not a picture")
    (tmp_path / "photos" / "2.jpg").write_bytes(b"")
    (tmp_path / "depth" / "0.png").unlink()
    (tmp_path / "frames" / "1.png").unlink()
    (tmp_path / "depth" / "2.png").write_text("not a picture")
    (tmp_path / "clips" / "a" / "1.png").write_text("not a picture")
    (tmp_path / "clips" / "b" / "0.png").write_text("not a picture")
    (tmp_path / "clips" / "b" / "2.png").write_text("not a picture")
    (tmp_path / "mix.toml").write_text(BAD_SPEC)
    return tmp_path


def test_bad_files_are_counted_named_and_left_out(
    spoilt: Path, tok_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = spoilt / "out"
    assert exit_code(Build(spec=spoilt / "mix.toml", tokenizer=tok_dir, out=out, workers=1)) == 0
    manifest = Manifest.load(out)
    photos, depth, clips = manifest.sources
    assert photos.bad == {"truncated": 1, "not an image": 1, "empty file": 1}
    assert depth.bad == {
        "missing target": 1,
        "missing input": 1,
        "not an image": 1,
        "other half unusable": 1,
    }
    assert clips.bad == {"not an image": 3, "clip too short": 1}
    for source in manifest.sources:
        assert source.inputs == source.good + sum(source.bad.values())
    assert [source.good for source in manifest.sources] == [6, 6, 2]
    printed = capsys.readouterr().out
    assert "depth: missing target: inputs/0.png" in printed
    assert "photos: truncated: 0.jpg" in printed
    listed = (out / "unusable.tsv").read_text().splitlines()
    assert "clips\tclip too short\tb/1.png" in listed
    assert len(listed) == 11


def test_a_source_without_a_good_image_fails_after_the_others_are_done(
    spoilt: Path, tok_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (spoilt / "photos").iterdir():
        path.write_text("not a picture")
    out = spoilt / "out"
    command = Build(spec=spoilt / "mix.toml", tokenizer=tok_dir, out=out, workers=1)
    for _ in range(2):  # a second run must not call it well either
        assert exit_code(command) == 1
        assert "no image of photos could be used" in capsys.readouterr().err
    assert Manifest.load(out).rows("train") == {"photos": 0, "depth": 2, "clips": 1}


def test_an_empty_folder_stops_before_anything_is_written(
    spoilt: Path, tok_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(spoilt / "photos")
    (spoilt / "photos").mkdir()
    command = Build(spec=spoilt / "mix.toml", tokenizer=tok_dir, out=spoilt / "out", workers=1)
    assert exit_code(command) == 2
    message = capsys.readouterr().err
    assert 'source "photos": there is no file in path = ' in message
    assert "that could be an image; wanted .jpg" in message
    assert not list((spoilt / "out").iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "wanted --batch and --shard-rows of 1 or more"),
        ({"workers": -1}, "--workers of 0 or more"),
        ({"tokenizer": Path("nowhere")}, "nowhere"),
        ({"spec": Path("nowhere.toml")}, "there is no spec file nowhere.toml"),
    ],
)
def test_bad_usage_is_exit_code_2(
    command: Build,
    tmp_path: Path,
    options: dict[str, object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert exit_code(replace(command, out=tmp_path / "o", **options)) == 2  # type: ignore[arg-type]
    assert message in capsys.readouterr().err


def test_json_of_a_unit_of_another_version_is_not_trusted(command: Build, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(command.out, out)
    (out / "manifest.json").unlink()
    unit = out / "depth-train-00000.json"
    unit.write_text(json.dumps(json.loads(unit.read_text()) | {"version": 0}))
    build(replace(command, out=out), log=quiet)
    assert content(out) == content(command.out)
