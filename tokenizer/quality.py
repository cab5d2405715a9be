"""What a tokenizer's reconstructions are worth, gathered batch by batch over any number of images.

Only figures are kept, never pixels: one value an image and measure, one count a code, and for rFID
two sets of moments.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenizer.cli import CommandError, Progress
from tokenizer.codebook import perplexity
from tokenizer.fid import Moments, frechet
from tokenizer.inception import Inception
from tokenizer.metrics import psnr, ssim
from tokenizer.perceptual import Perceptual
from tokenizer.vqgan import VQGAN

RAN_AWAY = "its file is damaged or its training ran away; take an earlier checkpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What was measured: one value an image, one count a code."""

    psnr: Tensor  # [N] dB
    ssim: Tensor  # [N]
    counts: Tensor  # [K]
    # [N] by the name of the distance, "lpips", "vgg" or "vgg-hed"; empty if none was measured
    distances: dict[str, Tensor] = field(default_factory=dict)
    rfid: float | None = None

    def summary(self) -> dict[str, float | int]:
        """Return means and counts; a distance and "rfid" only if they were measured."""
        found: dict[str, float | int] = {
            "images": len(self.psnr),
            "psnr": round(float(self.psnr.mean()), 4),
            "ssim": round(float(self.ssim.mean()), 5),
            "codes_used": int((self.counts > 0).sum()),
            "codebook_size": len(self.counts),
            "perplexity": round(perplexity(self.counts), 2),
        }
        found |= {name: round(float(d.mean()), 5) for name, d in self.distances.items()}
        return found if self.rfid is None else found | {"rfid": round(self.rfid, 4)}

    def scores(self, image: int) -> dict[str, float]:
        """Return what was measured on one image."""
        found = {
            "psnr": round(float(self.psnr[image]), 4),
            "ssim": round(float(self.ssim[image]), 5),
        }
        return found | {name: round(float(d[image]), 5) for name, d in self.distances.items()}


class Meter:
    """Encodes, decodes and measures batches on the device of the model, in the model's precision.

    `perceptual` and `inception` are on that device too. FID is defined on 8-bit pictures, so
    reconstructions are rounded to 0 … 255 for it, and for nothing else.
    """

    def __init__(
        self,
        model: VQGAN,
        *,
        perceptual: Perceptual | None = None,
        inception: Inception | None = None,
    ) -> None:
        self.model, self.perceptual, self.inception = model, perceptual, inception
        self.device = next(model.parameters()).device
        # NaN in an encoder comes out as some code or other, and everything looks well.
        if not all(bool(weight.isfinite().all()) for weight in model.parameters()):
            raise CommandError(f"the tokenizer's weights hold NaN or infinity: {RAN_AWAY}")
        self.counts = torch.zeros(model.codebook_size, dtype=torch.int64)
        self.values: dict[str, list[Tensor]] = {"psnr": [], "ssim": []}
        self.originals, self.reconstructions = Moments(), Moments()

    @torch.no_grad()
    def update(self, images: Tensor) -> None:
        """Take in uint8 [B, 3, H, W]; raises CommandError where NaN comes back."""
        pixels = images.to(self.device)
        originals = pixels.float() / 255
        codes = self.model.encode(originals)
        restored = self.model.decode(codes)
        if not bool(torch.isfinite(restored).all()):
            raise CommandError(f"the tokenizer gives back NaN: {RAN_AWAY}")
        self.counts += torch.bincount(codes.flatten().cpu(), minlength=len(self.counts))
        found = {"psnr": psnr(restored, originals), "ssim": ssim(restored, originals)}
        if self.perceptual is not None:
            found[self.perceptual.name] = self.perceptual(restored, originals)
        for name, values in found.items():
            self.values.setdefault(name, []).append(values.cpu())
        if self.inception is not None:
            rounded = (restored * 255).round().to(torch.uint8)
            self.originals.update(self.inception(pixels))
            self.reconstructions.update(self.inception(rounded))

    def quality(self) -> Quality:
        """Return all that was measured so far."""
        values = {name: torch.cat(parts) for name, parts in self.values.items()}
        measured = self.inception is not None
        return Quality(
            psnr=values.pop("psnr"),
            ssim=values.pop("ssim"),
            counts=self.counts,
            distances=values,
            rfid=frechet(self.originals, self.reconstructions) if measured else None,
        )


def measure(
    model: VQGAN,
    images: Tensor,
    *,
    batch: int = 32,
    progress: bool = False,
    perceptual: Perceptual | None = None,
) -> Quality:
    """Measure uint8 images [N, 3, H, W] that are in memory, on the model's device."""
    meter = Meter(model, perceptual=perceptual)
    with Progress("measure", total=len(images), unit="images", enabled=progress) as bar:
        for part in images.split(batch):
            meter.update(part)
            bar.update(len(part))
    return meter.quality()
