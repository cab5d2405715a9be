"""Images as sequences of patches: cut, ordered, placed, masked.

B images, N patches of P pixels a side, C = 3·P² values a patch. Orders and masks follow AIM
(El-Nouby et al. 2024, sections 3 and 4.2) and, for blocks, XTRA (Amrani et al. 2024).
"""

import math

import numpy as np
import torch
from torch import Tensor

from lvm.config import Patches

EPS = 1e-6  # under the root of a patch's variance


def normalise(images: Tensor, patches: Patches) -> Tensor:
    """Return fp32 [B, 3, H, W] as the model reads pixels; from uint8, or float in [0, 1]."""
    scale = 1 / 255 if images.dtype == torch.uint8 else 1.0
    mean = torch.tensor(patches.pixel_mean, device=images.device).view(3, 1, 1)
    std = torch.tensor(patches.pixel_std, device=images.device).view(3, 1, 1)
    return (images.float() * scale - mean) / std


def patchify(images: Tensor, size: int) -> Tensor:
    """Return patches [B, N, C] in raster order, the values of each in (row, column, channel) order.

    images [B, 3, H, W]; H and W are multiples of `size`.
    """
    batch, channels, height, width = images.shape
    grid = images.reshape(batch, channels, height // size, size, width // size, size)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, size * size * channels)


def unpatchify(patches: Tensor, size: int) -> Tensor:
    """Undo `patchify` of square images."""
    batch, count, _ = patches.shape
    side = math.isqrt(count)
    grid = patches.reshape(batch, side, side, size, size, 3).permute(0, 5, 1, 3, 2, 4)
    return grid.reshape(batch, 3, side * size, side * size)


def pixel_targets(images: Tensor, size: int) -> Tensor:
    """Return the patches [B, N, C] of normalised images, each of mean 0 and unbiased variance 1."""
    patches = patchify(images, size)
    centred = patches - patches.mean(-1, keepdim=True)
    return centred / (patches.var(-1, keepdim=True) + EPS).sqrt()


def sincos(width: int, height: int, *, dim: int, device: torch.device | None = None) -> Tensor:
    """Return the fixed 2-D table fp32 [height·width, dim]: the column in the first half of the
    channels, the row in the second, each sines and then cosines of dim/4 frequencies."""
    freq = 10_000.0 ** -(torch.arange(dim // 4, device=device, dtype=torch.float64) / (dim // 4))
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    parts = [place[:, None] * freq for place in (columns, rows)]
    return torch.cat([f(x) for x in parts for f in (torch.sin, torch.cos)], dim=1).float()


def sequence(patches: Patches) -> np.ndarray:
    """Return int64 [N]: which patch, by raster index, stands at each place of the sequence.

    spiral        from the centre outwards
    checkerboard  one colour of the board in raster order, then the other
    random        one permutation for all images, of a fixed seed
    blocks        block after block in raster order, each in raster order itself
    """
    side, count = patches.side, patches.count
    raster = np.arange(count)
    row, column = raster // side, raster % side
    if patches.block > 1:
        b = patches.block
        return np.lexsort((column % b, row % b, column // b, row // b))
    if patches.order == "spiral":
        return _spiral(side)
    if patches.order == "checkerboard":
        return np.lexsort((raster, (row + column) % 2))
    if patches.order == "random":
        return np.random.default_rng(0).permutation(count)
    return raster


def _spiral(side: int) -> np.ndarray:
    """Walk down, left, up, right in runs of 1, 1, 2, 2, 3, 3, … from the upper right of the middle.

    On 16 x 16 that is 120, 136, 135, 119, 103, 104, …, as in Apple's ml-l3m.
    """
    row, column = (side - 1) // 2, side // 2
    order, run, turn = [row * side + column], 1, 0
    steps = ((1, 0), (0, -1), (-1, 0), (0, 1))  # down, left, up, right
    while len(order) < side * side:
        for _ in range(2):
            for _ in range(run):
                row, column = row + steps[turn % 4][0], column + steps[turn % 4][1]
                if 0 <= row < side and 0 <= column < side:
                    order.append(row * side + column)
            turn += 1
        run += 1
    return np.array(order)


def reading_order(prefix: Tensor, patches: Patches) -> Tensor:
    """Return `block` of the mask rule, int32 [B, N], from prefix lengths [B] (0: none).

    Places of one prefix, or of one block of patches, share a number; else it counts up.
    """
    place = torch.arange(patches.count, device=prefix.device)[None, :]
    if patches.block > 1:
        return (place // patches.step).int().expand(len(prefix), -1).contiguous()
    return torch.where(place < prefix[:, None], 0, place).int()


def scored(prefix: Tensor, patches: Patches) -> Tensor:
    """Return bool [B, N]: which places predict the patch `step` places ahead of them.

    A patch of the prefix is never predicted; that after it is, by the prefix's last place.
    """
    ahead = torch.arange(patches.count, device=prefix.device)[None, :] + patches.step
    return (ahead < patches.count) & (ahead >= prefix[:, None])
