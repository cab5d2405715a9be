"""What a source holds: images, pairs, annotated images and clips, from folders."""

from pathlib import Path

import pytest

from tokenizer.cli import InputError
from visual_sentences.containers import recognise
from visual_sentences.containers.origin import Origin
from visual_sentences.sentence import Item
from visual_sentences.sources import (
    Listing,
    in_seeded_order,
    list_items,
    part_sets,
    split_of,
)
from visual_sentences.spec import Source


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def source_of(kind: str, folder: Path, *roles: str) -> Source:
    found = {
        role: recognise(role if len(roles) > 1 else ".", base=folder, where="spec", role=role)
        for role in roles
    }
    paths = {role: role for role in roles}
    return Source(name="s", kind=kind, paths=paths, origins=found)  # type: ignore[arg-type]


def listed(source: Source) -> Listing:
    return list_items(source, part_sets(source)[0][0])


def test_pairs_are_matched_by_name_without_suffix(tmp_path: Path) -> None:
    touch(tmp_path / "inputs", "1.png", "2.png", "sub/1.png", "3.png", "3.jpg")
    touch(tmp_path / "targets", "1.jpg", "sub/1.jpg", "4.jpg", "3.jpg")
    listing = listed(source_of("pair", tmp_path, "inputs", "targets"))
    assert {item.names for item in listing.items} == {
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


def test_annotated_images_need_all_their_annotations(tmp_path: Path) -> None:
    touch(tmp_path / "image", "a/1.jpg", "a/2.jpg", "a/3.jpg")
    touch(tmp_path / "depth", "a/1.png", "a/2.png")
    touch(tmp_path / "seg", "a/1.png", "a/3.png", "a/4.png")
    listing = listed(source_of("annotated", tmp_path, "image", "depth", "seg"))
    assert listing.items == [Item("a/1", ("image/a/1.jpg", "depth/a/1.png", "seg/a/1.png"), "a")]
    assert sorted(listing.bad) == [
        ("depth/a/2.png", "missing seg"),
        ("image/a/2.jpg", "missing seg"),
        ("image/a/3.jpg", "missing depth"),
        ("seg/a/3.png", "missing depth"),
        ("seg/a/4.png", "missing image"),
    ]


def test_classes_are_folders(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.jpg", "cat/2.jpg", "dog/1.jpg")
    listing = listed(source_of("category", tmp_path, "path"))
    assert [(item.stem, item.group) for item in listing.items] == [
        ("cat/1", "cat"),
        ("cat/2", "cat"),
        ("dog/1", "dog"),
    ]


def test_clips_are_folders_with_frames_in_natural_order_or_files_of_video(tmp_path: Path) -> None:
    touch(tmp_path, *(f"b/{i}.png" for i in range(11)), "a/x/0.png", "a/x/1.png", "lone/0.png")
    touch(tmp_path, "a/x.mp4", "a/x/2.mkv", "b/3.jpg")
    listing = listed(source_of("video", tmp_path, "path"))
    clips = {item.names for item in listing.items}
    assert clips == {
        tuple(f"b/{i}.png" if i != 3 else "b/3.jpg" for i in range(11)),
        ("a/x/0.png", "a/x/1.png"),
        ("a/x.mp4",),
        ("a/x/2.mkv",),
    }
    assert set(listing.bad) == {("lone/0.png", "clip too short"), ("b/3.png", "same name twice")}
    assert {item.stem for item in listing.items} == {"b", "a/x", "a/x/2"}


def test_frames_of_annotated_clips_need_each_other(tmp_path: Path) -> None:
    touch(tmp_path / "frames", *(f"c/{i}.jpg" for i in range(4)), "d/0.jpg", "d/1.jpg")
    touch(tmp_path / "depth", *(f"c/{i}.png" for i in (0, 2, 3)), "d/1.png")
    listing = listed(source_of("annotated_video", tmp_path, "frames", "depth"))
    assert listing.items == [
        Item(
            "c",
            (*(f"frames/c/{i}.jpg" for i in (0, 2, 3)), *(f"depth/c/{i}.png" for i in (0, 2, 3))),
        )
    ]
    assert sorted(listing.bad) == [
        ("depth/d/1.png", "clip too short"),
        ("frames/c/1.jpg", "missing depth"),
        ("frames/d/0.jpg", "missing depth"),
        ("frames/d/1.jpg", "clip too short"),
    ]
    assert listing.inputs == 10


def test_a_folder_of_images_alone_is_one_clip(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "2.png", "10.png")
    listing = listed(source_of("video", tmp_path, "path"))
    assert [item.names for item in listing.items] == [("1.png", "2.png", "10.png")]


def test_the_order_is_seeded_and_a_new_item_moves_no_other(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{i}.png" for i in range(50)))
    source = source_of("image", tmp_path, "path")

    def order(seed: int) -> list[str]:
        items = in_seeded_order(listed(source).items, source=source, seed=seed)
        return [item.stem for item in items]

    before = order(0)
    assert before != order(1) and sorted(before) == sorted(order(1))
    touch(tmp_path, "new.png")
    assert [stem for stem in order(0) if stem != "new"] == before


def test_splits_have_their_shares_and_do_not_depend_on_the_source() -> None:
    splits = {"val": 0.1, "test": 0.2}
    drawn = [split_of(f"item{i}", splits) for i in range(5000)]
    # 5 standard deviations of a binomial share at n = 5000
    assert abs(drawn.count("val") / 5000 - 0.1) < 5 * (0.1 * 0.9 / 5000) ** 0.5
    assert abs(drawn.count("test") / 5000 - 0.2) < 5 * (0.2 * 0.8 / 5000) ** 0.5
    without = [split_of(f"item{i}", {"val": 0.1}) for i in range(5000)]
    assert [d == "val" for d in drawn] == [w == "val" for w in without]


@pytest.mark.parametrize("ways", [("folder", "tar"), ("list", "parquet")])
def test_folders_and_tars_are_not_matched(tmp_path: Path, ways: tuple[str, str]) -> None:

    origins = {
        role: Origin(kind=way, path=tmp_path)  # type: ignore[arg-type]
        for role, way in zip(("inputs", "targets"), ways, strict=True)
    }
    with pytest.raises(InputError, match="some of its paths are folders or lists, others tars"):
        part_sets(Source(name="p", kind="pair", origins=origins))
