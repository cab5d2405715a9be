"""Metrics against scikit-image, scipy, and sums done by hand."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.color import rgb2lab
from torch import Tensor

from lvm.evaluation import scores
from tokenizer.cli import InputError


def grey(rows: list[list[float]]) -> Tensor:
    """One picture [1, 3, H, W] of grey values."""
    return torch.tensor(rows, dtype=torch.float64).expand(1, 3, -1, -1)


def painted(classes: Tensor, palette: Tensor) -> Tensor:
    """Classes [B, H, W] as pictures."""
    return palette[classes].movedim(-1, 1)


# Masks and segmentation


def test_iou_of_a_mask_by_hand():
    """Four pixels wanted, three found, two in both: 2/5 of the bright, 1 - … of the dark 11/14."""
    wanted, found = torch.zeros(1, 4, 4).long(), torch.zeros(1, 4, 4).long()
    wanted[0, 0] = 1
    found[0, 0, :2] = 1
    found[0, 1, 0] = 1
    counts = scores.confusion(found, wanted, 2)
    assert counts.tolist() == [[[11, 1], [2, 2]]]
    assert scores.iou(counts)[0].tolist() == pytest.approx([11 / 14, 2 / 5])
    assert float(scores.mean_iou(counts)) == pytest.approx((11 / 14 + 2 / 5) / 2)


def test_a_class_of_neither_picture_counts_for_nothing():
    counts = torch.tensor([[[4, 0, 0], [0, 0, 0], [2, 0, 2]]])
    assert scores.iou(counts)[0].isnan().tolist() == [False, True, False]
    assert float(scores.mean_iou(counts)) == pytest.approx((4 / 6 + 2 / 4) / 2)


def test_confusions_equal_a_loop(rng):
    found, wanted = (torch.randint(0, 5, (3, 6, 7), generator=rng) for _ in range(2))
    slow = torch.zeros(3, 5, 5).long()
    for b in range(3):
        for w, f in zip(wanted[b].flatten().tolist(), found[b].flatten().tolist(), strict=True):
            slow[b, w, f] += 1
    assert torch.equal(scores.confusion(found, wanted, 5), slow)
    both = [[(found[b].eq(k) & wanted[b].eq(k)).sum().item() for k in range(5)] for b in range(3)]
    either = [[(found[b].eq(k) | wanted[b].eq(k)).sum().item() for k in range(5)] for b in range(3)]
    torch.testing.assert_close(
        scores.iou(scores.confusion(found, wanted, 5)),
        torch.tensor(both, dtype=torch.float64) / torch.tensor(either, dtype=torch.float64),
    )


def test_the_miou_of_a_set_is_of_its_sums():
    """As PASCAL VOC has it: a picture without a class does not count as a whole miss of it."""
    counts = torch.tensor([[[8, 0], [0, 0]], [[2, 2], [2, 2]]])
    assert float(scores.mean_iou(counts.sum(0))) == pytest.approx((10 / 14 + 2 / 6) / 2)


def test_classes_by_brightness_and_by_colour():
    assert scores.by_threshold(grey([[0.2, 0.49, 0.51, 1.0]])).tolist() == [[[0, 0, 1, 1]]]
    assert scores.by_threshold(grey([[0.2, 0.49]]), 0.3).tolist() == [[[0, 1]]]
    palette = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    pixels = torch.tensor([[0.1, 0.1, 0.1], [0.6, 0.2, 0.1], [0.3, 0.2, 0.9], [0.49, 0.0, 0.0]])
    assert scores.by_palette(pixels.T[None, :, None], palette).tolist() == [[[0, 1, 2, 0]]]


PALETTE = torch.tensor(
    [(46, 139, 87), (72, 61, 160), (222, 135, 38), (150, 210, 245), (215, 30, 70)],
    dtype=torch.float64,
).div(255)  # fmt: skip


def test_a_palette_is_found_under_blur_and_noise(rng):
    """Areas of five colours whose borders a tokenizer smears: its blends are no colours."""
    coarse = torch.randint(0, 5, (12, 4, 4), generator=rng)
    images = painted(coarse.repeat_interleave(8, 1).repeat_interleave(8, 2), PALETTE)
    images = torch.from_numpy(ndimage.uniform_filter(images.numpy(), (1, 1, 3, 3)))
    images = (images + 0.01 * torch.randn(images.shape, generator=rng)).clamp(0, 1)
    found = scores.find_palette(images)
    assert len(found) == 5
    nearest = torch.cdist(PALETTE, found).min(1)
    assert nearest.values.max() < 0.06  # noise and blur move the mean of a cell by about this
    assert sorted(nearest.indices.tolist()) == [0, 1, 2, 3, 4]


def test_a_frequent_colour_between_two_others_is_one():
    """Black, grey and white in thirds; then with a rim of grey alone."""
    thirds = grey([[0.0, 0.5, 1.0]])
    assert sorted(scores.find_palette(thirds)[:, 0].tolist()) == [0.0, 0.5, 1.0]
    rim = grey([[0.0] * 49 + [0.5] + [1.0] * 50])
    assert sorted(scores.find_palette(rim)[:, 0].tolist()) == [0.0, 1.0]
    assert len(scores.find_palette(thirds, most=2)) == 2
    assert len(scores.find_palette(thirds, share=0.4)) == 1  # all are too rare: one at least


# Depth


def test_depth_by_hand():
    depth, wanted = grey([[0.2, 0.5, 0.8, 0.4]]), grey([[0.2, 0.4, 1.0, 0.6]])
    a, b = scores.depth_of(depth), scores.depth_of(wanted)
    assert float(scores.depth_rmse(a, b)) == pytest.approx(math.sqrt((0.01 + 0.04 + 0.04) / 4))
    # The larger over the smaller: 1, 1.25 (not below it, but for the last bit), 1.25, 1.5.
    assert float(scores.depth_delta(a, b, 1.26)) == pytest.approx(3 / 4)
    assert float(scores.depth_delta(a, b, 1.24)) == pytest.approx(1 / 4)
    assert float(scores.depth_of(grey([[0.0]]))) == pytest.approx(1 / 255)


def test_delta_is_the_same_for_inverse_depth(rng):
    a, b = (torch.rand(2, 5, 5, generator=rng, dtype=torch.float64) + 0.1 for _ in range(2))
    assert torch.equal(scores.depth_delta(a, b), scores.depth_delta(1 / a, 1 / b))
    assert torch.equal(scores.depth_delta(a, b), scores.depth_delta(3 * b, 3 * a))


def test_alignment_is_least_squares(rng):
    wanted = 0.3 + 0.4 * torch.rand(3, 6, 6, generator=rng, dtype=torch.float64)
    depth = wanted * -0.5 + 0.8  # upside down, shifted: one line away
    depth[2] += 0.05 * torch.randn(6, 6, generator=rng, dtype=torch.float64)
    aligned = scores.align(depth, wanted)
    torch.testing.assert_close(aligned[:2], wanted[:2], atol=1e-12, rtol=0)
    slope, shift = np.polyfit(depth[2].flatten().numpy(), wanted[2].flatten().numpy(), 1)
    torch.testing.assert_close(aligned[2], depth[2] * slope + shift, atol=1e-9, rtol=0)
    flat = scores.align(torch.full((1, 6, 6), 0.9).double(), wanted[:1])
    assert float(flat.mean()) == pytest.approx(float(wanted[0].mean()))


# Edges


def test_edges_by_hand():
    """A wanted column of four pixels; found: two in it, one beside it, three far off."""
    wanted, found = torch.zeros(1, 4, 8).bool(), torch.zeros(1, 4, 8).bool()
    wanted[0, :, 1] = True
    found[0, :2, 1] = True
    found[0, 3, 2] = True
    found[0, :3, 6] = True
    precision, recall, f = scores.edge_scores(found, wanted, 1.0)
    assert float(precision) == pytest.approx(3 / 6)
    # Of the column, rows 0 and 1 are found, row 2 is beside (1, 1), row 3 beside (3, 2).
    assert float(recall) == pytest.approx(1.0)
    assert float(f) == pytest.approx(2 * 0.5 / 1.5)
    precision, recall, f = scores.edge_scores(found, wanted, 0.5)
    assert (float(precision), float(recall)) == pytest.approx((2 / 6, 2 / 4))


@pytest.mark.parametrize("tolerance", [1.0, 1.5, 2.0, 3.2])
def test_near_is_a_distance(rng, tolerance):
    lines = torch.rand(2, 12, 15, generator=rng) < 0.05
    for found, one in zip(scores.near(lines, tolerance), lines, strict=True):
        distance = ndimage.distance_transform_edt(~one.numpy())
        assert np.array_equal(found.numpy(), distance <= tolerance)


def test_pictures_without_lines():
    none, some = torch.zeros(1, 4, 4).bool(), torch.zeros(1, 4, 4).bool()
    some[0, 0, 0] = True
    assert [float(x) for x in scores.edge_scores(none, none, 1.0)] == [1, 1, 1]
    assert [float(x) for x in scores.edge_scores(some, none, 1.0)] == [0, 0, 0]
    assert [float(x) for x in scores.edge_scores(none, some, 1.0)] == [0, 0, 0]


def test_lines_are_bright_or_dark():
    picture = grey([[0.0, 0.3, 0.6, 0.9]])
    assert scores.lines_of(picture, dark=False).tolist() == [[[False, False, True, True]]]
    assert scores.lines_of(picture, dark=True, level=0.2).tolist() == [[[True, *[False] * 3]]]


def test_the_tolerance_is_that_of_bsds_and_never_below_a_pixel():
    assert scores.edge_tolerance(32, 32) == 1.0
    assert scores.edge_tolerance(321, 481) == pytest.approx(4.337, abs=1e-3)


# Colours


def test_lab_equals_scikit_image(rng):
    images = torch.rand(2, 3, 5, 7, generator=rng, dtype=torch.float64)
    images[0, :, 0, 0] = 0.0
    images[0, :, 0, 1] = 1.0
    wanted = torch.from_numpy(rgb2lab(images.movedim(1, -1).numpy())).movedim(-1, 1)
    # Its white point and matrix have six digits, of a scale of 100.
    torch.testing.assert_close(scores.lab(images), wanted, atol=1e-3, rtol=0)


def test_chroma_does_not_see_light_on_grey(rng):
    a, b = (torch.rand(1, 1, 4, 4, generator=rng).expand(-1, 3, -1, -1) for _ in range(2))
    # A grey's a* and b* are 0 up to the six digits of the matrix.
    assert float(scores.chroma_mse(a, b)) < 1e-3
    assert float(scores.mse(a, b)) == pytest.approx(float((a - b).double().square().mean()))
    blue = b.clone()
    blue[:, 2] += 0.2
    wanted = rgb2lab(blue[0].movedim(0, -1).numpy())[..., 1:] ** 2
    assert float(scores.chroma_mse(blue, b)) == pytest.approx(wanted.mean(), rel=1e-3)


# Keypoints

SPOTS = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)


def spots(*places: tuple[int, int] | None) -> Tensor:
    """Spots of 3 × 3 pixels around places, in the colours of SPOTS, on a picture of 40 × 40."""
    classes = torch.zeros(1, 40, 40).long()
    for k, place in enumerate(places, 1):
        if place is not None:
            row, column = place
            classes[0, row - 1 : row + 2, column - 1 : column + 2] = k
    return painted(classes, SPOTS)


def test_keypoints_lie_at_the_centre_of_their_spots(rng):
    image = (spots((5, 6), None, (30, 20)) + 0.03 * torch.rand(3, 40, 40, generator=rng)).clamp(
        0, 1
    )
    found = scores.keypoints(image, SPOTS)[0]
    assert found[[0, 2]].tolist() == [[5, 6], [30, 20]]
    assert found[1].isnan().all()
    image[:, :, 36:, 36:] = 1.0  # white is of no keypoint, though nearest to one of their colours
    assert torch.equal(scores.keypoints(image, SPOTS)[0].nan_to_num(), found.nan_to_num())
    with pytest.raises(InputError, match="background"):
        scores.keypoints(image, SPOTS[:1])


def test_pck_by_hand():
    """The box of the wanted ones is 20 × 10, so near is 2 pixels at 0.1."""
    wanted = scores.keypoints(spots((10, 10), (30, 20), (10, 20)), SPOTS)
    found = scores.keypoints(spots((12, 10), (30, 23), None), SPOTS)
    assert float(scores.pck(found, wanted)) == pytest.approx(1 / 3)
    assert float(scores.pck(found, wanted, 0.15)) == pytest.approx(2 / 3)
    assert float(scores.pck(wanted, wanted)) == 1.0
    # One that is found though not wanted changes nothing.
    assert float(scores.pck(wanted, found, 0.2)) == pytest.approx(1.0)
    empty = torch.full((1, 3, 2), math.nan, dtype=torch.float64)
    assert scores.pck(wanted, empty).isnan().all()
    assert float(scores.pck(empty, wanted)) == 0.0
