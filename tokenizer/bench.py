"""Time bulk encoding on this machine: python -m tokenizer.bench [--device cuda].

Images a second from uint8 pixels to codes: our path in each precision beside the plain module in
eager mode and diffusers' VQModel with the same weights. The variants take turns, round after round,
so that a change of the machine's speed meets them all; medians count. With --tokenizer and --data
also the pictures of a folder through a trained tokenizer: there `equal %`, the codes equal to those
of `exact`, and `loss dB`, by how much PSNR falls, say what a precision is worth. With random
weights and random pixels `equal %` is a hint at most.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import tokenizer
from kernels.timing import options, report
from tokenizer.cli import InputError, guarded
from tokenizer.config import VQGANConfig
from tokenizer.encode import BulkEncoder
from tokenizer.formats.diffusers import names, to_config
from tokenizer.metrics import psnr
from tokenizer.precision import Precision, float32_sums
from tokenizer.presets import muse_f16_8192, tiny_f4
from tokenizer.vqgan import VQGAN

Variant = Callable[[Sequence[np.ndarray]], list[np.ndarray]]  # batches of pixels to codes

PICTURES = 512  # of --data, spread evenly
SECONDS = 30.0  # for the rounds of a case; at least three are run


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    model: VQGAN  # on the CPU
    batches: Sequence[np.ndarray]  # uint8 [B, 3, H, W] each
    trained: bool


def random_case(name: str, config: VQGANConfig, *, batch: int, batches: int) -> Case:
    """Return random weights and pixels; as initialised, any rounding would change most codes."""
    torch.manual_seed(0)
    model = VQGAN(config).eval()
    shape = (3, config.image_size, config.image_size)
    with torch.no_grad():
        latents = model.latents(torch.rand(2, *shape))
        for tensor in model.quant_conv.parameters():
            tensor.div_(latents.std())
        model.quantize.embedding.weight.normal_()
    pixels = torch.randint(0, 256, (batches, batch, *shape), dtype=torch.uint8)
    return Case(name=name, model=model, batches=list(pixels.numpy()), trained=False)


def trained_case(folder: Path, data: Path, *, batch: int) -> Case:
    """Return the tokenizer in `folder` with pictures of `data`."""
    # Here, since a GPU host that has torch and little else can do without Pillow.
    from tokenizer.images import BadImage, list_images, read_image

    model = tokenizer.load(folder)
    files = list_images(data)
    pixels = []
    for file in files[:: max(1, len(files) // PICTURES)][:PICTURES]:
        try:
            pixels.append(read_image(file, size=model.image_size, preprocess="crop"))
        except BadImage:
            continue  # the build counts and names them; here any picture will do
    if not pixels:
        raise InputError(f"{data} has no readable image")
    stack = np.stack(pixels).transpose(0, 3, 1, 2)
    batches = [stack[i : i + batch] for i in range(0, len(stack), batch)]
    return Case(name=str(folder), model=model, batches=batches, trained=True)


def plain(model: VQGAN, device: str, *, tf32: bool) -> Variant:
    """Return the module as anyone would call it, in fp32."""

    def run(batches: Sequence[np.ndarray]) -> list[np.ndarray]:
        with float32_sums(tf32=tf32):
            images = (torch.from_numpy(pixels).to(device).float() / 255 for pixels in batches)
            return [model.encode(x).cpu().numpy() for x in images]

    return run


def in_diffusers(model: VQGAN, device: str) -> Variant | None:
    """Return diffusers' VQModel with the weights of `model`, or None where it is not installed.

    What it lacks is done around it: pixel range, squares folded into channels, unit lengths.
    """
    try:
        from diffusers import VQModel
    except ImportError:
        return None
    c = model.config
    bare = replace(
        c,
        in_channels=c.in_channels * c.patch**2,
        image_size=c.image_size // c.patch,
        patch=1,
        normalize_codes=False,
    )
    theirs = to_config(bare)
    del theirs["pixel_range"]  # ours, of which VQModel would warn
    twin: Any = VQModel.from_config(theirs)
    state = {}
    for name, tensor in model.state_dict().items():
        linear = ".attn" in name and tensor.ndim == 4  # a 1×1 convolution here
        state[names(name, len(c.widths))] = tensor[:, :, 0, 0] if linear else tensor
    state["quantize.embedding.weight"] = model.quantize.vectors()
    twin.load_state_dict(state)
    twin.to(device).eval()
    low, high = c.pixel_range

    @torch.no_grad()
    def encode(x: Tensor) -> Tensor:
        x = F.pixel_unshuffle(x * (high - low) + low, c.patch)
        latents = twin.encode(x).latents
        if c.normalize_codes:
            latents = F.normalize(latents, dim=1)
        return twin.quantize(latents)[2][2].view(len(x), -1)

    def run(batches: Sequence[np.ndarray]) -> list[np.ndarray]:
        with float32_sums(tf32=False):
            images = (torch.from_numpy(pixels).to(device).float() / 255 for pixels in batches)
            return [encode(x).cpu().numpy() for x in images]

    return run


def variants(case: Case, device: str) -> dict[str, Variant | None]:
    """Return what is compared: the plain module first, ours by precision."""
    here = case.model.to(device)
    found: dict[str, Variant | None] = {"plain fp32, eager": plain(here, device, tf32=False)}
    if device == "cuda":
        found["plain, torch's default TF32"] = plain(here, device, tf32=True)
    found["diffusers fp32, eager"] = in_diffusers(case.model, device)
    for precision in get_args(Precision):
        if precision != "auto" and (device == "cuda" or precision != "tf32"):
            found[precision] = ours(case, device, precision)
    return found


def ours(case: Case, device: str, precision: Precision) -> Variant:
    size = len(case.batches[0])
    encoder = BulkEncoder(case.model, device=device, precision=precision, batch=size)
    return lambda batches: list(encoder.encode_all(batches))


def agreement(
    model: VQGAN, pixels: np.ndarray, *, codes: np.ndarray, exact: np.ndarray
) -> tuple[float, float]:
    """Return the share of `codes` [N, h·w] equal to `exact`, and what they lose in mean PSNR, dB.

    Pictures decoded by `model` are compared with `pixels`, uint8 [N, 3, H, W].
    """
    device = model.quant_conv.weight.device

    def quality(of: np.ndarray) -> float:
        restored = model.decode(torch.from_numpy(of).to(device)).cpu()
        return float(psnr(restored, torch.from_numpy(pixels).float() / 255).mean())

    return float((codes == exact).mean()), quality(exact) - quality(codes)


def rounds(
    case: Case, running: dict[str, Variant], *, repeats: int
) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    """Return the seconds of every turn of each variant, and its codes [N, h·w]."""
    times: dict[str, list[float]] = {name: [] for name in running}
    codes = {name: np.concatenate(run(case.batches)) for name, run in running.items()}  # warms up
    first = time.perf_counter()
    for i in range(repeats):
        if i >= 3 and time.perf_counter() - first > SECONDS:
            break
        for name, run in running.items():
            start = time.perf_counter()
            run(case.batches)  # ends with codes on the CPU, so nothing is left running
            times[name].append(time.perf_counter() - start)
    return times, codes


def rows(case: Case, device: str, *, repeats: int) -> list[dict[str, object]]:
    """Time the variants of one case and compare their codes."""
    found = variants(case, device)
    times, codes = rounds(case, {k: v for k, v in found.items() if v is not None}, repeats=repeats)
    pixels = np.concatenate(case.batches)
    base, *_ = times.values()
    about: dict[str, object] = {
        "tokenizer": case.name,
        "weights": "trained" if case.trained else "random",
        "pixels": case.model.image_size,
        "batch": len(case.batches[0]),
    }
    table = []
    for name in found:
        row = about | {"path": name}
        if name not in times:
            table.append(row | {"images/s": "not installed"})
            continue
        faster = statistics.median(b / t for b, t in zip(base, times[name], strict=True))
        row["images/s"] = round(len(pixels) / statistics.median(times[name]), 2)
        row["x plain"] = round(faster, 2)
        if case.trained:
            equal, loss = agreement(case.model, pixels, codes=codes[name], exact=codes["exact"])
            row |= {"equal %": round(100 * equal, 3), "loss dB": round(loss, 4)}
        else:
            row["equal %"] = round(100 * float((codes[name] == codes["exact"]).mean()), 3)
        table.append(row)
    return table


def cases(found: argparse.Namespace) -> list[Case]:
    """Return the presets with random weights and, where given, a trained tokenizer."""
    if (found.tokenizer is None) != (found.data is None):
        raise InputError("--tokenizer and --data belong together: give both or none")
    gpu = found.device == "cuda"
    large, many = (64, 8) if gpu else (1, 1)  # a CPU takes seconds for an image of 256 pixels
    listed = [
        random_case("tiny_f4", tiny_f4().model, batch=1024 if gpu else 64, batches=many),
        random_case("muse_f16_8192", muse_f16_8192().model, batch=large, batches=many),
    ]
    if found.tokenizer is not None:
        listed.append(trained_case(found.tokenizer, found.data, batch=64))
    return listed


def main() -> int:
    found = options(
        "python -m tokenizer.bench",
        __doc__,
        folders={
            "tokenizer": "folder of a trained tokenizer",
            "data": "folder of images for it, searched in depth",
        },
    )
    table = [
        row for case in cases(found) for row in rows(case, found.device, repeats=found.repeats)
    ]
    report("encode", found.device, table)
    return 0


if __name__ == "__main__":
    raise SystemExit(guarded(main, prog="python -m tokenizer.bench"))
