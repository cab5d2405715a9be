"""What a probe asks of a trunk, and the trunks there are: of patches, of codes, and raw pixels.

Features are the raw residual stream after a block, without the last norm: what AIM is probed by
(El-Nouby et al. 2024, section 3). B images, N positions, D width.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

import tokenizer as tokenizers
from kernels.attention import resolve
from kernels.mask import Mask
from lvm.config import Reads
from lvm.generate import check_tokenizer, reads_of
from lvm.model import Transformer, build, rotary
from lvm.patches import patchify
from lvm.vision import VisionModel
from tokenizer.cli import InputError
from tokenizer.protocol import Tokenizer

View = Literal["centre", "squash"]
MOST_SIDE = 32  # of the pictures whose raw pixels are a baseline: 3072 values


class Trunk(Protocol):
    """A frozen model as a probe sees it."""

    blocks: int
    width: int
    heads: int
    positions: int
    image_size: int
    view: View
    """How a picture becomes a square: see `lvm.probing.data.Labelled.pixels`."""
    id: str
    """Equal for two trunks exactly if their features are."""

    def features(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Return the stream [B, N, D] after each of `blocks` (from 0) of images uint8 [B, 3, H, W].

        Blocks after the last that is wanted are not computed.
        """


class PatchTrunk:
    """AIM and its kin: every patch reads every other, whatever was read in training."""

    view: View = "centre"

    def __init__(self, model: VisionModel) -> None:
        self.model = model
        config, patches = model.config, model.patches
        self.blocks, self.width, self.heads = config.layers, config.width, config.heads
        self.positions, self.image_size = patches.count, patches.image_size
        self.id = model_id(model)

    def features(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        return self.model.block_outputs(images, blocks)


class CodeTrunk:
    """A language model of codes, as causal as it was trained.

    An image alone in its row: bos, where the layout has it, and all its codes. The stream at bos is
    the same for every image and is left out, so N is the codes of an image. A code reads those
    before it, so only the last position has seen all of the image.
    """

    view: View = "squash"

    def __init__(self, model: Transformer, tok: Tokenizer) -> None:
        self.model, self.tok = model, tok
        self.reads = reads_of(model)
        check_tokenizer(self.reads, tok)
        config = model.config
        self.blocks, self.width, self.heads = config.layers, config.width, config.heads
        self.positions, self.image_size = tok.codes_per_image, tok.image_size
        self.id = hashlib.sha256(f"{model_id(model)} {tok.id}".encode()).hexdigest()

    def features(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        codes = self.tok.encode(images.float() / 255)
        return [x[:, -codes.shape[1] :] for x in streams(self.model, self.reads, codes, blocks)]


class PixelTrunk:
    """The baseline without a model: a picture of at most 32 pixels a side, in [-1, 1].

    `whole` is all of it as one position, for probes that read pooled features; otherwise patches of
    a sixteenth or so of a side, for those that read positions.
    """

    blocks = 1
    view: View = "centre"

    def __init__(self, other: Trunk, *, whole: bool) -> None:
        self.image_size, self.view = other.image_size, other.view
        self.side = max(s for s in range(1, MOST_SIDE + 1) if self.image_size % s == 0)
        self.size = self.side if whole else max(1, self.side // 8)
        while self.side % self.size:
            self.size -= 1
        self.width = 3 * self.size**2
        self.positions = (self.side // self.size) ** 2
        self.heads = max(h for h in range(1, other.heads + 1) if self.width % h == 0)
        self.id = f"pixels {self.side} {self.size}"

    def features(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        small = F.avg_pool2d(images.float() / 127.5 - 1, self.image_size // self.side)
        return [patchify(small, self.size)] * len(blocks)


def streams(model: Transformer, reads: Reads, codes: Tensor, blocks: Sequence[int]) -> list[Tensor]:
    """Return the raw stream [B, T, D] after each of `blocks` of codes [B, n], each image a causal
    document of its own; T is n, and one more where the layout has a bos."""
    ids = F.pad(codes, (1, 0), value=reads.vocab.bos) if reads.layout == "bos" else codes
    count, config = ids.shape[1], model.config
    mask = resolve(Mask(causal=True), queries=count, keys=count, device=ids.device)
    pos = torch.arange(count, device=ids.device).expand_as(ids)
    angles = rotary(pos, dim=config.dim, theta=config.rope_theta) if config.rotary else None
    x, found = model.embed(ids), {}
    for i, block in enumerate(model.layers[: max(blocks) + 1]):
        x = block(x, angles, mask)
        if i in blocks:
            found[i] = x
    return [found[i] for i in blocks]


def wrap(model: Transformer | VisionModel, tok: Path | None, device: torch.device) -> Trunk:
    """Return the trunk of a model on `device`; `tok` is the folder of a code model's tokenizer."""
    model.eval().requires_grad_(False)
    if isinstance(model, VisionModel):
        if tok is not None:
            raise InputError("--tokenizer: this model reads patches of pixels; leave it out")
        return PatchTrunk(model)
    if tok is None:
        raise InputError(
            "this model reads codes, and only their tokenizer makes them of images: give "
            "--tokenizer DIR"
        )
    return CodeTrunk(model, tokenizers.load(tok).to(device))


def untrained(model: Transformer | VisionModel, *, seed: int) -> Transformer | VisionModel:
    """Return a model of the same shape with the weights that training starts from, on the CPU."""
    if isinstance(model, Transformer):
        return build(model.config, seed=seed, reads=model.reads)
    with torch.device("meta"):
        fresh = VisionModel(model.config, model.patches)
    fresh = fresh.to_empty(device="cpu")
    with torch.no_grad():
        for parameter, values in fresh.draw_weights(seed):
            parameter.copy_(values)
    return fresh


def model_id(model: Transformer | VisionModel) -> str:
    """Return sha256 (hex) over the shape and name, shape and fp32 bytes of every tensor."""
    about = [model.config, model.patches if isinstance(model, VisionModel) else model.reads]
    digest = hashlib.sha256(repr(about).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def chosen_blocks(text: Sequence[str], *, blocks: int, window: int) -> list[tuple[int, ...]]:
    """Return the sets of blocks (from 0) that `--blocks` and `--window` stand for.

    last: the last `window`; best: every run of `window` consecutive blocks, from which a search
    takes one; numbers: those. A trunk of fewer blocks has one window, of all.
    """
    size = min(window, blocks)
    if list(text) == ["last"]:
        return [tuple(range(blocks - size, blocks))]
    if list(text) == ["best"]:
        return [tuple(range(first, first + size)) for first in range(blocks - size + 1)]
    if not text or not all(part.isdecimal() and int(part) < blocks for part in text):
        raise InputError(
            f"--blocks {' '.join(text)}: wanted last, best, or numbers from 0 to {blocks - 1}"
        )
    return [tuple(sorted({int(part) for part in text}))]
