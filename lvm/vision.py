"""Models that read patches of images: AIM's trunk and head, AIMv2's trunk, of the one block.

B images, N patches, D width. The trunk is a stack of `lvm.model.Block` with other values of its
config (El-Nouby et al. 2024, section 3; Fini et al. 2024 for AIMv2). In training it reads causally,
but for a prefix; as a feature extractor every patch reads every other.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from kernels.attention import resolve
from kernels.mask import Mask
from lvm.config import ModelConfig, Patches
from lvm.init import draw_weights
from lvm.model import MLP, Block, make_norm
from lvm.patches import normalise, sequence, sincos


class PatchEmbedding(nn.Module):
    """A strided convolution, its norm, and the positions."""

    def __init__(self, config: ModelConfig, patches: Patches) -> None:
        super().__init__()
        self.side = patches.side
        self.proj = nn.Conv2d(3, config.width, patches.size, patches.size)
        self.norm = make_norm(config, config.width)
        learned = patches.positions == "learned"
        self.pos = nn.Parameter(torch.zeros(patches.count, config.width)) if learned else None

    def forward(self, images: Tensor) -> Tensor:
        """Return [B, N, D] in raster order of normalised images [B, 3, H, W], of any whole patches
        where positions are sine and cosine."""
        grid = self.proj(images)
        x = self.norm(grid.flatten(2).transpose(1, 2))
        if self.pos is not None:
            return x + self.pos
        height, width = grid.shape[2:]
        return x + sincos(width, height, dim=x.shape[-1], device=x.device).to(x.dtype)


class VisionModel(nn.Module):
    """Patch embedding, blocks and the last norm. What predicts, the head, is not part of it."""

    def __init__(self, config: ModelConfig, patches: Patches) -> None:
        super().__init__()
        self.config, self.patches = config, patches
        self.embed = PatchEmbedding(config, patches)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = make_norm(config, config.width)

    def draw_weights(self, seed: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield each parameter and its first values on the CPU: see `lvm.init`."""
        return draw_weights(self, self.config, seed=seed)

    def embed_images(self, images: Tensor) -> Tensor:
        """Return [B, N, D] of images [B, 3, H, W], uint8 or float in [0, 1], in raster order."""
        return self.embed(normalise(images, self.patches).to(self.embed.proj.weight.dtype))

    def features(self, x: Tensor, mask: Mask | None = None) -> Tensor:
        """Return the normalised stream [B, N, D] of embedded patches x [B, N, D].

        Without a mask every patch reads all.
        """
        for output in self._stream(x, mask):
            x = output
        return self.norm(x)

    def block_outputs(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Return the raw stream [B, N, D] after each of `blocks` (from 0), every patch read by all.

        images [B, 3, H, W], uint8 or float in [0, 1]. These are the features that AIM is probed by:
        without the last norm; blocks past the last wanted are not computed.
        """
        wanted, found = set(blocks), {}
        x = self.embed_images(images)
        for i, output in enumerate(self._stream(x, None)):
            if i in wanted:
                found[i] = output
            if i == max(wanted):
                break
        return [found[i] for i in blocks]

    def forward(self, images: Tensor) -> Tensor:
        """Return the features [B, N, D] of images, every patch read by all, after the last norm."""
        return self.features(self.embed_images(images))

    def _stream(self, x: Tensor, mask: Mask | None) -> Iterator[Tensor]:
        if mask is None:
            count = x.shape[1]
            mask = resolve(Mask.full(), queries=count, keys=count, device=x.device)
        for block in self.layers:
            x = block(x, None, mask)
            yield x


class HeadBlock(nn.Module):
    """A block of AIM's head: x + norm(x), then the MLP's residual.

    It is a transformer block whose attention is the identity, which leaves its first norm inside
    the residual: so trained Apple's models, and so it is here.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn_norm = make_norm(config, config.width)
        self.mlp_norm = make_norm(config, config.width)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn_norm(x)
        return x + self.mlp(self.mlp_norm(x))


class PixelHead(nn.Module):
    """AIM's head: to `head_width`, positions again, MLP blocks, a norm, a patch's pixels."""

    def __init__(self, config: ModelConfig, patches: Patches) -> None:
        super().__init__()
        inner = head_config(config, patches)
        self.side = patches.side
        self.proj = nn.Linear(config.width, inner.width)
        self.layers = nn.ModuleList(HeadBlock(inner) for _ in range(patches.head_depth))
        self.norm = make_norm(inner, inner.width)
        self.pred = nn.Linear(inner.width, patches.channels)

    def forward(self, x: Tensor, order: Tensor) -> Tensor:
        """Return predictions [B, N, C] of features [B, N, D]; `order` [N] says which patch stands
        at each place."""
        table = sincos(self.side, self.side, dim=self.proj.out_features, device=x.device)
        x = self.proj(x)
        x = x + table[order].to(x.dtype)
        for block in self.layers:
            x = block(x)
        return self.pred(self.norm(x))


def head_config(config: ModelConfig, patches: Patches) -> ModelConfig:
    """Return the shape of the head's blocks: GELU and a factor of 4 whatever the trunk has."""
    return ModelConfig(
        width=patches.head_width,
        ffn=4 * patches.head_width,
        layers=patches.head_depth,
        heads=1,
        norm=config.norm,
        norm_eps=config.norm_eps,
        mlp="gelu",
        rotary=False,
    )


def flops_per_token(
    config: ModelConfig, patches: Patches, *, causal: bool = True, head: bool = True
) -> float:
    """Return training FLOPs a patch: `ModelConfig.flops_per_token`, the embedding, and the head.

    `head=False` leaves the head out, which is 60 % more at AIM's 600M and 6 % at its 7B.
    """
    weights = patches.channels * config.width
    if head and patches.target == "pixels":
        inner = head_config(config, patches)
        weights += inner.layers * 2 * inner.width * inner.ffn
        weights += inner.width * (config.width + patches.channels)
    return 6.0 * weights + config.flops_per_token(patches.count, causal=causal)


def order_of(patches: Patches, device: torch.device) -> Tensor:
    """Return `lvm.patches.sequence` as a tensor int64 [N]."""
    return torch.from_numpy(sequence(patches)).to(device)
