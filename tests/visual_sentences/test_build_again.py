"""A build run again: with more data, with names taken off, with images in place of codes."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenizer.cli import guarded
from tokenizer.images import read_image
from visual_sentences.build import Build, build, main
from visual_sentences.image_shards import open_images
from visual_sentences.manifest import Manifest
from visual_sentences.shards import open_shard

SPEC = """
row_len = 256
image_size = 32

[[source]]
name = "photos"
kind = "image"
path = "photos"
splits = {val = 0.2}

[[source]]
name = "pairs"
kind = "pair"
inputs = "x-*.tar"
targets = "y-*.tar"
splits = {val = 0.2}
"""

OTHER = """
[[source]]
name = "clips"
kind = "video"
path = "clips"
"""


@pytest.fixture
def command(write_images: Callable[..., None], tmp_path: Path, tok_dir: Path) -> Build:
    root = tmp_path / "data"
    write_images(root / "photos", [f"{'ab'[i % 2]}/{i}.png" for i in range(20)], seed=1)
    for part in range(2):
        add_tars(root, part)
    (root / "mix.toml").write_text(SPEC)
    return Build(
        spec=root / "mix.toml",
        tokenizer=tok_dir,
        out=tmp_path / "out",
        workers=1,
        batch=8,
        shard_rows=2,
    )


def add_tars(root: Path, part: int) -> None:
    rng = np.random.default_rng(part)
    for role in "xy":
        with tarfile.open(root / f"{role}-{part}.tar", "w") as tar:
            for i in range(5):
                data = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(data, "PNG")
                info = tarfile.TarInfo(f"{i}.png")
                info.size = data.tell()
                data.seek(0)
                tar.addfile(info, data)


def quiet(message: str) -> None:
    """Take the place of the log."""


def run(command: Build) -> Manifest:
    manifest = build(command, log=quiet)
    assert manifest is not None
    return manifest


def keys(command: Build, source: str = "") -> list[str]:
    found = []
    for entry in Manifest.load(command.out).shards:
        if entry.source == source or not source:
            shard = open_shard(command.out / entry.name)
            found += [key for row in range(shard.rows) for key in shard.keys(row)]
    return found


def shards(command: Build) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in command.out.glob("*.arrow")}


def test_more_data_adds_shards_and_leaves_the_old_ones(
    write_images: Callable[..., None], command: Build
) -> None:
    first, before = run(command), shards(command)
    root = command.spec.parent
    write_images(root / "photos", [f"c/{i}.png" for i in range(5)], seed=2)
    add_tars(root, 2)
    write_images(root / "clips", [f"1/{i}.png" for i in range(3)], seed=3)
    command.spec.write_text(SPEC + OTHER)
    second, after = run(command), shards(command)

    assert {name: after[name] for name in before} == before
    assert second.generation == 2 and first.generation == 1
    assert Manifest.load(command.out) == second
    kept = json.loads((command.out / "manifest-001.json").read_text())
    assert [entry["name"] for entry in kept["shards"]] == [s.name for s in first.shards]
    for source in ("photos", "pairs"):
        old = [s for s in first.shards if s.source == source]
        assert [s for s in second.shards if s.source == source][: len(old)] == old, (
            "rows keep theirs"
        )
    assert len(keys(command)) == len(set(keys(command))) == 25 + 30 + 3
    assert [(s.inputs, s.good, s.bad) for s in second.sources] == [
        (25, 25, {}),
        (30, 30, {}),
        (3, 3, {}),
    ]
    again = shards(command)
    assert run(command) == second and shards(command) == again, "a third run has nothing to do"


def test_a_removed_file_stays_in_the_shards(command: Build) -> None:
    manifest = run(command)
    (command.spec.parent / "photos/a/0.png").unlink()
    assert run(command) == manifest


def test_more_data_after_a_lost_shard_keeps_what_is_there(
    write_images: Callable[..., None], command: Build
) -> None:
    """The manifest is withdrawn in the middle of such a run, so no copy of the old one is kept."""
    manifest, before = run(command), shards(command)
    (command.out / manifest.shards[0].name).unlink()
    write_images(command.spec.parent / "photos", ["c/1.png"], seed=2)
    second = run(command)
    assert second.generation == 2 and second.sources[0].good == 21
    after = shards(command)
    assert {name: after[name] for name in before} == before


def test_excluded_items_are_left_out_and_counted(command: Build, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("a/2.png\nb/3\n0/4\ny-1.tar/0.png\nunknown\n")
    manifest = run(replace(command, exclude=names))
    photos, pairs = manifest.sources
    assert (photos.good, photos.bad) == (18, {"excluded": 2})
    assert (pairs.good, pairs.bad) == (16, {"excluded": 4})
    found = keys(command)
    for gone in ("a/2.png", "b/3.png", "inputs/x-0.tar/4.png", "targets/y-1.tar/0.png"):
        assert gone not in found
    listed = (command.out / "unusable.tsv").read_text().splitlines()
    assert "photos\texcluded\ta/2.png" in listed


def test_a_name_excludes_no_other_file_of_the_same_stem(
    write_images: Callable[..., None], command: Build, tmp_path: Path
) -> None:
    write_images(command.spec.parent / "photos", ["a/2.jpg"], seed=7)
    names = tmp_path / "names.txt"
    names.write_text("a/2.png\n")
    run(replace(command, exclude=names))
    assert "a/2.jpg" in keys(command, "photos") and "a/2.png" not in keys(command, "photos")


def test_names_taken_off_later_are_taken_out_of_finished_shards(
    command: Build, tmp_path: Path
) -> None:
    """The folder is then what it would have been with the list from the start."""
    run(command)
    before = shards(command)
    names = tmp_path / "names.txt"
    names.write_text("a/2.png\n1/3\n")
    taken = replace(command, exclude=names)
    manifest = run(taken)
    fresh = replace(taken, out=tmp_path / "fresh")
    assert run(fresh) == manifest and shards(fresh) == shards(taken)
    changed = {name for name, data in shards(taken).items() if before.get(name) != data}
    assert 1 <= len(changed) <= 3, "shards without these names were touched"
    assert run(command).sources[0].good == 20 and shards(command) == before, "the way back"


def test_an_exclude_file_that_is_not_there_is_named(
    command: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = replace(command, exclude=tmp_path / "gone.txt")
    assert guarded(lambda: main(gone), prog="build") == 2
    assert "gone.txt cannot be read (No such file or directory)" in capsys.readouterr().err
    assert not command.out.exists()


def test_a_lost_shard_withdraws_the_manifest_until_it_is_there_again(command: Build) -> None:
    manifest, before = run(command), shards(command)
    lost = command.out / manifest.shards[0].name
    lost.unlink()
    shutil.move(command.spec.parent / "photos", command.spec.parent / "away")
    (command.spec.parent / "photos").mkdir()
    assert guarded(lambda: main(command), prog="build") == 2  # the folder is empty now
    assert not (command.out / "manifest.json").exists()
    shutil.rmtree(command.spec.parent / "photos")
    shutil.move(command.spec.parent / "away", command.spec.parent / "photos")
    assert run(command).shards == manifest.shards and shards(command) == before


def test_a_tar_that_went_away_is_counted_until_it_is_back(command: Build, tmp_path: Path) -> None:
    manifest, before = run(command), shards(command)
    for shard in command.out.glob("pairs-*-00001.arrow"):
        shard.unlink()  # of the second tars
    shutil.move(command.spec.parent / "y-1.tar", tmp_path / "y-1.tar")
    assert run(command).sources[1].bad == {"missing file": 2}
    shutil.move(tmp_path / "y-1.tar", command.spec.parent / "y-1.tar")
    assert run(command).shards == manifest.shards and shards(command) == before


def test_images_are_stored_with_their_labels(command: Build, tmp_path: Path) -> None:
    stored = replace(command, images=True, tokenizer=None, out=tmp_path / "images")
    manifest = run(stored)
    photos, pairs = manifest.sources
    assert manifest.form == "images" and photos.classes == ("a", "b") and pairs.classes == ()
    seen = []
    for entry in manifest.shards:
        shard = open_images(stored.out / entry.name)
        assert shard.metadata["split"] == entry.split
        for row in range(shard.rows):
            names = shard.keys(row)
            for name, jpeg in zip(names, shard.jpegs(row), strict=True):
                seen.append(name)
                if entry.source == "photos":
                    assert shard.labels[row] == photos.classes.index(name.split("/")[0])
                    want = read_image(command.spec.parent / "photos" / name, size=32).astype(int)
                    # JPEG halves the resolution of colour; pictures are some 80 apart.
                    assert abs(read_image(jpeg, size=32) - want).mean() < 15
                else:
                    assert shard.labels[row] == -1
    assert len(seen) == len(set(seen)) == 40


def test_labels_stay_when_classes_are_added(
    write_images: Callable[..., None], command: Build
) -> None:
    stored = replace(command, images=True, tokenizer=None)
    assert run(stored).sources[0].classes == ("a", "b")
    write_images(command.spec.parent / "photos", ["0new/1.png", "a/99.png"], seed=5)
    manifest = run(stored)
    assert manifest.sources[0].classes == ("a", "b", "0new")
    labels = {}
    for entry in manifest.shards:
        shard = open_images(stored.out / entry.name)
        labels |= {shard.keys(row)[0]: int(shard.labels[row]) for row in range(shard.rows)}
    assert (labels["0new/1.png"], labels["a/99.png"], labels["b/1.png"]) == (2, 0, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": True}, "--images stores no codes: leave out --tokenizer"),
        ({"tokenizer": None}, "wanted --tokenizer DIR"),
        ({"part": "3"}, "--part 3: wanted i/n"),
        ({"part": "3/2"}, "--part 3/2: wanted i/n"),
        ({"part": "0/2"}, "--part 0/2: wanted i/n"),
    ],
)
def test_bad_usage_is_told(
    command: Build, options: dict[str, object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = replace(command, **options)  # type: ignore[arg-type]
    assert guarded(lambda: main(wrong), prog="build") == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_tells_what_is_new(
    write_images: Callable[..., None], command: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    run(command)
    write_images(command.spec.parent / "photos", [f"c/{i}.png" for i in range(5)], seed=2)
    before = {path: path.stat().st_mtime_ns for path in command.out.iterdir()}
    capsys.readouterr()
    assert guarded(lambda: main(replace(command, dry_run=True)), prog="build") == 0
    printed = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in printed.splitlines() if line}
    assert lines["photos"][:4] == ["photos", "image", "5", "5"] and lines["pairs"][2] == "0"
    assert "40 files are in" in printed
    assert {path: path.stat().st_mtime_ns for path in command.out.iterdir()} == before
