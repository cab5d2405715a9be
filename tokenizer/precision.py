"""How precisely images are encoded, and the encoding half of a VQ-GAN made for each precision.

    uint8 pixels → first conv → levels, middle → last two convs → nearest code
                     fp32       16-bit or TF32       fp32             fp32
                               convs; norms and
                              sums around them fp32

Codes change where a latent lies about as near to two of them, so precision is spent where it
decides: the first convolution sees the pixels, the last two write the latents, all three are little
work, and the sum that runs through all blocks would collect every rounding, and in fp16 overflow.
On the demo's tokenizer (tiny_f4, 512 held-out pictures, one Xeon core with AMX, torch 2.13,
2026-11-22) equal codes, in % of those of fp32, were

              all in 16 bits    as drawn above
    bf16           98.72             99.40
    fp16           99.85             99.92
    TF32 by rounding the operands    99.88

and the PSNR of the decoded pictures moved by less than 0.006 dB in each case.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokenizer.cli import InputError
from tokenizer.config import GROUPS
from tokenizer.protocol import Tokenizer
from tokenizer.vqgan import VQGAN

Precision = Literal["auto", "exact", "fp32", "tf32", "fp16", "bf16"]

REDUCED = {"fp16": torch.float16, "bf16": torch.bfloat16}


def resolve(wanted: Precision, *, tok: Tokenizer, device: str | torch.device) -> Precision:
    """Return the precision that `wanted` is for this tokenizer on this device, `auto` resolved.

    exact   codes equal to those of `tok.encode` in fp32, bit by bit
    fp32    the same sums in any order; on a CPU nothing measured faster, and they are the same
    tf32    convolutions with operands of 11 significant bits; CUDA only
    fp16    as many bits, half the bytes, the range of fp16; slow on a CPU
    bf16    8 significant bits, the range of fp32
    auto    the fastest that keeps 99 % of the codes and loses at most 0.02 dB on a trained
            tokenizer: bf16 on a CPU with AMX and fp32 on any other, by measurement; fp16 on CUDA,
            as accurate as TF32 and expected to be twice as fast, not timed there yet

    Raises InputError where there is no such precision.
    """
    kind = torch.device(device).type
    if not isinstance(tok, VQGAN):
        if wanted not in ("auto", "exact"):
            raise InputError(
                f"precision {wanted}: a {type(tok).__name__} encodes in its own; wanted auto or "
                "exact, since only a VQGAN can be given another"
            )
        return "exact"
    if wanted == "auto":
        if kind == "cuda":
            return "fp16"
        return "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"
    if wanted == "tf32" and kind != "cuda":
        raise InputError("precision tf32: only a GPU has it; use auto, bf16 or fp32")
    return wanted


class EncodingHalf(nn.Module):
    """uint8 pixels [B, C, H, W] to fp32 latents [B, D, h, w], with weights of its own."""

    def __init__(self, model: VQGAN, layout: torch.memory_format) -> None:
        super().__init__()
        self.encoder, self.quant_conv = copy.deepcopy((model.encoder, model.quant_conv))
        self.low, self.high = model.config.pixel_range
        self.layout = layout

    def forward(self, pixels: Tensor) -> Tensor:
        # Operation by operation what `VQGAN.latents` does with pixels / 255: `exact` relies on it.
        x = pixels.float().div(255) * (self.high - self.low) + self.low
        return self.quant_conv(self.encoder(x.contiguous(memory_format=self.layout)))


class Reduced(nn.Module):
    """A convolution whose operands have a 16-bit type, between tensors in fp32."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv, self.dtype = conv.to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.to(self.dtype)).float()


def encoding_half(model: VQGAN, *, precision: Precision, device: torch.device) -> EncodingHalf:
    """Return a copy of the half of `model` that encodes, in eval mode, as `precision` wants it.

    Tensor cores want channels_last. On a CPU it spares 16-bit convolutions two copies each and does
    nothing for those in fp32, but torch's GroupNorm then takes the channels of a group a pixel at a
    time: with 64 channels, two a group, that costs more than is won (tiny_f4 in bf16: 0.8 times as
    fast); from 128 on the whole is faster (muse_f16_8192 in bf16: 1.6 times).
    """
    if device.type == "cuda":
        last = precision == "tf32" or precision in REDUCED
    else:
        last = precision in REDUCED and min(model.config.widths) >= 4 * GROUPS
    layout = torch.channels_last if last else torch.contiguous_format
    half = EncodingHalf(model, layout).float().requires_grad_(False).eval()
    if precision in REDUCED:
        for part in (*half.encoder.down, half.encoder.mid):
            reduce_convolutions(part, REDUCED[precision])
    half.to(memory_format=layout)  # type: ignore[call-overload]
    return half.to(device)


def reduce_convolutions(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace every convolution inside `module` by its `Reduced` form."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Conv2d):
            setattr(module, name, Reduced(child, dtype))
        else:
            reduce_convolutions(child, dtype)


@contextmanager
def float32_sums(*, tf32: bool) -> Iterator[None]:
    """Let fp32 convolutions on CUDA run in TF32 or not, and shorten no other fp32 operand.

    torch lets convolutions use TF32 unless told otherwise, and whoever calls us may have allowed
    more, on the GPU or the CPU. Their settings are put back.
    """
    backends: Any = torch.backends
    conv = backends.cudnn.conv
    knobs = (conv, backends.cuda.matmul, backends.mkldnn.conv, backends.mkldnn.matmul)
    before = [knob.fp32_precision for knob in knobs]
    try:
        for knob in knobs:
            knob.fp32_precision = "tf32" if tf32 and knob is conv else "ieee"
        yield
    finally:
        for knob, value in zip(knobs, before, strict=True):
            knob.fp32_precision = value
