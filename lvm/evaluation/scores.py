"""What an answer is worth: pure metrics of pictures, one value a picture.

Pictures are float [B, 3, H, W] in [0, 1]; values are fp64 [B], NaN where a metric says nothing
about a picture. PSNR and SSIM are in `tokenizer.metrics`, LPIPS and FID in its neighbours; which
metric judges which task, with which colours, is `lvm.evaluation.tasks`. K classes or keypoints.
"""

import math
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizer.cli import InputError

LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, as LVM makes its grey pictures
DARKEST = 1 / 255  # depth below one step of 8 bits counts as one: ratios need a number above 0
CELLS = 12  # a channel's cells in which colours are counted
WHITE = (0.95047, 1.0, 1.08883)  # D65, 2 degrees
SRGB_TO_XYZ = (
    (0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227)
)  # fmt: skip


def luminance(images: Tensor) -> Tensor:
    """Return fp64 [B, H, W] in [0, 1]."""
    weights = torch.tensor(LUMA, dtype=torch.float64, device=images.device)
    return torch.einsum("bchw,c->bhw", images.double(), weights / weights.sum())


def mse(images: Tensor, targets: Tensor) -> Tensor:
    """Return the mean squared difference over pixels and channels, as LVM's scripts do."""
    return (images.double() - targets.double()).square().mean(dim=(1, 2, 3))


# Masks and segmentation: pictures to classes, classes to intersections over unions.


def by_threshold(images: Tensor, level: float = 0.5) -> Tensor:
    """Return classes int64 [B, H, W]: 1 where a pixel is brighter than `level`, else 0."""
    return (luminance(images) > level).long()


def by_palette(images: Tensor, palette: Tensor) -> Tensor:
    """Return classes int64 [B, H, W]: the nearest of the colours palette [K, 3] in RGB."""
    pixels = images.double().permute(0, 2, 3, 1)
    return torch.cdist(pixels, palette.double().to(images.device)).argmin(-1)


def find_palette(
    images: Tensor, *, most: int = 32, share: float = 0.004, apart: float = 0.25
) -> Tensor:
    """Return the colours [K, 3] that pictures are painted in, the most frequent first, K >= 1.

    For maps of a few flat colours whose palette nobody gave. Colours are counted in cells of 1/12 a
    channel; the fullest cell's mean is a colour if it has at least `share` of the pixels and lies
    `apart` or more (Euclidean, RGB in [0, 1]) from those found before. A colour on the line between
    two of them is what a tokenizer blurs where areas meet: it needs ten times the share.
    """
    pixels = images.double().permute(0, 2, 3, 1).reshape(-1, 3)
    cells = (pixels * CELLS).long().clamp(0, CELLS - 1)
    index = (cells[:, 0] * CELLS + cells[:, 1]) * CELLS + cells[:, 2]
    counts = torch.bincount(index, minlength=CELLS**3)
    found: list[Tensor] = []
    for cell in counts.argsort(descending=True, stable=True).tolist():
        rare = counts[cell] < max(1, share * len(pixels))
        if len(found) == most or (rare and found):
            break
        colour = pixels[index == cell].mean(0)
        if any((colour - other).norm() < apart for other in found):
            continue
        if counts[cell] >= 10 * share * len(pixels) or not _between(colour, found):
            found.append(colour)
    return torch.stack(found)


def _between(colour: Tensor, found: list[Tensor], within: float = 0.12) -> bool:
    """Whether a colour lies on the line between two of those found."""
    for a, b in combinations(found, 2):
        along = ((colour - a) @ (b - a) / (b - a).square().sum()).clamp(0, 1)
        if (colour - a - along * (b - a)).norm() < within:
            return True
    return False


def confusion(found: Tensor, wanted: Tensor, classes: int) -> Tensor:
    """Return pixel counts int64 [B, K, K] of classes [B, H, W]: wanted down, found across."""
    batch = torch.arange(len(found), device=found.device).view(-1, 1, 1)
    index = (batch * classes + wanted) * classes + found
    counts = torch.bincount(index.flatten(), minlength=len(found) * classes * classes)
    return counts.view(-1, classes, classes)


def iou(counts: Tensor) -> Tensor:
    """Return intersection over union fp64 [..., K] of confusions [..., K, K]; NaN for a class that
    neither picture has."""
    both = counts.diagonal(dim1=-2, dim2=-1).double()
    return both / (counts.sum(-1) + counts.sum(-2) - both)


def mean_iou(counts: Tensor) -> Tensor:
    """Return the mean over the classes that either picture has, fp64 [...].

    Of one picture's confusion the mean of that picture; of their sum over a set, the mIoU of
    segmentation benchmarks.
    """
    return iou(counts).nanmean(-1)


# Depth: a grey value is the depth, or its inverse, up to a factor.


def depth_of(images: Tensor) -> Tensor:
    """Return depth fp64 [B, H, W] in (0, 1]: the luminance, at least one step of 8 bits.

    Maps store nearness or distance in a unit of their own; both pictures are read alike, so the
    unit drops out of ratios. Colour ramps whose luminance rises or falls all along serve too.
    """
    return luminance(images).clamp_min(DARKEST)


def align(depth: Tensor, wanted: Tensor) -> Tensor:
    """Return a·depth + b with the a and b of each picture that fit `wanted` best (least squares).

    As for monocular depth that is known up to scale and shift (Ranftl et al., MiDaS, 2020). A flat
    picture becomes the mean of `wanted`. The result is kept within (0, 1].
    """
    x, y = depth.flatten(1), wanted.flatten(1)
    mx, my = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
    spread = (x - mx).square().sum(1, keepdim=True)
    factor = torch.where(
        spread > 1e-12, ((x - mx) * (y - my)).sum(1, keepdim=True) / spread.clamp_min(1e-12), 0.0
    )
    return (factor * (x - mx) + my).clamp(DARKEST, 1.0).view_as(depth)


def depth_rmse(depth: Tensor, wanted: Tensor) -> Tensor:
    """Return the root of the mean squared error, in shares of the map's full range."""
    return (depth - wanted).square().mean(dim=(1, 2)).sqrt()


def depth_delta(depth: Tensor, wanted: Tensor, limit: float = 1.25) -> Tensor:
    """Return the share of pixels where the larger of both is less than `limit` times the smaller.

    The same for depth and inverse depth (Eigen et al. 2014: δ < 1.25).
    """
    return (torch.maximum(depth / wanted, wanted / depth) < limit).double().mean(dim=(1, 2))


# Edges: lines match lines that are near.


def lines_of(images: Tensor, *, dark: bool, level: float = 0.5) -> Tensor:
    """Return where a line is, bool [B, H, W]: brighter than `level`, or darker for `dark` lines."""
    bright = luminance(images)
    return bright < level if dark else bright > level


def edge_tolerance(height: int, width: int) -> float:
    """Return 0.0075 of the diagonal, as BSDS has it, but at least one pixel."""
    return max(1.0, 0.0075 * math.hypot(height, width))


def edge_scores(found: Tensor, wanted: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return precision, recall and their harmonic mean F of lines bool [B, H, W].

    A pixel of a line counts as right if the other picture has one within `tolerance` pixels
    (Euclidean). Unlike BSDS (Martin et al. 2004) two pixels may match the same one, and lines are
    neither thinned nor thresholded at many levels. Without lines in either picture all three are 1,
    in one of them 0.
    """
    near_wanted, near_found = near(wanted, tolerance), near(found, tolerance)

    def share(lines: Tensor, hit: Tensor) -> Tensor:
        count = lines.sum(dim=(1, 2)).double()
        return torch.where(
            count > 0, (lines & hit).sum(dim=(1, 2)).double() / count.clamp_min(1), 0
        )

    precision, recall = share(found, near_wanted), share(wanted, near_found)
    blank = ~(found.flatten(1).any(1) | wanted.flatten(1).any(1))
    precision, recall = precision.masked_fill(blank, 1.0), recall.masked_fill(blank, 1.0)
    both = precision + recall
    f = torch.where(both > 0, 2 * precision * recall / both.clamp_min(1e-12), 0.0)
    return precision, recall, f


def near(lines: Tensor, distance: float) -> Tensor:
    """Return the pixels, bool [B, H, W], within `distance` of a line."""
    reach = int(distance)
    offsets = torch.arange(-reach, reach + 1, device=lines.device)
    disc = (offsets[:, None].square() + offsets[None].square() <= distance**2).float()
    return F.conv2d(lines.float()[:, None], disc[None, None], padding=reach)[:, 0] > 0.5


# Colours.


def lab(images: Tensor) -> Tensor:
    """Return CIE L*a*b* (D65) fp64 [B, 3, H, W] of sRGB pictures."""
    rgb = images.double()
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055).pow(2.4), rgb / 12.92)
    matrix = torch.tensor(SRGB_TO_XYZ, dtype=torch.float64, device=images.device)
    white = torch.tensor(WHITE, dtype=torch.float64, device=images.device)
    xyz = torch.einsum("bchw,dc->bdhw", linear, matrix / white[:, None])
    f = torch.where(xyz > (6 / 29) ** 3, xyz.clamp_min(1e-12).pow(1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = f.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def chroma_mse(images: Tensor, targets: Tensor) -> Tensor:
    """Return the mean squared error of a* and b*: of the colours, not of the light."""
    return (lab(images)[:, 1:] - lab(targets)[:, 1:]).square().mean(dim=(1, 2, 3))


# Keypoints, drawn as spots.


def keypoints(images: Tensor, palette: Tensor, *, within: float = 0.35) -> Tensor:
    """Return where each keypoint is drawn, fp64 [B, K-1, 2] as (row, column); NaN where it is not.

    palette [K, 3] is the background's colour and then one colour a keypoint. A keypoint lies at the
    centroid of the pixels nearest to its colour and no further than `within` from it. So one figure
    a picture, a colour a keypoint, and nothing else drawn in these colours are assumed; lines of a
    skeleton in colours of their own belong to the palette.
    """
    if len(palette) < 2:
        raise InputError(
            "keypoints need a background colour and at least one of their own; give them as "
            "--task SOURCE=keypoints:#background,#first,…"
        )
    pixels = images.double().permute(0, 2, 3, 1)
    distance, nearest = torch.cdist(pixels, palette.double().to(images.device)).min(-1)
    own = torch.arange(1, len(palette), device=images.device).view(1, -1, 1, 1)
    mine = ((nearest[:, None] == own) & (distance <= within)[:, None]).double()
    rows = torch.arange(images.shape[2], dtype=torch.float64, device=images.device)
    columns = torch.arange(images.shape[3], dtype=torch.float64, device=images.device)
    count = mine.sum((2, 3))
    return torch.stack(
        [(mine.sum(3) * rows).sum(2) / count, (mine.sum(2) * columns).sum(2) / count], dim=-1
    )


def pck(found: Tensor, wanted: Tensor, alpha: float = 0.1) -> Tensor:
    """Return the share of the wanted keypoints [B, K, 2] that are found near enough.

    Near enough is alpha times the longer side of the box around the wanted keypoints (PCK of Yang
    and Ramanan, 2013; PCK@0.1 in LVM), but at least one pixel. One that is not found is wrong; NaN
    for a picture in which none is wanted.
    """
    there = wanted.isfinite().all(-1)
    low = wanted.nan_to_num(torch.inf).amin(1)
    high = wanted.nan_to_num(-torch.inf).amax(1)
    reach = ((high - low).amax(1) * alpha).clamp_min(1.0)
    close = (found - wanted).norm(dim=-1) <= reach[:, None]  # False where either is NaN
    return (close & there).sum(1).double() / there.sum(1)
