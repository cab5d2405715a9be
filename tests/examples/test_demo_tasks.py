"""The tasks' pictures: pure functions of arrays, checked on shapes drawn here."""

import io
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from examples import tasks
from examples.place import Look, drawn, png
from examples.tasks import Kind, Views
from examples.walk import LIMIT, kinds_of, mend


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def views(rng: np.random.Generator, *, n: int = 3, size: int = 16) -> Views:
    shape = (n, 48, 48)
    return Views(
        size=size,
        rgb=rng.integers(0, 256, (*shape, 3), dtype=np.uint8),
        depth=rng.integers(0, 256, shape, dtype=np.uint8),
        kinds=rng.integers(0, len(Kind), shape, dtype=np.uint8),
    )


def test_every_folder_of_every_task_can_be_painted(rng: np.random.Generator) -> None:
    scene = views(rng)
    for task in tasks.TASKS:
        for folder in (task.inputs, task.targets):
            if folder != tasks.questions(task.family):
                picture = tasks.paint(folder, scene)
                assert picture.shape == (3, 16, 16, 3) and picture.dtype == np.uint8, folder


def test_photographs_need_no_geometry(rng: np.random.Generator) -> None:
    photograph = Views(size=16, rgb=views(rng).rgb)
    posed = tasks.tasks_for(geometry=False)
    assert {task.family for task in posed} == {"edges", "colours"}
    for task in posed:
        if not task.targets.startswith("questions/"):
            assert tasks.paint(task.targets, photograph).shape == (3, 16, 16, 3)


def test_colour_tasks_undo_themselves(rng: np.random.Generator) -> None:
    rgb = rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(tasks.negative(tasks.negative(rgb)), rgb)
    np.testing.assert_array_equal(tasks.swap(tasks.swap(rgb)), rgb)
    np.testing.assert_array_equal(tasks.rotate(tasks.rotate(tasks.rotate(rgb))), rgb)
    np.testing.assert_array_equal(tasks.swap(rgb)[..., 0], rgb[..., 2])
    np.testing.assert_array_equal(tasks.rotate(rgb)[..., 0], rgb[..., 1])


def test_the_two_edge_tasks_are_complements(rng: np.random.Generator) -> None:
    scene = views(rng)
    white, black = tasks.paint("edges-white", scene), tasks.paint("edges-black", scene)
    np.testing.assert_array_equal(255 - white, black)
    assert white.max() > 0


def test_an_edge_is_drawn_where_two_colours_meet_and_nowhere_else() -> None:
    rgb = np.full((1, 64, 64, 3), 60, np.uint8)
    rgb[:, :, 32:, 2] = 200  # the same red and green: only one channel tells the halves apart
    lines = tasks.strokes(rgb, 16)[0]
    assert lines[:, 7:9].max(axis=1).min() > 128  # in every row, at the border
    assert lines[:, :6].max() == 0 and lines[:, 10:].max() == 0


def test_a_flat_picture_has_no_edges() -> None:
    assert tasks.strokes(np.full((1, 64, 64, 3), 90, np.uint8), 16).max() == 0


def test_kinds_have_colours_far_apart_and_every_palette_is_another_order() -> None:
    for palette in tasks.PALETTES.values():
        assert sorted(map(tuple, palette)) == sorted(map(tuple, tasks.COLOURS))
        far = np.abs(palette[:, None].astype(int) - palette[None]).sum(-1)
        assert far[~np.eye(len(Kind), dtype=bool)].min() > 100
    orders = {palette.tobytes() for palette in tasks.PALETTES.values()}
    assert len(orders) == len(tasks.PALETTES)


def test_segmentation_shows_only_colours_of_its_palette(rng: np.random.Generator) -> None:
    painted = tasks.paint("segment-b", views(rng)).reshape(-1, 3)
    assert set(map(tuple, painted)) <= set(map(tuple, tasks.PALETTES["segment-b"]))


def test_thin_objects_survive_shrinking_and_smaller_ones_do_not() -> None:
    kinds = np.full((1, 64, 64), Kind.WALL, np.uint8)
    kinds[:, 1:3, 2] = Kind.OBJECT  # 2 of the 16 parts of a pixel
    kinds[:, :, 20:22] = Kind.OBJECT  # half of a pixel
    seen = Views(size=16, rgb=np.zeros((1, 64, 64, 3), np.uint8), kinds=kinds).classes[0]
    assert (seen[:, 5] == Kind.OBJECT).all() and seen[0, 0] == Kind.WALL


def test_nearer_is_brighter_in_one_depth_task_and_darker_in_the_other() -> None:
    depth = np.broadcast_to(np.arange(64, dtype=np.uint8), (1, 64, 64))
    scene = Views(size=64, rgb=np.zeros((1, 64, 64, 3), np.uint8), depth=depth)
    warm = tasks.paint("depth-warm", scene)[0, 0].sum(-1).astype(int)
    cool = tasks.paint("depth-cool", scene)[0, 0].sum(-1).astype(int)
    assert (np.diff(warm) <= 0).all() and warm[0] > warm[-1]
    assert (np.diff(cool) >= 0).all() and cool[0] < cool[-1]


def test_shrinking_many_frames_at_once_equals_shrinking_each(rng: np.random.Generator) -> None:
    for size, rounding in ((16, 0), (10, 1)):  # 48 / 10 is not whole: weights are fixed-point
        rgb = views(rng).rgb
        alone = np.concatenate([tasks.shrink(rgb[i : i + 1], size) for i in range(3)])
        np.testing.assert_allclose(tasks.shrink(rgb, size).astype(int), alone, atol=rounding)


def test_our_png_files_are_read_back_unchanged(rng: np.random.Generator) -> None:
    picture = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    with Image.open(io.BytesIO(png(picture))) as image:
        image.verify()
    with Image.open(io.BytesIO(png(picture))) as image:
        np.testing.assert_array_equal(np.asarray(image), picture)


def test_share_chooses_a_stable_part_of_the_frames_for_each_family_by_itself() -> None:
    keys = [f"map{m:02d}-01/{i:03d}.png" for m in range(125) for i in range(16)]

    def part(family: str, share: float) -> set[str]:
        return {k for k in keys if drawn(k, family, Look(size=32, share=share, seed=0))}

    families = sorted({task.family for task in tasks.TASKS})
    halves = {family: part(family, 0.5) for family in families}
    for family, half in halves.items():
        assert part(family, 0.2) < half
        assert abs(len(half) - 1000) < 110  # five standard deviations of 2,000 fair coins
    for one, other in combinations(halves.values(), 2):
        assert abs(len(one & other) - 500) < 97  # the same for coins that fall once in four
    assert len(part("depth", 1.0)) == len(keys)


def test_a_wrapped_depth_near_the_eye_becomes_zero_and_a_far_one_stays() -> None:
    depth = np.full((1, 192, 4), 50, np.uint8)
    depth[:, 180:] = 193  # a floor at the bottom of the view, too near for the engine
    depth[:, 97:99] = 193  # a floor at the horizon, really far
    labels = np.ones_like(depth)
    labels[:, :, 3] = 0  # a wall
    mended = mend(depth, labels)
    assert (mended[:, 180:, :3] == 0).all() and (mended[:, 97:99] == 193).all()
    assert (mended[:, 180:, 3] == 193).all()


def test_sky_and_a_far_wall_are_told_apart_by_the_ceiling_above() -> None:
    labels = np.zeros((1, 192, 3), np.uint8)
    depth = np.full((1, 192, 3), LIMIT, np.uint8)
    labels[:, 120:], depth[:, 120:] = 1, 40  # floor
    labels[:, :80, 1], depth[:, :80, 1] = 1, 30  # a roof's edge, and the sky behind it
    labels[:, :80, 2], depth[:, :80, 2] = 1, 99  # a ceiling that goes on to a far wall
    labels[:, 60:70, 0] = 200  # something in the air
    kinds = kinds_of(labels, depth)[0]
    assert (kinds[:60, 0] == Kind.SKY).all() and (kinds[60:70, 0] == Kind.OBJECT).all()
    assert (kinds[:80, 1] == Kind.CEILING).all() and (kinds[80:96, 1] == Kind.SKY).all()
    assert (kinds[80:96, 2] == Kind.WALL).all()
    assert (kinds[120:] == Kind.FLOOR).all()
