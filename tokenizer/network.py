"""Encoder and decoder of the VQ-GAN: residual blocks, levels, optional attention.

The module names are those of openMUSE and taming-transformers, so their tensors map one to one.
Shapes: B batch, C channels, H and W pixels, h and w cells of the code grid.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from tokenizer.config import GROUPS, VQGANConfig

EPSILON = 1e-6  # of every GroupNorm


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=EPSILON)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, c_in: int, c_out: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.dropout = dropout
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = F.dropout(F.silu(self.norm2(h)), self.dropout, self.training)
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + self.conv2(h)


class Attention(nn.Module):
    """Single-head self-attention over all cells of the map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.v, self.proj_out = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (p(h).flatten(2).mT[:, None] for p in (self.q, self.k, self.v))  # [B, 1, hw, C]
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(mixed[:, 0].mT.reshape(x.shape))


class Downsample(nn.Module):
    """Halve the side by a strided convolution; pads right and below only, as muse and taming do."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the side by repetition and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Blocks at one resolution, each with its attention; the change of resolution is last."""

    def __init__(self, config: VQGANConfig, level: int, *, c_in: int, blocks: int) -> None:
        super().__init__()
        c = config.widths[level]
        self.block = nn.ModuleList(
            ResBlock(c_in if i == 0 else c, c, config.dropout) for i in range(blocks)
        )
        attended = blocks if config.has_attention(level) else 0
        self.attn = nn.ModuleList(Attention(c) for _ in range(attended))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        for resample in ("downsample", "upsample"):
            if hasattr(self, resample):
                x = getattr(self, resample)(x)
        return x


class Mid(nn.Module):
    """Two blocks at the lowest resolution, with or without attention between them."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        c = config.widths[-1]
        self.block_1 = ResBlock(c, c, config.dropout)
        if config.mid_attention:
            self.attn_1 = Attention(c)
        self.block_2 = ResBlock(c, c, config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block_1(x)
        return self.block_2(self.attn_1(x) if hasattr(self, "attn_1") else x)


class Encoder(nn.Module):
    """Pixels [B, C, H, W] to latents [B, latent_dim, h, w]."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths, self.patch = config.widths, config.patch
        pixels = config.in_channels * config.patch**2
        self.conv_in = nn.Conv2d(pixels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for level, c in enumerate(widths):
            c_in = widths[max(level - 1, 0)]
            stage = Level(config, level, c_in=c_in, blocks=config.res_blocks)
            if level < len(widths) - 1:
                stage.downsample = Downsample(c)
            self.down.append(stage)
        self.mid = Mid(config)
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x)
        for stage in self.down:
            x = stage(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents [B, latent_dim, h, w] to pixels [B, C, H, W]; `up.0` is the highest resolution."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths, self.patch = config.widths, config.patch
        self.conv_in = nn.Conv2d(config.latent_dim, widths[-1], 3, padding=1)
        self.mid = Mid(config)
        self.up = nn.ModuleList()
        for level, c in enumerate(widths):
            c_in = widths[min(level + 1, len(widths) - 1)]
            stage = Level(config, level, c_in=c_in, blocks=config.res_blocks + 1)
            if level > 0:
                stage.upsample = Upsample(c)
            self.up.append(stage)
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.in_channels * config.patch**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for stage in reversed(self.up):
            x = stage(x)
        x = self.conv_out(F.silu(self.norm_out(x)))
        return F.pixel_shuffle(x, self.patch) if self.patch > 1 else x
