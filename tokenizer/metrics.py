"""How close a reconstruction is: PSNR and SSIM of images [B, C, H, W] in [0, 1], one value each."""

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizer.cli import InputError

WINDOW, SIGMA = 11, 1.5  # Wang et al. 2004


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Return peak signal-to-noise ratio in dB, [B]; 100 where two images are the same."""
    error = (images.double() - targets.double()).square().mean(dim=(1, 2, 3))
    return -10.0 * torch.log10(error.clamp(min=1e-10))


def ssim(images: Tensor, targets: Tensor) -> Tensor:
    """Return structural similarity, [B], mean over channels and full 11×11 Gaussian windows.

    Follows Wang et al., "Image quality assessment: from error visibility to structural similarity",
    2004, with population moments. Computed in fp64: variances are differences of close numbers.
    """
    if min(images.shape[-2:]) < WINDOW:
        raise InputError(
            f"SSIM wants images of at least {WINDOW} pixels a side, not {images.shape[-2:]}"
        )
    x, y = images.double(), targets.double()
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=x.device) - WINDOW // 2
    bell = torch.exp(-0.5 * (offsets / SIGMA).square())
    bell = bell / bell.sum()
    channels = x.shape[1]
    down = bell.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    across = bell.view(1, 1, 1, -1).expand(channels, 1, 1, -1)

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, down, groups=channels), across, groups=channels)

    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mx * my + c1) * (2 * vxy + c2)
    bottom = (mx * mx + my * my + c1) * (vx + vy + c2)
    return (top / bottom).mean(dim=(1, 2, 3))
