"""Which pictures the passes of an item have."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from visual_sentences.containers.origin import Origin
from visual_sentences.draw import clip_frames, draw, orbit_views, usable
from visual_sentences.edits import cut_of, joined
from visual_sentences.seeds import seeded
from visual_sentences.sentence import Item, Picture, Sample
from visual_sentences.spec import KINDS, Kind, Source

LEAST_P = 1e-4  # a right sampler falls below it for one choice of seeds in 10,000; these are fixed

ROLES: dict[str, tuple[str, ...]] = {
    "pair": ("inputs", "targets"),
    "style": ("inputs", "targets"),
    "annotated": ("image", "depth", "seg"),
    "annotated_video": ("frames", "depth"),
}


def source_of(
    kind: Kind, *, stride: tuple[int, ...] = (1,), augment: int = 1, name: str = "s"
) -> Source:
    origins = {r: Origin(kind="folder", path=Path(r)) for r in ROLES.get(kind, ("path",))}
    return Source(name=name, kind=kind, origins=origins, stride=stride, augment=augment)


def item_of(kind: Kind, *, stem: str = "a", frames: int = 20) -> Item:
    each = range(frames) if kind in ("video", "orbit", "annotated_video") else [0]
    roles = ROLES.get(kind, ("path",))
    return Item(stem, tuple(f"{role}/{stem}/{i}.png" for role in roles for i in each), "group")


def passes(
    kind: Kind,
    *,
    stride: tuple[int, ...] = (1,),
    augment: int = 1,
    frames: int = 20,
    images_per_row: int = 8,
    seed: int = 0,
    stem: str = "a",
) -> list[Sample]:
    return draw(
        item_of(kind, stem=stem, frames=frames),
        source=source_of(kind, stride=stride, augment=augment),
        images_per_row=images_per_row,
        image_size=32,
        seed=seed,
    )


def numbers(sample: Sample) -> list[int]:
    """Return which frames of a clip a sample shows."""
    return [int(Path(picture.name).stem) for picture in sample.pictures]


def test_a_seed_is_a_hash_that_never_changes() -> None:
    """Other bits would give everybody's sources another order and other splits."""
    assert seeded(0, "frames", "walk/1", "start", 0) == 0xCCD56D95F7DFA774
    assert seeded("a", "b") != seeded("ab")


@pytest.mark.parametrize("kind", ["image", "category", "pair", "style", "annotated"])
def test_a_still_is_one_pass_with_all_its_files_as_they_are(kind: Kind) -> None:
    pictures = tuple(Picture(name) for name in item_of(kind).names)
    assert passes(kind) == [Sample("a", pictures, "group")]


def test_colorize_asks_for_the_colours() -> None:
    (sample,) = passes("colorize")
    assert [p.key for p in sample.pictures] == ["path/a/0.png|gray", "path/a/0.png"]


def test_inpaint_asks_for_what_is_hidden_in_each_image_by_itself() -> None:
    drawn = [passes("inpaint", stem=f"i{i}")[0].pictures for i in range(40)]
    assert all(hidden.name == whole.name and not whole.edit for hidden, whole in drawn)
    assert {hidden.edit.split()[0] for hidden, _ in drawn} == {"hole", "patches"}
    # Two may be equal only where all patches are hidden or none is, one mask of 65 each.
    assert len({hidden.edit for hidden, _ in drawn}) > 35


@pytest.mark.parametrize("length", [2, 3, 7, 8, 9, 20, 64])
def test_frames_are_evenly_spaced_and_inside_the_clip(length: int) -> None:
    for seed in range(20):
        drawn = passes("video", stride=(1, 3, 50), frames=length, seed=seed)
        count = min(8, length)
        longest = (length - 1) // (count - 1)
        steps = {tuple(np.diff(numbers(sample)).tolist()) for sample in drawn}
        assert all(len(sample.pictures) == count for sample in drawn)
        assert steps <= {(min(stride, longest),) * (count - 1) for stride in (1, 3, 50)}
        assert len({sample.pictures for sample in drawn}) == len(drawn), "the same frames twice"


def test_clip_frames_are_as_drawn() -> None:
    for start in range(3):
        for stride in (2, 5):
            found = clip_frames(9, stride=stride, most=4, drawn=3 * 10**18 + start)
            assert found == [start, start + 2, start + 4, start + 6]


def test_orbit_views_are_as_drawn() -> None:
    assert orbit_views(8, stride=1, most=4, drawn=5) == [5, 6, 7, 0]
    assert orbit_views(8, stride=2, most=4, drawn=8 + 5) == [5, 7, 1, 3]
    assert orbit_views(8, stride=4, most=4, drawn=5) == [5, 1]
    assert orbit_views(8, stride=16, most=3, drawn=7) == [7, 0, 1]


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 40), st.integers(1, 90), st.integers(2, 16), st.integers(0, 2**64 - 1))
def test_no_frame_or_view_is_shown_twice(total: int, stride: int, most: int, drawn: int) -> None:
    for choose in (clip_frames, orbit_views):
        found = choose(total, stride=stride, most=most, drawn=drawn)
        assert 2 <= len(set(found)) == len(found) <= most
        assert set(found) <= set(range(total))


def test_the_start_of_a_clip_is_uniform_over_what_fits() -> None:
    starts = [numbers(passes("video", stride=(2,), stem=f"c{i}")[0])[0] for i in range(1200)]
    # 20 frames, 8 of them every second one: the last start that fits is 20 - 1 - 7 · 2 = 5.
    assert set(starts) == set(range(6))
    assert chisquare(np.bincount(starts)).pvalue > LEAST_P


def test_each_pass_and_copy_starts_anew() -> None:
    # 14 starts fit with stride 2, 7 with stride 3: one draw for both would fill 14 of 98 cells.
    strides, copies = np.zeros((14, 7), int), np.zeros((14, 14), int)
    for i in range(2000):
        samples = passes("video", stride=(2, 3), augment=2, frames=28, stem=f"c{i}")
        two, three, copy, _ = (numbers(sample)[0] for sample in samples)
        strides[two, three] += 1
        copies[two, copy] += 1
    assert chisquare(strides.ravel()).pvalue > LEAST_P  # uniform and independent
    assert chisquare(copies.ravel()).pvalue > LEAST_P


def test_the_start_of_an_orbit_is_uniform_over_all_views() -> None:
    starts = [numbers(passes("orbit", frames=24, stem=f"o{i}")[0])[0] for i in range(1200)]
    assert chisquare(np.bincount(starts, minlength=24)).pvalue > LEAST_P


def test_passes_that_would_be_equal_are_made_once() -> None:
    assert len(passes("video", stride=(1, 2, 3), frames=6)) == 1
    assert len(passes("video", stride=(1, 2, 3), frames=6, augment=3)) == 3
    assert len(passes("video", stride=(1, 2), frames=40)) == 2
    assert len(passes("annotated_video", stride=(1, 2), frames=4)) == 2


@pytest.mark.parametrize("kind", ["video", "orbit", "annotated_video"])
def test_a_clip_of_one_frame_has_no_pass(kind: Kind) -> None:
    assert passes(kind, frames=1, augment=2) == []


def test_annotated_frames_stand_beside_their_annotations_in_two_forms() -> None:
    drawn = passes("annotated_video", stride=(1, 3), frames=30)
    assert [(s.form, s.number, s.width) for s in drawn] == [
        ("separate", 0, 2),
        ("interleaved", 1, 2),
        ("separate", 2, 2),
        ("interleaved", 3, 2),
    ]
    assert drawn[0].pictures == drawn[1].pictures, "both forms show the same frames"
    for sample, stride in zip(drawn, (1, 1, 3, 3), strict=True):
        assert len(sample.pictures) == 8  # 4 frames and 4 annotations
        start = numbers(sample)[0]
        assert [p.name for p in sample.pictures] == [
            f"{role}/a/{start + i * stride}.png" for i in range(4) for role in ("frames", "depth")
        ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_has_one_cut_for_all_its_pictures(kind: Kind) -> None:
    drawn, alone = passes(kind, augment=4), passes(kind)
    assert [sample.number for sample in drawn] == list(range(4 * len(alone)))
    assert drawn[: len(alone)] == alone
    cuts = set()
    for copy in range(1, 4):
        samples = drawn[copy * len(alone) : (copy + 1) * len(alone)]
        (cut,) = {cut_of(picture.edit) for sample in samples for picture in sample.pictures}
        assert cut[0] is not None
        cuts.add(cut)
        crop = "crop " + " ".join(f"{part:g}" for part in cut[0]) + " flip" * cut[1]
        for sample, first in zip(samples, alone, strict=True):
            for picture, plain in zip(sample.pictures, first.pictures, strict=True):
                if kind == "inpaint" and plain.edit:
                    assert picture.edit.startswith((f"{crop} hole ", f"{crop} patches "))
                else:
                    assert picture.edit == joined(crop, plain.edit)
    assert len(cuts) == 3, "each copy has a cut of its own"


def test_more_copies_leave_those_before_as_they_are() -> None:
    for kind in KINDS:
        assert passes(kind, augment=3)[: len(passes(kind, augment=2))] == passes(kind, augment=2)


def test_a_copy_hides_something_else() -> None:
    edits = [sample.pictures[0].edit for sample in passes("inpaint", augment=5)]
    masks = {edit[max(edit.find("hole"), edit.find("patches")) :] for edit in edits}
    assert len(masks) == 5


def test_sources_seeds_and_items_draw_by_themselves() -> None:
    item = item_of("video", frames=1000)
    drawn = {
        draw(
            Item(stem, item.names),
            source=source_of("video", name=name),
            images_per_row=8,
            image_size=32,
            seed=seed,
        )[0].pictures
        for name in "st"
        for seed in (0, 1)
        for stem in "ab"
    }
    assert len(drawn) == 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_whose_pictures_are_all_good_is_used_as_it_is(kind: Kind) -> None:
    for sample in passes(kind, augment=2):
        assert usable(sample, set(sample.pictures), kind=kind) is sample


@pytest.mark.parametrize("kind", ["image", "category", "pair", "style", "annotated", "inpaint"])
def test_a_still_with_a_bad_picture_is_not_used(kind: Kind) -> None:
    (sample,) = passes(kind)
    for bad in sample.pictures:
        assert usable(sample, set(sample.pictures) - {bad}, kind=kind) is None


@pytest.mark.parametrize("kind", ["video", "orbit"])
def test_a_clip_goes_on_without_its_bad_frames(kind: Kind) -> None:
    (sample,) = passes(kind, augment=1)
    some = sample.pictures[1:3] + sample.pictures[5:]
    found = usable(sample, set(some), kind=kind)
    assert found == Sample(sample.stem, some, "group", sample.number)
    assert usable(sample, set(some[:2]), kind=kind) is not None
    assert usable(sample, set(some[:1]), kind=kind) is None


def test_an_annotated_frame_is_left_out_with_its_annotation() -> None:
    sample = passes("annotated_video", augment=2)[-1]
    f1, a1, f2, _, f3, a3, f4, a4 = sample.pictures
    found = usable(sample, {f1, a1, f2, f3, a3, a4}, kind="annotated_video")
    assert found is not None
    assert found.pictures == (f1, a1, f3, a3)
    assert (found.form, found.number, found.width) == ("interleaved", sample.number, 2)
    assert usable(sample, {f1, a1, f2, a3, f4}, kind="annotated_video") is None
