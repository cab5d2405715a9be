"""The shape of a VQ-GAN: every number that its network depends on, and what follows from them."""

from dataclasses import dataclass

from tokenizer.cli import InputError

GROUPS = 32  # of every GroupNorm; channels must be multiples of it


@dataclass(frozen=True, slots=True, kw_only=True)
class VQGANConfig:
    """Shape of the network. The defaults are LVM's released tokenizer: 146 M parameters, f16."""

    image_size: int = 256
    """Side of the images in pixels; other multiples of the down-scaling factor also work."""
    in_channels: int = 3
    """Colour channels."""
    patch: int = 1
    """Side of the pixel squares folded into channels before the first level; 2 or 4 saves time."""
    channels: int = 128
    """Channels of the first level; with the multipliers, multiples of 32."""
    multipliers: tuple[int, ...] = (1, 2, 2, 4, 6)
    """Channels of each level over `channels`; each level but the last halves the image."""
    res_blocks: int = 2
    """Residual blocks a level in the encoder; the decoder has one more."""
    attention_resolutions: tuple[int, ...] = ()
    """Sides, in cells of the feature map, of the levels with self-attention after each block."""
    mid_attention: bool = False
    """Self-attention between the two blocks at the lowest resolution."""
    latent_dim: int = 64
    """Channels that the encoder puts out and the decoder takes in."""
    code_dim: int = 64
    """Width of a code."""
    codebook_size: int = 8192
    """Number of codes."""
    normalize_codes: bool = False
    """Compare latents and codes at unit length (Yu et al. 2022)."""
    pixel_range: tuple[float, float] = (0.0, 1.0)
    """What 0 and 1 of the API are inside the network: (0, 1) for muse, (-1, 1) for taming."""
    commitment: float = 0.25
    """Weight of the commitment term in training."""
    dropout: float = 0.0
    """Dropout inside the residual blocks in training."""

    def __post_init__(self) -> None:
        wrong = [c for c in self.widths if c % GROUPS or c <= 0]
        if not self.multipliers or wrong:
            raise InputError(
                f"levels of {list(self.widths)} channels: channels × multipliers must be positive "
                f"multiples of {GROUPS}, the groups of the normalisation"
            )
        if self.image_size <= 0 or self.image_size % self.factor:
            raise InputError(
                f"image_size {self.image_size} is no multiple of {self.factor}, the factor of "
                f"{len(self.multipliers)} levels with patch {self.patch}"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.channels * m for m in self.multipliers)

    @property
    def factor(self) -> int:
        """Pixels along the side of the square that one code stands for."""
        return self.patch * 2 ** (len(self.multipliers) - 1)

    @property
    def grid(self) -> int:
        """Codes along the side of an image of `image_size`."""
        return self.image_size // self.factor

    @property
    def codes_per_image(self) -> int:
        return self.grid**2

    def has_attention(self, level: int) -> bool:
        return self.image_size // self.patch // 2**level in self.attention_resolutions

    def num_params(self) -> int:
        """Count the parameters without building the network."""

        def conv(i: int, o: int, side: int) -> int:
            return i * o * side**2 + o

        def block(i: int, o: int) -> int:
            return 2 * (i + o) + conv(i, o, 3) + conv(o, o, 3) + (conv(i, o, 1) if i != o else 0)

        def attention(c: int) -> int:
            return 2 * c + 4 * conv(c, c, 1)

        widths, blocks, pixels = self.widths, self.res_blocks, self.in_channels * self.patch**2
        low, z, d = widths[-1], self.latent_dim, self.code_dim
        total = conv(pixels, widths[0], 3) + conv(widths[0], pixels, 3)
        total += 2 * widths[0] + 2 * low  # the two norm_out, decoder and encoder
        total += conv(low, z, 3) + conv(z, low, 3) + conv(z, d, 1) + conv(d, z, 1)
        total += self.codebook_size * d
        total += 4 * block(low, low) + (2 * attention(low) if self.mid_attention else 0)
        for level, c in enumerate(widths):
            below = widths[max(level - 1, 0)]
            above = widths[min(level + 1, len(widths) - 1)]
            total += block(below, c) + (blocks - 1) * block(c, c)
            total += block(above, c) + blocks * block(c, c)
            total += (2 * blocks + 1) * attention(c) if self.has_attention(level) else 0
            total += conv(c, c, 3) * ((level < len(widths) - 1) + (level > 0))
        return total
