"""Rendering: the same bytes twice, one map's death hurts no other, an unfinished work goes on."""

import json
import tomllib
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from examples import photos, walk
from examples.child import render_all, report_path
from examples.mix import write_mix
from examples.place import Look, Place, places, render
from examples.render import Render, main
from tokenizer.cli import InputError
from tokenizer.images import list_images, read_image
from visual_sentences.spec import load_spec

needs_vizdoom = pytest.mark.skipif(find_spec("vizdoom") is None, reason="vizdoom is not installed")
needs_photos = pytest.mark.skipif(not photos.names(), reason="scikit-image is not installed")
LOOK = Look(size=32, share=0.5, seed=0)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in list_images(folder)}


@needs_vizdoom
def test_a_map_rendered_twice_is_the_same_to_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    e1m1 = next(m for m in walk.all_maps() if m.name == "e1m1")
    place = Place(name="e1m1", split="train", frames=8, map=e1m1)
    reports = [render(place, LOOK, tmp_path / name) for name in ("a", "b")]
    assert reports[0] == reports[1] and reports[0]["frames"] == 8
    first = contents(tmp_path / "a")
    assert first == contents(tmp_path / "b")
    assert len(first) == sum(reports[0]["pictures"].values())


@needs_vizdoom
def test_frames_have_kinds_and_depth_that_fit_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    map01 = next(m for m in walk.all_maps() if m.name == "map01")
    (clip,) = walk.walks(map01, frames=8, seed=0, dropped=Counter())
    assert clip.rgb.shape == (8, 192, 192, 3)
    floor = clip.kinds == walk.Kind.FLOOR
    lower = np.arange(192) >= 96
    assert floor[:, lower].mean() > 0.1 and not floor[:, ~lower].any()
    # A level floor is nearer the lower it is seen: no wrap, whatever lies in front of it.
    near = [d[-1][f[-1]].mean() for d, f in zip(clip.depth, floor, strict=True) if f[-1].any()]
    assert near and max(near) < 20.0
    moved = np.abs(clip.rgb[1:].astype(int) - clip.rgb[:-1]).mean(axis=(1, 2, 3))
    assert (moved > 0.5).all()  # the player walks or turns between any two frames


@needs_vizdoom
def test_a_map_that_kills_its_process_is_counted_and_the_next_is_rendered(tmp_path: Path) -> None:
    deadly = walk.Map(name="deadly", game="freedoom2", lump="map01", scenario="no-such-scenario")
    room = next(m for m in walk.all_maps() if m.name == "mywayhome")
    todo = [
        Place(name="deadly", split="train", frames=8, map=deadly),
        Place(name="mywayhome", split="train", frames=8, map=room),
    ]
    (tmp_path / ".render").mkdir()
    ended: dict[str, str] = {}
    render_all(
        todo, LOOK, tmp_path, workers=1, finished=lambda place, how: ended.update({place.name: how})
    )
    assert ended["deadly"] and not ended["mywayhome"]
    assert report_path(tmp_path, todo[1]).is_file() and not report_path(tmp_path, todo[0]).is_file()
    assert len(list_images(tmp_path / "train" / "rgb")) == 8
    assert not list(tmp_path.glob("*.tmp-*"))


def test_every_eighth_map_is_held_out_and_all_frames_are_given_out() -> None:
    for frames, number in ((12_000, 72), (100, 8)):
        todo = places(frames, rendered=True)
        assert len(todo) == len({p.name for p in todo}) == number
        assert sum(p.frames for p in todo) == frames
        assert sum(p.split == "heldout" for p in todo) == number // 8


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A rendering of photographs, as made where there is no vizdoom."""
    out = tmp_path_factory.mktemp("stand-in") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("examples.render.find_spec", lambda name: None)
        main(Render(out=out, frames=144, photos=24, size=16, workers=1))
        yield out


@needs_photos
def test_photographs_stand_in_where_there_is_no_vizdoom(stand_in: Path) -> None:
    info = json.loads((stand_in / "render.json").read_text())
    assert info["options"]["source"] == "photographs"
    assert info["frames"] == {"train": 108, "heldout": 36}
    assert len(list_images(stand_in / "train" / "rgb")) == 108
    before = contents(stand_in)
    for task in info["tasks"]:  # every question has its answer, under the same name
        asked, answered = (
            {name.removeprefix(start) for name in before if name.startswith(start)}
            for start in (f"train/{task['inputs']}/", f"train/{task['targets']}/")
        )
        assert asked and asked == answered, task["name"]
    # A map that is missing is made again, to the byte, and nothing else is touched.
    (stand_in / "render.json").unlink()
    (stand_in / ".render" / "chelsea.json").unlink()
    for path in list_images(stand_in / "train" / "rgb"):
        if path.parent.name.startswith("chelsea"):
            path.unlink()
    main(Render(out=stand_in, frames=144, photos=24, size=16, workers=2))
    assert contents(stand_in) == before


@needs_photos
def test_a_folder_with_another_rendering_is_refused(stand_in: Path) -> None:
    with pytest.raises(InputError, match="size 16, now 32"):
        main(Render(out=stand_in, frames=144, photos=24, size=32))


@needs_photos
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_mix_names_folders_that_exist_and_the_build_reads_it(
    stand_in: Path, tmp_path: Path, split: str
) -> None:
    path = write_mix(
        stand_in,
        tmp_path / "mix.toml",
        split=split,  # type: ignore[arg-type]
        row_len=512,
        image_size=16,
    )
    raw = tomllib.loads(path.read_text())
    assert {s["kind"] for s in raw["source"]} == {"pair", "video", "image"}
    assert abs(sum(s["weight"] for s in raw["source"]) - 1.0) < 1e-4  # written to six places
    for source in load_spec(path).sources:
        for origin in source.origins.values():
            assert list_images(origin.path)


@needs_photos
def test_a_gliding_camera_moves_and_stays_on_the_photograph() -> None:
    clip = photos.glide("chelsea", frames=6, seed=0, clip=1)
    assert clip.shape == (6, photos.FULL, photos.FULL, 3)
    moved = np.abs(clip[1:].astype(int) - clip[:-1]).mean(axis=(1, 2, 3))
    assert (moved > 0).all()
    np.testing.assert_array_equal(clip, photos.glide("chelsea", frames=6, seed=0, clip=1))


@needs_photos
def test_crops_are_images_of_the_wanted_size(stand_in: Path) -> None:
    crops = list_images(stand_in / "train" / "photos")
    assert crops and read_image(crops[0], size=16).shape == (16, 16, 3)
    held_out = {p.parent.name for p in list_images(stand_in / "heldout" / "photos")}
    assert held_out == photos.HELD_OUT
