"""Measure a tokenizer on images: PSNR, SSIM, codebook use, and pictures of the worst cases.

`measure` is also what training calls on its held-out images. LPIPS and rFID need the weights of
other networks, which are not given here: they are not measured.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tyro.conf import Positional

from tokenizer import interop
from tokenizer.cli import InputError, Progress, run
from tokenizer.codebook import perplexity
from tokenizer.dataset import decode_all, default_workers, find_images, reasons, spread
from tokenizer.devices import Device, pick_device
from tokenizer.files import atomic_write
from tokenizer.images import grid, save_image
from tokenizer.metrics import psnr, ssim
from tokenizer.vqgan import VQGAN

SHOWN = 12  # images in each picture


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate:
    """Measure how well a tokenizer gives images back, and how many of its codes it uses.

    Prints PSNR and SSIM (means over images) and the use of the codebook. With --out it also writes
    evaluation.json, worst.png and typical.png: upper rows original, lower rows reconstruction.
    LPIPS and rFID are not measured, for they need weights that are not given.
    """

    folder: Positional[Path]
    """Folder of the tokenizer."""
    data: tuple[Path, ...]
    """Folders of images, searched in depth."""
    out: Path | None = None
    """Folder for the figures and pictures."""
    limit: int | None = None
    """Measure at most so many images, spread evenly over the folders."""
    batch: int = 32
    """Images at a time."""
    preprocess: Literal["squash", "crop"] = "crop"
    """How an image becomes square: resize both sides, or the shorter one and cut the middle."""
    device: Device = "auto"
    """Where to run; auto takes the GPU if there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What was measured: one value an image, one count a code."""

    psnr: Tensor  # [N] dB
    ssim: Tensor  # [N]
    counts: Tensor  # [K]

    def summary(self) -> dict[str, float | int]:
        return {
            "images": len(self.psnr),
            "psnr": round(float(self.psnr.mean()), 4),
            "ssim": round(float(self.ssim.mean()), 5),
            "codes_used": int((self.counts > 0).sum()),
            "codebook_size": len(self.counts),
            "perplexity": round(perplexity(self.counts), 2),
        }


@torch.no_grad()
def measure(model: VQGAN, images: Tensor, *, batch: int = 32, progress: bool = False) -> Quality:
    """Encode and decode uint8 images [N, 3, H, W] in fp32 on the model's device."""
    device = model.quant_conv.weight.device
    counts = torch.zeros(model.codebook_size, dtype=torch.int64)
    noise, likeness = [], []
    with Progress("measure", total=len(images), unit="images", enabled=progress) as bar:
        for part in images.split(batch):
            originals = part.to(device).float() / 255
            codes = model.encode(originals)
            restored = model.decode(codes)
            counts += torch.bincount(codes.flatten().cpu(), minlength=len(counts))
            noise.append(psnr(restored, originals).cpu())
            likeness.append(ssim(restored, originals).cpu())
            bar.update(len(part))
    return Quality(psnr=torch.cat(noise), ssim=torch.cat(likeness), counts=counts)


@torch.no_grad()
def picture(model: VQGAN, images: Tensor, *, columns: int = SHOWN) -> np.ndarray:
    """Return uint8 [H, W, 3]: rows of originals, under each its reconstructions."""
    device = model.quant_conv.weight.device
    restored = model.decode(model.encode(images.to(device).float() / 255)).cpu()
    restored = (restored * 255).round().to(torch.uint8)
    blank = torch.full_like(images[:1], 255).expand(-len(images) % columns, -1, -1, -1)
    rows = [torch.cat([part, blank]).unflatten(0, (-1, columns)) for part in (images, restored)]
    sheet = torch.stack(rows, dim=1).flatten(0, 2)  # a row of originals, its reconstructions, …
    return grid(
        sheet.permute(0, 2, 3, 1).numpy(), columns=columns, scale=max(1, 96 // images.shape[-1])
    )


def main(command: Evaluate) -> None:
    if command.batch <= 0 or (command.limit is not None and command.limit <= 0):
        raise InputError("--batch and --limit must be more than 0")
    device = pick_device(command.device)
    model = interop.load(command.folder).to(device)
    files = [path for _, path in spread(find_images(command.data), command.limit)]
    images, bad = decode_all(
        files,
        size=model.image_size,
        preprocess=command.preprocess,
        workers=default_workers(),
        label="read images",
    )
    quality = measure(model, images, batch=command.batch, progress=True)
    if command.out is not None:
        write(command, model, images, quality, bad)
    found = quality.summary()
    print(
        f"PSNR {found['psnr']:.2f} dB, SSIM {found['ssim']:.4f} over {found['images']} images; "
        f"codes used {found['codes_used']} of {found['codebook_size']}, perplexity "
        f"{found['perplexity']:.0f}; unreadable images: {reasons(bad)}; "
        "LPIPS and rFID: not measured (no weights given)"
    )


def write(
    command: Evaluate, model: VQGAN, images: Tensor, quality: Quality, bad: Counter[str]
) -> None:
    out = command.out
    assert out is not None
    out.mkdir(parents=True, exist_ok=True)
    order = quality.psnr.argsort()
    middle = max(0, len(order) // 2 - SHOWN // 2)
    save_image(out / "worst.png", picture(model, images[order[:SHOWN]]))
    save_image(out / "typical.png", picture(model, images[order[middle : middle + SHOWN]]))
    result: dict[str, Any] = {
        **quality.summary(),
        "psnr_worst": round(float(quality.psnr.min()), 4),
        "bad": dict(bad),
        "lpips": None,
        "rfid": None,
        "tokenizer": model.id,
        "preprocess": command.preprocess,
        "data": [str(folder) for folder in command.data],
    }
    with atomic_write(out / "evaluation.json", "w") as file:
        json.dump(result, file, indent=2)


if __name__ == "__main__":
    run(Evaluate, main, prog="python -m tokenizer.evaluate")
