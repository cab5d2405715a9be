"""What the files of a prompt become: the order of the sentence, what is asked, what is hidden."""

from pathlib import Path

import numpy as np
import pytest

from lvm.prompting import prompts
from lvm.prompting.prompts import kept_rows, mirrored, plan, read
from tokenizer.cli import InputError
from tokenizer.images import save_image

A, B, C, D, E = (Path(f"{name}.png") for name in "abcde")


@pytest.fixture
def picture(tmp_path, np_rng) -> Path:
    save_image(tmp_path / "p.png", np_rng.integers(0, 256, (8, 8, 3), np.uint8))
    return tmp_path / "p.png"


def test_pairs_and_examples_stand_before_the_query():
    found = plan(pairs=[(A, B), (C, D)], query=[E])
    assert (found.files, found.width, found.bare, found.new) == ((A, B, C, D, E), 2, 1, 1)
    assert found == plan(examples=[(A, B), (C, D)], query=[E])
    three = plan(examples=[(A, B, C)], query=[D])
    assert (three.files, three.width, three.bare, three.new) == ((A, B, C, D), 3, 1, 2)
    known = plan(examples=[(A, B, C)], query=[D, E], new=1)
    assert (known.files[3:], known.bare, known.new) == ((D, E), 2, 1)


def test_a_sequence_and_a_part_alone_ask_for_what_follows():
    found = plan(sequence=[A, B], new=3, part=C, keep=0.25)
    assert (found.files, found.width, found.new, found.part) == ((A, B), 0, 3, C)
    alone = plan(part=A)
    assert (alone.files, alone.bare, alone.new) == ((), 0, 1)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("--query is missing", {"pairs": [(A, B)]}),
        ("give --pair", {}),
        ("--frames is a prompt of its own", {"sequence": [A], "query": [B]}),
        ("--pair x y is --example x y", {"pairs": [(A, B)], "examples": [(A, B)], "query": [C]}),
        ("given 2 and 3 images", {"examples": [(A, B), (A, B, C)], "query": [D]}),
        ("given 1 images; wanted at least 2", {"examples": [(A,)], "query": [D]}),
        ("--new 2, but an example has 1", {"pairs": [(A, B)], "query": [C], "new": 2}),
        ("nothing is left to answer", {"pairs": [(A, B)], "query": [C, D]}),
        ("--stride 0", {"sequence": [A], "stride": 0}),
        ("--stride and --count choose frames", {"sequence": [A, B], "stride": 2}),
        ("--stride and --count go with --frames", {"query": [A], "count": 2}),
        ("--frames names b.gif and 1 more", {"sequence": [A, Path("b.gif")]}),
        ("--keep 1: ", {"part": A, "keep": 1}),
        ("--keep 0: ", {"part": A, "keep": 0}),
    ],
)
def test_what_makes_no_prompt_is_refused(words, options):
    with pytest.raises(InputError, match=words):
        plan(**options)


def test_the_kept_part_is_whole_rows_and_the_rest_its_mirror(picture):
    """16 codes are 4 rows; 0.6 of them is 2.4, so that 2 rows, 4 of 8 pixels, are kept."""
    asked = plan(part=picture, keep=0.6)
    found = read(asked, size=8, codes_per_image=16, room=4, preprocess="squash")
    (whole,) = prompts.read_images([picture], size=8, preprocess="squash")
    assert (found.rows, found.height, len(found.images)) == (2, 4, 0)
    assert np.array_equal(found.part, np.concatenate([whole[:4], whole[3::-1]]))


def test_pixels_below_the_kept_part_never_count(picture):
    asked = plan(part=picture, keep=0.25)
    options = {"size": 8, "codes_per_image": 16, "room": 4, "preprocess": "squash"}
    before = read(asked, **options)
    (pixels,) = prompts.read_images([picture], size=8, preprocess="squash")
    changed = pixels.copy()
    changed[2:] = 255 - changed[2:]
    save_image(picture, changed)
    assert np.array_equal(read(asked, **options).part, before.part)
    changed[1] = 255 - changed[1]
    save_image(picture, changed)
    assert not np.array_equal(read(asked, **options).part, before.part)


def test_a_mirror_goes_on_when_little_is_kept():
    assert mirrored(2, 7).tolist() == [0, 1, 1, 0, 0, 1, 1]


def test_rows_that_cannot_be_kept_are_refused():
    assert [kept_rows(keep, 64) for keep in (0.07, 0.5, 0.93)] == [1, 4, 7]
    with pytest.raises(InputError, match=r"--keep 0\.05 is nothing of an image of 8 rows.*0\.125"):
        kept_rows(0.05, 64)
    with pytest.raises(InputError, match=r"--keep 0\.96 is all"):
        kept_rows(0.96, 64)
    with pytest.raises(InputError, match="12 codes an image are no square"):
        kept_rows(0.5, 12)


def test_a_clip_gives_as_many_frames_as_leave_room(tmp_path, np_rng):
    images = np_rng.integers(0, 256, (9, 8, 8, 3), np.uint8)
    for i, image in enumerate(images):
        save_image(tmp_path / f"f{i}.png", image)
    options = {"size": 8, "codes_per_image": 16, "room": 6, "preprocess": "squash"}
    assert np.array_equal(read(plan(sequence=[tmp_path], new=2), **options).images, images[-4:])
    every = read(plan(sequence=[tmp_path], new=2, stride=3, count=2), **options)
    assert np.array_equal(every.images, images[[5, 8]])
    assert len(read(plan(sequence=[tmp_path], new=9), **options).images) == 1
