"""A convolutional VQ-GAN: images [B, C, H, W] to a grid of codes and back.

One configurable network covers the tokenizer of LVM and DeLVM (openMUSE's VQGANModel, itself after
Esser et al., "Taming transformers", 2021) with its tensor names, so those weights map one to one.

    image → conv_in → level 0: blocks, ↓ → level 1 … → mid → 1×1 → nearest code      [H/f, W/f]
    codes → vectors → 1×1 → conv_in → mid → … level 1 ↑ → level 0: blocks → conv_out → image

Shapes: B batch, C channels, H and W pixels, h and w codes, D code width, K codes.
"""

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tokenizer.cli import InputError
from tokenizer.codebook import Codebook
from tokenizer.config import VQGANConfig
from tokenizer.network import Decoder, Encoder


class VQGAN(nn.Module):
    """The tokenizer; `tokenizer.protocol.Tokenizer` says what its users rely on."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        # The order of these lines is the order of tensors in `id`; do not change it.
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codebook(
            config.codebook_size, config.code_dim, normalize=config.normalize_codes
        )
        self.quant_conv = nn.Conv2d(config.latent_dim, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent_dim, 1)
        self._id: tuple[tuple[object, ...], str] | None = None

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def codes_per_image(self) -> int:
        return self.config.codes_per_image

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    @property
    def id(self) -> str:
        """Return sha256 (hex) over name, shape and fp32 bytes of every tensor, in our order.

        Kept until a tensor is replaced or changed in place (which `tensor.data` would hide).
        """
        state = self.state_dict()
        seen = tuple((t.data_ptr(), t.dtype, t._version) for t in state.values())
        if self._id is None or self._id[0] != seen:
            digest = hashlib.sha256()
            for name, tensor in state.items():
                digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.detach().float().cpu().contiguous().numpy())
            self._id = seen, digest.hexdigest()
        return self._id[1]

    def latents(self, images: Tensor) -> Tensor:
        """Return what the quantiser sees, [B, D, h, w], of images in [0, 1]."""
        self._check_images(images)
        low, high = self.config.pixel_range
        return self.quant_conv(self.encoder(self._prepared(images * (high - low) + low)))

    def pixels(self, vectors: Tensor) -> Tensor:
        """Return images [B, C, H, W], not clamped to [0, 1], of code vectors [B, D, h, w]."""
        low, high = self.config.pixel_range
        x = self.decoder(self.post_quant_conv(self._prepared(vectors)))
        return (x.float() - low) / (high - low)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return int64 codes [B, h·w] of float images [B, C, H, W] in [0, 1].

        Raises InputError for pixels that are no number or far outside, at the cost of waiting for
        the device; `tokenizer.encode` is the way for many images.
        """
        self._check_images(images)
        if images.numel():
            low, high = (float(x) for x in images.aminmax())
            if not (low >= -0.5 and high <= 1.5):  # false for NaN too
                raise InputError(
                    f"images with pixels from {low:.4g} to {high:.4g}: wanted numbers in [0, 1]; "
                    "uint8 is divided by 255, [-1, 1] is scaled"
                )
        return self.quantize.search(self.latents(images))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Return fp32 images [B, C, H, W] in [0, 1] of codes [B, n²]."""
        side = math.isqrt(codes.shape[-1])
        if codes.ndim != 2 or side**2 != codes.shape[1] or not side:
            raise InputError(
                f"decode wants codes [images, n²] of a square grid, not {list(codes.shape)}; "
                f"an image of this tokenizer has {self.codes_per_image}"
            )
        if len(codes) and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook_size:
            raise InputError(
                f"codes {int(codes.min())} … {int(codes.max())}: this tokenizer has 0 … "
                f"{self.codebook_size - 1}; ids of special tokens must be taken out first"
            )
        vectors = self.quantize.lookup(codes).unflatten(1, (side, side)).movedim(-1, 1)
        return self.pixels(vectors).clamp(0.0, 1.0)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and fp32 value of everything that a file of this model holds."""
        for name, tensor in self.state_dict().items():
            yield name, tensor.detach().float().cpu().contiguous()

    def _prepared(self, x: Tensor) -> Tensor:
        """Return `x` in the type of the weights and contiguous, whatever view came in.

        In the channels_last layout torch's GroupNorm is so slow on a CPU (bf16: 30 times) that a
        training step takes nearly twice as long, though the convolutions are faster.
        """
        return x.to(self.quant_conv.weight.dtype).contiguous()

    def _check_images(self, images: Tensor) -> None:
        c, f = self.config.in_channels, self.config.factor
        fits = images.ndim == 4 and images.shape[1] == c
        if not fits or images.shape[2] % f or images.shape[3] % f:
            raise InputError(
                f"images of shape {list(images.shape)}: this tokenizer wants [images, {c}, height, "
                f"width] with sides that are multiples of {f}"
            )
        if not images.is_floating_point():
            raise InputError(f"images of {images.dtype}: wanted float in [0, 1]; divide by 255")
