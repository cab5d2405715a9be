"""The words of edits, the pixels they make, and how the random ones are spread."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, chisquare, kstest

from visual_sentences.edits import (
    GRID,
    cut_of,
    joined,
    name_of,
    paint,
    picture_of,
    random_cut,
    random_mask,
    words_of,
)
from visual_sentences.sentence import Picture

# The seeds are fixed, so each outcome is as well. A right sampler is below this for one choice of
# seeds in 10,000; with 4,000 draws a rate of 0.35 in place of 0.3 has p = 5e-12.
LEAST_P = 1e-4
DRAWS = 4000


def holes(size: int) -> np.ndarray:
    """Return int [m, 3] of (x, y, side) of the holes among many masks."""
    masks = [random_mask(size, 0, "s", f"item{i}") for i in range(DRAWS)]
    return np.array([list(map(int, m.split()[1:])) for m in masks if m.startswith("hole")])


@pytest.fixture(scope="module")
def cuts() -> list[str]:
    return [random_cut(0, "s", f"item{i}", 1) for i in range(DRAWS)]


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("key", "name", "words"),
    [
        ("3/17.jpg", "3/17.jpg", ""),
        ("3/17.jpg|gray", "3/17.jpg", "gray"),
        ("a.mp4#000012|crop 0.1 0 0.8 1 flip", "a.mp4#000012", "crop 0.1 0 0.8 1 flip"),
        ("a.png|crop 0 0 1 1 flip hole 3 0 12", "a.png", "crop 0 0 1 1 flip hole 3 0 12"),
        ("a.png|patches 80c0000000000001", "a.png", "patches 80c0000000000001"),
        ("a|b.png", "a|b.png", ""),
        ("a|gray.png", "a|gray.png", ""),
        ("gray|b.png|gray", "gray|b.png", "gray"),
        ("a.png|flip|gray", "a.png|flip", "gray"),
        ("a.png|hole 1 2", "a.png|hole 1 2", ""),
        ("a.png|gray flip", "a.png|gray flip", ""),
        ("a.png|gray hole 1 2 3", "a.png|gray hole 1 2 3", ""),
        ("a.png|crop 0 0 2 1", "a.png|crop 0 0 2 1", ""),
        ("a.png|patches 80C0000000000001", "a.png|patches 80C0000000000001", ""),
        ("a.png| gray", "a.png| gray", ""),
        ("a.png|", "a.png|", ""),
        ("gray", "gray", ""),
        ("|gray", "|gray", ""),
    ],
)
def test_only_a_tail_of_known_words_is_an_edit(key: str, name: str, words: str) -> None:
    assert (name_of(key), words_of(key)) == (name, words)
    assert picture_of(key).key == key


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=12), st.integers(0, 2**64), st.booleans(), st.booleans())
def test_a_key_gives_back_the_picture(name: str, seed: int, cut: bool, mask: bool) -> None:
    edit = joined(random_cut(seed) if cut else "", random_mask(64, seed) if mask else "")
    picture = Picture(f"{name}.png", edit)
    assert picture_of(picture.key) == picture


def test_a_cut_is_what_precedes_the_resizing() -> None:
    assert cut_of("") == (None, False)
    assert cut_of("gray") == (None, False)
    assert cut_of("flip") == (None, True)
    assert cut_of("crop 0.25 0 0.5 1 flip hole 1 2 3") == ((0.25, 0.0, 0.5, 1.0), True)


def test_words_that_are_no_edit_stop_the_build() -> None:
    with pytest.raises(AssertionError, match="no edit: 'blur 3'"):
        paint(np.zeros((8, 8, 3), np.uint8), "blur 3")


def test_gray_is_the_exact_luma_to_the_nearest_whole_number(pixels: np.ndarray) -> None:
    weights = [Fraction("0.2989"), Fraction("0.587"), Fraction("0.114")]
    found = paint(pixels, "gray")
    for rgb, gray in zip(pixels.reshape(-1, 3).tolist(), found.reshape(-1, 3), strict=True):
        exact = sum(weight * value for weight, value in zip(weights, rgb, strict=True))
        assert gray.tolist() == [round(exact)] * 3  # round() of a Fraction is exact, half to even
    assert paint(np.full((1, 1, 3), 255, np.uint8), "gray").tolist() == [[[255] * 3]]


def test_a_hole_is_black_and_nothing_else_is(pixels: np.ndarray) -> None:
    pixels = np.maximum(pixels, 1)
    before = pixels.copy()
    black = (paint(pixels, "hole 5 9 4") == 0).all(-1)
    wanted = np.zeros((32, 32), bool)
    wanted[9:13, 5:9] = True
    assert (black == wanted).all()
    assert (paint(pixels, "hole 5 9 4")[~wanted] == before[~wanted]).all()
    assert (pixels == before).all(), "the whole image is encoded too"


def test_patches_are_kept_as_drawn(pixels: np.ndarray) -> None:
    pixels = np.maximum(pixels, 1)
    found = paint(pixels, "patches 80c0000000000001")
    kept = np.zeros((32, 32), bool)
    for row, column in ((0, 0), (1, 0), (1, 1), (7, 7)):
        kept[row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] = True
    assert (found[kept] == pixels[kept]).all()
    assert (found[~kept] == 0).all()


@pytest.mark.parametrize("size", [8, 30, 33, 100])
def test_patches_of_any_size_cover_the_image_once(size: int) -> None:
    white = np.full((size, size, 3), 255, np.uint8)
    alone = [paint(white, f"patches {1 << bit:016x}").astype(int) // 255 for bit in range(64)]
    assert (np.sum(alone, axis=0) == 1).all()
    sides = {int(one[..., 0].any(axis).sum()) for one in alone for axis in (0, 1)}
    assert sides <= {size // GRID, -(-size // GRID)}


def test_an_edit_without_paint_leaves_the_pixels(pixels: np.ndarray) -> None:
    for edit in ("", "flip", "crop 0 0 0.5 0.5", "patches ffffffffffffffff"):
        assert (paint(pixels, edit) == pixels).all()


def test_edits_depend_on_their_seed_alone() -> None:
    for make in (lambda *parts: random_mask(64, *parts), random_cut):
        assert make(0, "s", "a", 1) == make(0, "s", "a", 1)
        seeds = [
            (s, name, stem, n) for s in (0, 1) for name in "st" for stem in "ab" for n in (1, 2)
        ]
        assert len({make(*parts) for parts in seeds}) == len(seeds)


def test_cuts_stay_inside_and_keep_their_area_and_ratio(cuts: list[str]) -> None:
    for edit in cuts:
        box, _ = cut_of(edit)
        assert box is not None
        left, top, width, height = box
        assert left >= 0 and left + width <= 1 and top >= 0 and top + height <= 1
        # Four decimals: a side is off by 5e-5 at most, its area and ratio by some of these.
        assert 0.35 - 2e-4 <= width * height <= 1
        assert 3 / 4 - 4e-4 <= width / height <= 4 / 3 + 4e-4


def test_cuts_are_spread_as_described(cuts: list[str]) -> None:
    boxes = np.array([cut_of(edit)[0] for edit in cuts])
    left, top, width, height = boxes.T
    assert kstest((width * height - 0.35) / 0.65, "uniform").pvalue > LEAST_P
    flips = sum(cut_of(edit)[1] for edit in cuts)
    assert chisquare([flips, DRAWS - flips]).pvalue > LEAST_P
    for place, side in ((left, width), (top, height)):
        free = side < 0.9  # the place in a narrow gap is too coarse, at four decimals, for the test
        assert kstest(place[free] / (1 - side[free]), "uniform").pvalue > LEAST_P
    # Below 3/4 of the area every ratio fits, above it the range is narrower, about 1 all the same.
    any_ratio = width * height < 3 / 4
    spread = np.log(width / height)[any_ratio] / np.log(4 / 3) / 2 + 0.5
    assert kstest(spread, "uniform").pvalue > LEAST_P


def test_a_mask_is_one_hole_in_three_tenths() -> None:
    found = len(holes(32))
    assert chisquare([found, DRAWS - found], [0.3 * DRAWS, 0.7 * DRAWS]).pvalue > LEAST_P


def test_holes_have_lvms_sides_and_any_place() -> None:
    x, y, side = holes(256).T
    assert side.min() >= 25 and side.max() <= 127
    # 103 sides, about 1,200 holes: 11.6 each, enough for the chi-square distribution.
    assert chisquare(np.bincount(side - 25, minlength=103)).pvalue > LEAST_P
    for place in (x, y):
        assert (place + side <= 256).all()
        # Pixels are discrete: the middle of each makes the share of the free way uniform.
        assert kstest((place + 0.5) / (257 - side), "uniform").pvalue > LEAST_P
    x, y, side = holes(32).T
    assert set(side.tolist()) == set(range(3, 16))
    assert (x == 0).any() and (x + side == 32).any() and (y == 0).any() and (y + side == 32).any()


def test_patches_are_kept_at_a_uniform_rate_in_any_place() -> None:
    masks = [random_mask(64, 1, "s", f"item{i}") for i in range(DRAWS)]
    bits = [bin(int(m.split()[1], 16))[2:].zfill(64) for m in masks if m.startswith("patches")]
    kept = np.array([[int(bit) for bit in row] for row in bits])
    # The sum of 64 draws of one probability that is uniform in 0 … 1 is uniform in 0 … 64.
    assert chisquare(np.bincount(kept.sum(1), minlength=65)).pvalue > LEAST_P
    # Given the share r of a mask that is kept, all places are alike: drawn without return, their
    # sums have 63 degrees of freedom, with a variance of r(1 - r) · 64/63 a mask in each.
    rate = kept.mean(1)
    variance = (rate * (1 - rate)).sum() * 64 / 63
    deviation = ((kept.sum(0) - rate.sum()) ** 2).sum() / variance
    assert chi2.sf(deviation, 63) > LEAST_P
