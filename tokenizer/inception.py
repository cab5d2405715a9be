"""Inception v3 as the Fréchet Inception distance defines it: uint8 images to 2048 features.

FID is not a property of "an Inception": it is measured with the TensorFlow graph of 2015-12-05
(Heusel et al., "GANs trained by a two time-scale update rule", 2017). What sets that graph apart
from torchvision's network is kept here, as pytorch-fid and torch-fidelity keep it:
- pixels resized to 299 by TensorFlow 1's bilinear rule, with neither half-pixel centres nor
  antialiasing, then (x − 128) / 128 in place of ImageNet's mean and deviation;
- average pools that do not count their padding, and a max pool in the very last block;
- 1008 classes. They are not computed here.

Weights by path: pytorch-fid's `pt_inception-2015-12-05-6726825d.pth`, which is torch-fidelity's
`weights-inception-2015-12-05-6726825d.pth`. The tensor names are those of that file.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizer.cli import InputError
from tokenizer.formats.checkpoint import read_tensors
from tokenizer.formats.shapes import check_tensors

SIDE, FEATURES = 299, 2048


class Conv(NamedTuple):
    """A convolution of a block: its name there, width, kernel (height, width) and stride."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


Branch = tuple[Conv | tuple[Conv, Conv], ...]  # one after the other; a pair runs side by side


class ConvNorm(nn.Module):
    """Convolution, batch norm with its stored moments, ReLU."""

    def __init__(self, width_in: int, layer: Conv, *, padded: bool) -> None:
        super().__init__()
        height, width = layer.kernel
        padding = (height // 2, width // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(
            width_in, layer.width, layer.kernel, layer.stride, padding, bias=False
        )
        self.bn = nn.BatchNorm2d(layer.width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side and a pooled one after them, joined over channels.

    `pool` is "avg" or "max", followed by a 1×1 convolution of width `pooled`; or "halve", a max
    pool of stride 2 alone, beside branches whose last convolution has stride 2 too.
    """

    def __init__(self, width: int, *branches: Branch, pool: str, pooled: int = 0) -> None:
        super().__init__()
        self.pool, self.branches = pool, branches
        for branch in branches:
            width_in = width
            for step in branch:
                for layer in alike(step):
                    block = ConvNorm(width_in, layer, padded=layer.stride == 1)
                    self.add_module(layer.name, block)
                width_in = sum(layer.width for layer in alike(step))
        if pooled:
            self.branch_pool = ConvNorm(width, Conv("branch_pool", pooled), padded=True)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for branch in self.branches:
            y = x
            for step in branch:
                y = torch.cat([self.get_submodule(layer.name)(y) for layer in alike(step)], dim=1)
            found.append(y)
        if self.pool == "halve":
            found.append(F.max_pool2d(x, 3, stride=2))
        elif self.pool == "max":
            found.append(self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1)))
        else:
            even = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
            found.append(self.branch_pool(even))
        return torch.cat(found, dim=1)


def alike(step: Conv | tuple[Conv, Conv]) -> tuple[Conv, ...]:
    return (step,) if isinstance(step, Conv) else step


def block_5(width: int, pooled: int) -> Mixed:
    """35×35 places: 1×1, 5×5, two 3×3, pool."""
    return Mixed(
        width,
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))),
        (
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, (3, 3)),
            Conv("branch3x3dbl_3", 96, (3, 3)),
        ),
        pool="avg",
        pooled=pooled,
    )


def block_6(inner: int) -> Mixed:
    """17×17 places: 1×1, one and two 7×7 cut into 1×7 and 7×1, pool."""
    return Mixed(
        768,
        (Conv("branch1x1", 192),),
        (
            Conv("branch7x7_1", inner),
            Conv("branch7x7_2", inner, (1, 7)),
            Conv("branch7x7_3", 192, (7, 1)),
        ),
        (
            Conv("branch7x7dbl_1", inner),
            Conv("branch7x7dbl_2", inner, (7, 1)),
            Conv("branch7x7dbl_3", inner, (1, 7)),
            Conv("branch7x7dbl_4", inner, (7, 1)),
            Conv("branch7x7dbl_5", 192, (1, 7)),
        ),
        pool="avg",
        pooled=192,
    )


def block_7(width: int, pool: str) -> Mixed:
    """8×8 places: 1×1, and 3×3 fanned out into 1×3 beside 3×1, pool."""

    def fan(name: str) -> tuple[Conv, Conv]:
        return Conv(f"{name}a", 384, (1, 3)), Conv(f"{name}b", 384, (3, 1))

    return Mixed(
        width,
        (Conv("branch1x1", 320),),
        (Conv("branch3x3_1", 384), fan("branch3x3_2")),
        (
            Conv("branch3x3dbl_1", 448),
            Conv("branch3x3dbl_2", 384, (3, 3)),
            fan("branch3x3dbl_3"),
        ),
        pool=pool,
        pooled=192,
    )


class Inception(nn.Module):
    """uint8 [B, 3, H, W] to fp32 [B, 2048], the mean over places of the last block."""

    def __init__(self) -> None:
        super().__init__()
        kernel = (3, 3)
        self.Conv2d_1a_3x3 = ConvNorm(3, Conv("", 32, kernel, 2), padded=False)
        self.Conv2d_2a_3x3 = ConvNorm(32, Conv("", 32, kernel), padded=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, Conv("", 64, kernel), padded=True)
        self.Conv2d_3b_1x1 = ConvNorm(64, Conv("", 80), padded=False)
        self.Conv2d_4a_3x3 = ConvNorm(80, Conv("", 192, kernel), padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = (
            block_5(width, pooled) for width, pooled in ((192, 32), (256, 64), (288, 64))
        )
        self.Mixed_6a = Mixed(
            288,
            (Conv("branch3x3", 384, kernel, 2),),
            (
                Conv("branch3x3dbl_1", 64),
                Conv("branch3x3dbl_2", 96, kernel),
                Conv("branch3x3dbl_3", 96, kernel, 2),
            ),
            pool="halve",
        )
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (
            block_6(inner) for inner in (128, 160, 160, 192)
        )
        self.Mixed_7a = Mixed(
            768,
            (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, kernel, 2)),
            (
                Conv("branch7x7x3_1", 192),
                Conv("branch7x7x3_2", 192, (1, 7)),
                Conv("branch7x7x3_3", 192, (7, 1)),
                Conv("branch7x7x3_4", 192, kernel, 2),
            ),
            pool="halve",
        )
        self.Mixed_7b, self.Mixed_7c = block_7(1280, "avg"), block_7(2048, "max")

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise InputError(
                f"Inception's input of {images.dtype} {list(images.shape)}: wanted uint8 "
                "[images, 3, height, width], for FID is defined on 8-bit pictures"
            )
        x = (resize(images.float(), SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=(2, 3))


def resize(images: Tensor, side: int) -> Tensor:
    """Resize float [B, C, H, W] to [B, C, side, side] as TensorFlow 1 does.

    Output pixel i reads input place i · H / side, where others read (i + ½) · H / side − ½: the
    picture moves by up to half a pixel, and shrinking skips pixels. FID was defined with this.
    """
    for dim in (3, 2):  # along rows, then down columns, for the rounding of the original
        size = images.shape[dim]
        place = torch.arange(side, device=images.device) * torch.tensor(size / side)
        low = place.long()
        high = (low + 1).clamp(max=size - 1)
        share = (place - low).view(-1, *(1,) * (3 - dim))
        start = images.index_select(dim, low)
        images = start + (images.index_select(dim, high) - start) * share
    return images


def load_inception(path: Path) -> Inception:
    """Return the frozen network on the CPU; InputError where `path` is not FID's Inception."""
    if not path.is_file():
        raise InputError(
            f"no Inception weights at {path}; wanted pt_inception-2015-12-05-6726825d.pth"
        )
    with torch.device("meta"):
        network = Inception()
    state = {
        name: tensor
        for name, tensor in read_tensors(path).items()
        if not name.startswith("fc.") and not name.endswith(".num_batches_tracked")
    }
    wanted = network.state_dict()
    counters = {name for name in wanted if name.endswith(".num_batches_tracked")}
    needed = {name: tensor for name, tensor in wanted.items() if name not in counters}
    check_tensors(state, needed, path, told_by="FID's Inception")
    state = {name: tensor.float() for name, tensor in state.items()}
    # Batch norm counts its training steps, which say nothing here and which old files lack.
    network.load_state_dict(state | dict.fromkeys(counters, torch.tensor(0)), assign=True)
    return network.eval().requires_grad_(False)
