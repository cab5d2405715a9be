"""Examples from folders, from built data, and drawn."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lvm.playground.examples import of_data, of_folder, shapes
from tokenizer.cli import InputError
from tokenizer.images import save_image
from visual_sentences.manifest import Manifest, ShardEntry, SourceEntry
from visual_sentences.shards import write_shard

N, ROW = 4, 24  # codes an image and a row, as in conftest.py


def picture(value: int) -> np.ndarray:
    return np.full((12, 12, 3), value, np.uint8)


def values(example) -> list[int]:
    return [int(image[0, 0, 0]) for image in example.pictures]


def test_folders_are_pairs_where_there_is_a_query_else_frames(tmp_path: Path):
    (tmp_path / "invert").mkdir()
    for i, name in enumerate(("x1", "y1", "x2", "y2", "x3", "y3", "query"), 1):
        save_image(tmp_path / "invert" / f"{name}.{'png' if i % 2 else 'bmp'}", picture(10 * i))
    (tmp_path / "walk").mkdir()
    for i in (1, 2, 10):
        save_image(tmp_path / "walk" / f"{i}.png", picture(i))
    (tmp_path / "nothing").mkdir()
    pairs, frames = of_folder(tmp_path, size=8, room=7, preprocess="squash")
    assert (pairs.name, pairs.kind, frames.name, frames.kind) == (
        "invert",
        "pairs",
        "walk",
        "frames",
    )
    assert values(pairs) == [10, 20, 30, 40, 50, 60, 70] and values(frames) == [1, 2, 10]
    assert pairs.pictures[0].shape == (8, 8, 3)


def test_bad_folders_of_examples_are_named(tmp_path: Path):
    def refused(words: str) -> None:
        with pytest.raises(InputError, match=words):
            of_folder(tmp_path / "e", size=8, room=3, preprocess="squash")

    refused("no such folder")
    (tmp_path / "e" / "odd").mkdir(parents=True)
    refused("no folder with pictures in it")
    for name in ("query", "x1"):
        save_image(tmp_path / "e" / "odd" / f"{name}.png", picture(1))
    refused(r"odd has query\.png, x1\.png; wanted x1 and y1, x2 and y2, … and one query")
    (tmp_path / "e" / "odd" / "y1.png").write_text("no picture")
    refused(r"y1\.png; mend the file or take it away")
    (tmp_path / "e" / "odd" / "y1.png").unlink()
    save_image(tmp_path / "e" / "odd" / "query.bmp", picture(1))
    refused(r"has query\.bmp, query\.png, x1\.png; wanted")
    save_image(tmp_path / "e" / "odd" / "x2.png", picture(1))
    refused("odd has 4 pictures; this model reads at most 3")


def test_shapes_fit_any_model_and_their_tasks_are_what_they_say():
    examples = {e.name: e for e in shapes(size=16, room=7)}
    x, y = examples["negative"].pictures[:2]
    assert np.array_equal(y, 255 - x) and len(examples["negative"].pictures) == 7
    x, y = examples["mirror"].pictures[2:4]
    assert np.array_equal(y, x[:, ::-1]) and not np.array_equal(x, y)
    x, y = examples["swap red and blue"].pictures[:2]
    assert np.array_equal(y, x[..., ::-1])
    discs = examples["moving disc"].pictures
    right = [(image[..., 0] > 150).nonzero()[1].mean() for image in discs]
    assert right == sorted(right) and len(discs) == 4
    for room in (1, 2, 3, 15):
        for example in shapes(size=8, room=room):
            assert 1 <= len(example.pictures) <= room
            assert example.kind == "frames" or len(example.pictures) % 2


def data_of(folder: Path, tokenizer: str, kinds: dict[str, int]) -> Path:
    """Write a source of one row of so many images of each kind, codes 0, 1, 2, …, split val."""
    folder.mkdir()
    sources, shards = [], []
    for name, count in kinds.items():
        tokens = np.zeros((1, ROW), np.uint16)
        tokens[0, : count * N] = np.repeat(np.arange(count), N)
        written = write_shard(
            folder / f"{name}.arrow", tokens=tokens, docs=[[0]],
            length=np.array([count * N], np.int32), keys=[[f"{i}" for i in range(count)]],
            metadata={"tokenizer": tokenizer},
        )  # fmt: skip
        shards.append(
            ShardEntry(
                name=f"{name}.arrow", source=name, split="val", rows=1, documents=1, images=count,
                bytes=written.bytes, sha256=written.sha256, offset=written.offset,
            )
        )  # fmt: skip
        sources.append(
            SourceEntry(
                name=name, kind=name, weight=None, repeat=None, preprocess="squash", license="",
                note="", inputs=count, good=count, bad={},
            )
        )  # fmt: skip
    Manifest(
        tokenizer=tokenizer, codebook_size=40, codes_per_image=N, image_size=8, row_len=ROW, seed=0,
        sources=tuple(sources), shards=tuple(shards),
    ).save(folder)  # fmt: skip
    return folder


def test_sentences_become_prompts_without_their_answer(tmp_path: Path, tok):
    folder = data_of(tmp_path / "d", tok.id, {"pair": 6, "video": 6, "image": 3})
    pairs, frames = of_data(folder, tok, room=5)
    assert (pairs.name, pairs.kind, len(pairs.pictures)) == ("pair", "pairs", 5)
    assert (frames.name, frames.kind, len(frames.pictures)) == ("video", "frames", 5)
    for i, image in enumerate(pairs.pictures):
        with torch.inference_mode():
            wanted = tok.decode(torch.full((1, N), i))[0].clamp(0, 1).mul(255).round().byte()
        assert np.array_equal(image, wanted.permute(1, 2, 0).numpy())
    short = of_data(folder, tok, room=4)  # of x1 y1 x2 y2 x3 the last pair and the query fit
    assert [len(e.pictures) for e in short] == [3, 4]


def test_data_of_another_tokenizer_or_without_prompts_is_refused(tmp_path: Path, tok):
    with pytest.raises(InputError, match="give data of the same tokenizer"):
        of_data(data_of(tmp_path / "a", "0" * 64, {"pair": 6}), tok, room=5)
    with pytest.raises(InputError, match=r'no sentence of pairs or frames in split "val"'):
        of_data(data_of(tmp_path / "b", tok.id, {"image": 3}), tok, room=5)
