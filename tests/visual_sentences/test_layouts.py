"""Sentences of each kind, and what the folders of a source hold."""

from pathlib import Path

import numpy as np
import pytest

from tokenizer.cli import InputError
from visual_sentences.layouts import draw_frames, image, pair, video
from visual_sentences.sentence import Sample, Sentence, fill_rows, row_indices
from visual_sentences.sources import list_source, path_of, split_of
from visual_sentences.spec import Source


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def sentences(*sizes: int) -> list[Sentence]:
    return [Sentence(tuple(f"{s}/{i}" for i in range(n))) for s, n in enumerate(sizes)]


def test_first_fit_is_as_drawn() -> None:
    a, b, c, d = sentences(3, 2, 1, 2)
    assert fill_rows([a, b, c, d], images_per_row=4) == [[a, c], [b, d]]


def test_no_sentence_is_lost_split_or_overflows() -> None:
    sizes = np.random.default_rng(0).integers(1, 9, 300)
    wanted = sentences(*sizes.tolist())
    rows = fill_rows(wanted, images_per_row=8)
    assert sorted(s.keys for row in rows for s in row) == sorted(s.keys for s in wanted)
    assert all(sum(len(s.keys) for s in row) <= 8 for row in rows)
    assert len(rows) <= 1.7 * sizes.sum() / 8 + 1  # the bound of first fit on its waste


def test_row_indices_mark_places_without_an_image() -> None:
    rows = [[Sentence(("a", "b")), Sentence(("a",))], [Sentence(("c",))]]
    table = row_indices(rows, {"a": 0, "b": 1, "c": 2}, images_per_row=4)
    assert table.tolist() == [[0, 1, 0, -1], [2, -1, -1, -1]]


def test_images_are_documents_of_their_own() -> None:
    samples = [Sample(name, (f"{name}.png",)) for name in "abc"]
    made = image(samples, images_per_row=8)
    assert [s.keys for s in made] == [("a.png",), ("b.png",), ("c.png",)]


@pytest.mark.parametrize(("images_per_row", "sizes"), [(4, [4, 4, 2]), (16, [10]), (5, [4, 4, 2])])
def test_pairs_are_joined_in_order(images_per_row: int, sizes: list[int]) -> None:
    samples = [Sample(str(i), (f"x{i}", f"y{i}")) for i in range(5)]
    made = pair(samples, images_per_row=images_per_row)
    assert [len(s.keys) for s in made] == sizes
    assert [key for s in made for key in s.keys] == [
        k for i in range(5) for k in (f"x{i}", f"y{i}")
    ]


def test_a_clip_needs_two_frames() -> None:
    made = video([Sample("a", ("a0",)), Sample("b", ("b0", "b1"))], images_per_row=8)
    assert [s.keys for s in made] == [("b0", "b1")]


@pytest.mark.parametrize("length", [2, 3, 7, 8, 9, 20, 64])
def test_frames_are_evenly_spaced_and_inside_the_clip(length: int) -> None:
    frames = [str(i) for i in range(length)]
    for seed in range(20):
        drawn = draw_frames(
            "c", frames, strides=[1, 3, 50], images_per_row=8, seed=seed, source="v"
        )
        count = min(8, length)
        longest = (length - 1) // (count - 1)
        steps = {tuple(np.diff([int(key) for key in s.keys]).tolist()) for s in drawn}
        assert all(len(s.keys) == count for s in drawn)
        assert steps <= {(min(stride, longest),) * (count - 1) for stride in (1, 3, 50)}
        assert len({s.keys for s in drawn}) == len(drawn), "the same frames twice"


def test_the_start_of_a_clip_varies_with_the_seed_and_reaches_both_ends() -> None:
    frames = [str(i) for i in range(10)]
    starts = {
        int(draw_frames("c", frames, strides=[1], images_per_row=8, seed=s, source="v")[0].keys[0])
        for s in range(60)
    }
    assert starts == {0, 1, 2}


def test_pairs_are_matched_by_name_without_suffix(tmp_path: Path) -> None:
    touch(tmp_path / "x", "1.png", "2.png", "sub/1.png", "3.png", "3.jpg")
    touch(tmp_path / "y", "1.jpg", "sub/1.jpg", "4.jpg", "3.jpg")
    source = Source(
        name="p", kind="pair", folders={"inputs": tmp_path / "x", "targets": tmp_path / "y"}
    )
    listing = list_source(source, seed=0)
    assert {item.keys for item in listing.items} == {
        ("inputs/1.png", "targets/1.jpg"),
        ("inputs/sub/1.png", "targets/sub/1.jpg"),
        ("inputs/3.jpg", "targets/3.jpg"),
    }
    assert sorted(listing.bad) == [
        ("inputs/2.png", "missing target"),
        ("inputs/3.png", "same name twice"),
        ("targets/4.jpg", "missing input"),
    ]
    assert listing.inputs == 9
    assert path_of(source, "targets/sub/1.jpg") == tmp_path / "y" / "sub" / "1.jpg"


def test_clips_are_folders_with_frames_in_natural_order(tmp_path: Path) -> None:
    touch(tmp_path, *(f"b/{i}.png" for i in range(11)), "a/x/0.png", "a/x/1.png", "lone/0.png")
    listing = list_source(Source(name="v", kind="video", folders={"path": tmp_path}), seed=0)
    clips = {item.stem: item.keys for item in listing.items}
    assert clips == {
        "b": tuple(f"b/{i}.png" for i in range(11)),
        "a/x": ("a/x/0.png", "a/x/1.png"),
    }
    assert listing.bad == [("lone/0.png", "clip too short")]


def test_a_folder_of_images_alone_is_one_clip(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "2.png", "10.png")
    listing = list_source(Source(name="v", kind="video", folders={"path": tmp_path}), seed=0)
    assert [item.keys for item in listing.items] == [("1.png", "2.png", "10.png")]


def test_the_order_is_seeded_and_a_new_item_moves_no_other(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{i}.png" for i in range(50)))
    source = Source(name="i", kind="image", folders={"path": tmp_path})
    before = [item.stem for item in list_source(source, seed=0).items]
    assert before != [item.stem for item in list_source(source, seed=1).items]
    digest = list_source(source, seed=0).digest()
    touch(tmp_path, "new.png")
    after = list_source(source, seed=0)
    assert [item.stem for item in after.items if item.stem != "new"] == before
    assert after.digest() != digest


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "notes.txt")
    source = Source(name="i", kind="image", folders={"path": tmp_path})
    with pytest.raises(InputError, match="no image file in path = "):
        list_source(source, seed=0)


def test_splits_have_their_shares_and_do_not_depend_on_the_source() -> None:
    splits = {"val": 0.1, "test": 0.2}
    drawn = [split_of(f"item{i}", splits) for i in range(5000)]
    # 5 standard deviations of a binomial share at n = 5000
    assert abs(drawn.count("val") / 5000 - 0.1) < 5 * (0.1 * 0.9 / 5000) ** 0.5
    assert abs(drawn.count("test") / 5000 - 0.2) < 5 * (0.2 * 0.8 / 5000) ** 0.5
    without = [split_of(f"item{i}", {"val": 0.1}) for i in range(5000)]
    assert [d == "val" for d in drawn] == [w == "val" for w in without]
