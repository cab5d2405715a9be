"""Training images: held-out split, order, bad files, and equality of the two ways to read."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenizer import dataset
from tokenizer.cli import CommandError, InputError
from tokenizer.dataset import Images, decode_all, find_images, fingerprint, hold_out, picks
from tokenizer.images import save_image
from tokenizer.world import World

READING = {"size": 16, "preprocess": "crop", "workers": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of 12 distinct flat images, two of them broken."""
    for i in range(12):
        save_image(tmp_path / f"{i}.png", np.full((16, 16, 3), 20 * i, np.uint8))
    (tmp_path / "3.png").write_bytes(b"no image")
    (tmp_path / "5.png").write_bytes(b"")
    return tmp_path


def files(folder: Path) -> list[Path]:
    return [path for _, path in find_images([folder])]


def test_every_pass_shows_every_image_once_in_another_order() -> None:
    passes = torch.cat([picks(step, batch=6, n=10, seed=1) for step in range(10)]).view(6, 10)
    assert all(sorted(p.tolist()) == list(range(10)) for p in passes)
    assert len({tuple(p.tolist()) for p in passes}) == 6
    assert not torch.equal(picks(0, batch=10, n=10, seed=1), picks(0, batch=10, n=10, seed=2))


def test_order_does_not_depend_on_where_one_starts(folder: Path) -> None:
    images = Images(files(folder), world=World(), **READING)
    stream = images.batches(0, batch=4, seed=0)
    later = [next(stream) for _ in range(5)][3:]
    resumed = images.batches(3, batch=4, seed=0)
    assert all(torch.equal(batch, next(resumed)) for batch in later)


def test_images_read_on_the_fly_equal_those_in_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = [f for f in files(folder) if f.stem not in ("3", "5")]
    memory = Images(good, world=World(), **READING).batches(0, batch=4, seed=0)
    monkeypatch.setattr(dataset, "IN_MEMORY_BYTES", 0)
    disk = Images(good, world=World(), **READING).batches(0, batch=4, seed=0)
    assert all(torch.equal(next(memory), next(disk)) for _ in range(6))


def test_bad_images_are_counted_by_reason_and_left_out(folder: Path) -> None:
    pixels, bad = decode_all(files(folder), label="read", **READING)
    assert pixels.shape == (10, 3, 16, 16) and pixels.dtype == torch.uint8
    assert bad == Counter({"not an image": 1, "empty file": 1})
    assert sorted(set(pixels.flatten().tolist())) == [20 * i for i in range(12) if i not in (3, 5)]


def test_bad_images_on_the_fly_are_replaced_by_good_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "IN_MEMORY_BYTES", 0)
    images = Images(files(folder), world=World(), **READING)
    batch = next(images.batches(0, batch=12, seed=0))
    assert batch.shape == (12, 3, 16, 16) and images.bad.total() >= 2
    assert not {60, 100} & set(batch.flatten().tolist())
    broken = Images([folder / "3.png", folder / "5.png"], world=World(), **READING)
    with pytest.raises(CommandError, match="whole batch"):
        next(broken.batches(0, batch=2, seed=0))


def test_split_holds_out_the_same_files_wherever_they_are(folder: Path) -> None:
    named = find_images([folder])
    train, held = hold_out(named)
    assert len(held) == 1 and sorted(train + held) == sorted(files(folder))
    moved = [(name, Path("/elsewhere") / name) for name, _ in reversed(named)]
    assert [p.name for p in hold_out(moved)[1]] == [p.name for p in held]
    assert fingerprint(named) == fingerprint([(name, Path("/x")) for name, _ in named])
    assert fingerprint(named) != fingerprint(named[1:])


def test_unusable_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no image folder at"):
        find_images([tmp_path / "nowhere"])
    with pytest.raises(InputError, match="has no images"):
        find_images([tmp_path])
    with pytest.raises(InputError, match="at least one"):
        find_images([])
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match="only one image"):
        hold_out(find_images([tmp_path]))
    with pytest.raises(InputError, match="none of 1 images can be read: 1 empty file"):
        decode_all(files(tmp_path), label="read", **READING)
