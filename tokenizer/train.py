"""Train a VQ-GAN: `python -m tokenizer.train PRESET --data DIR --out DIR`.

A run folder is a tokenizer folder (`config.json`, `model.safetensors`) with `run.json` (what was
asked), `metrics.jsonl`, while it lasts `training.pt`, and in the end `results.json` and
`samples.png`. A killed run goes on from its last checkpoint when the command is repeated; bounded
by steps alone, it ends with the very weights of a run that nothing interrupted.
"""

import json
import math
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from tyro.conf import OmitArgPrefixes

from tokenizer import interop, presets
from tokenizer.cli import CommandError, InputError, Progress, run
from tokenizer.codebook import perplexity
from tokenizer.dataset import (
    Images,
    decode_all,
    default_workers,
    find_images,
    fingerprint,
    hold_out,
    reasons,
    spread,
)
from tokenizer.devices import Device, pick_device
from tokenizer.evaluate import SHOWN, measure, picture
from tokenizer.files import atomic_write, remove_temporaries
from tokenizer.images import save_image
from tokenizer.presets import Recipe
from tokenizer.provenance import provenance
from tokenizer.trainer import Trainer

VAL_MOST = 2048  # images of --val that are measured
LOG_EVERY = 10  # steps between rows of metrics.jsonl


@dataclass(frozen=True, slots=True, kw_only=True)
class Train:
    """Train a tokenizer on folders of images, or go on with a run that was interrupted."""

    recipe: Annotated[Recipe, OmitArgPrefixes]
    data: tuple[Path, ...]
    """Folders of images, searched in depth."""
    out: Path
    """Folder of the run and of the tokenizer that comes out; an unfinished run there is resumed."""
    val: tuple[Path, ...] = ()
    """Folders of images to measure on, at most 2048 of them; without it 1 in 50 of --data, at most
    512, is held out."""
    limit: int | None = None
    """Use at most so many images of --data, spread evenly: a run bounded by time need not read
    more than it will see."""
    device: Device = "auto"
    """Where to run; auto takes the GPU if there is one."""
    workers: int = 0
    """Threads that decode images; 0: one a core, at most 8."""
    save_every: int = 200
    """Steps between checkpoints."""


class Log:
    """metrics.jsonl: one row every few steps, cut back to the checkpoint when a run is resumed."""

    def __init__(self, path: Path, *, step: int, codes: int) -> None:
        self.path = path
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step(line) <= step]
            with atomic_write(path, "w") as file:
                file.writelines(f"{line}\n" for line in kept)
        self.counts = torch.zeros(codes, dtype=torch.int64)
        self.images, self.since = 0, time.monotonic()

    def count(self, images: int, chosen: Tensor | None) -> None:
        self.images += images
        if chosen is not None:
            self.counts = self.counts.to(chosen.device)
            self.counts += torch.bincount(chosen.flatten(), minlength=len(self.counts))

    def row(self, trainer: Trainer, parts: dict[str, Tensor], bad: Counter[str]) -> dict[str, Any]:
        """Write and return the row of the present step; code use is that since the last row."""
        now = time.monotonic()
        row: dict[str, Any] = {"step": trainer.step, "elapsed": round(trainer.elapsed, 3)}
        row |= {k: float(v) for k, v in parts.items() if k not in ("chosen", "mse")}
        if not math.isfinite(row["loss"]):
            raise CommandError(
                f"the loss is {row['loss']} at step {trainer.step}; start again with a lower --lr "
                "or --precision fp32"
            )
        row["psnr"] = -10 * math.log10(max(float(parts["mse"]), 1e-10))
        row["codes_used"] = int((self.counts > 0).sum())
        row["perplexity"] = perplexity(self.counts)
        row["lr"] = trainer.rate
        row["images_per_second"] = round(self.images / max(now - self.since, 1e-9), 2)
        row["bad"] = bad.total()
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        self.counts.zero_()
        self.images, self.since = 0, now
        return row


def _step(line: str) -> float:
    """Return the step of a row, or more than any for the half row of a killed process."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf


def fit(trainer: Trainer, images: Images, *, out: Path, save_every: int) -> None:
    """Train from where `trainer` is to the end of the run, with checkpoints on the way."""
    recipe = trainer.recipe
    log = Log(out / "metrics.jsonl", step=trainer.step, codes=recipe.model.codebook_size)
    order = {"batch": recipe.batch, "seed": recipe.seed}
    batches = images.batches(trainer.step, **order)
    before, start = trainer.elapsed, time.monotonic()
    left = recipe.seconds - before if recipe.seconds else None
    with Progress(
        "train", total=recipe.steps, unit="steps", done=trainer.step, seconds=left
    ) as progress:
        while (recipe.steps is None or trainer.step < recipe.steps) and (
            recipe.seconds is None or trainer.elapsed < recipe.seconds
        ):
            fraction = trainer.fraction()
            if not trainer.quantizing and fraction >= recipe.plain:
                trainer.start_codes(images.batches(trainer.step, **order))
            parts = trainer.learn(next(batches), fraction)
            trainer.elapsed = before + time.monotonic() - start
            log.count(recipe.batch, parts.get("chosen"))
            shown = {}
            if trainer.step % LOG_EVERY == 0 or trainer.step == recipe.steps:
                row = log.row(trainer, parts, images.bad)
                shown = {k: row[k] for k in ("loss", "psnr", "codes_used", "images_per_second")}
            if trainer.step % save_every == 0:
                trainer.save(out / "training.pt")
                interop.save(trainer.model, out)
            progress.update(1, **shown)


def main(command: Train) -> None:
    recipe, out = command.recipe, command.out
    if command.save_every <= 0 or command.workers < 0 or (command.limit or 1) <= 0:
        raise InputError("--save-every and --limit must be more than 0, --workers not below 0")
    device = pick_device(command.device)
    named = spread(find_images(command.data), command.limit)
    if command.val:
        files = [p for _, p in named]
        held = [p for _, p in spread(find_images(command.val), VAL_MOST)]
    else:
        files, held = hold_out(named)
    asked = {**asdict(recipe), "images": len(files), "held_out": len(held)}
    asked["names"] = fingerprint(named)
    if open_run(out, json.loads(json.dumps(asked))):
        found = json.loads((out / "results.json").read_text())
        print(f"{out} is finished ({found['steps']} steps); for another run give another --out")
        return
    trainer = Trainer(recipe, device)
    if (out / "training.pt").exists():
        trainer.restore(out / "training.pt")
        print(f"resuming {out} at step {trainer.step}")
    workers = command.workers or default_workers()
    reading: dict[str, Any] = {
        "size": recipe.model.image_size,
        "preprocess": recipe.preprocess,
        "workers": workers,
    }
    seen, bad = decode_all(held, label="read held-out images", **reading)
    images = Images(files, **reading)
    fit(trainer, images, out=out, save_every=command.save_every)
    finish(trainer, seen, out=out, bad=images.bad + bad)


def open_run(out: Path, asked: dict[str, Any]) -> bool:
    """Make the run folder, or see that the one there was asked for the same; True if finished.

    What only bounds a run, steps and seconds, may change between the parts of one.
    """
    record = out / "run.json"
    if not record.exists():
        if out.exists() and any(out.iterdir()):
            raise InputError(f"{out} is not empty and holds no training run; give another --out")
        out.mkdir(parents=True, exist_ok=True)
        with atomic_write(record, "w") as file:
            json.dump({"asked": asked, **provenance()}, file, indent=2)
        return False
    remove_temporaries(out)
    before, now = flat(json.loads(record.read_text())["asked"]), flat(asked)
    changed = [
        f"{key}: {before.get(key)} there, {now.get(key)} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in ("steps", "seconds")
    ]
    if changed:
        raise InputError(
            f"{out} holds a run that was asked for something else ({'; '.join(changed)}); "
            "repeat its options, or give another --out"
        )
    return (out / "results.json").exists()


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """Return nested fields under one level of dotted names."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result |= {f"{key}.{k}": v for k, v in flat(value).items()}
        else:
            result[key] = value
    return result


def finish(trainer: Trainer, held: Tensor, *, out: Path, bad: Counter[str]) -> None:
    """Write the tokenizer and what it does to held-out images, then drop the checkpoint."""
    model = trainer.model.eval()
    interop.save(model, out)
    found = measure(model, held).summary()
    shown = spread(range(len(held)), 2 * SHOWN)
    save_image(out / "samples.png", picture(model, held[shown]))
    rate = trainer.step * trainer.recipe.batch / max(trainer.elapsed, 1e-9)
    result = {
        **found,
        "steps": trainer.step,
        "seconds": round(trainer.elapsed, 1),
        "images_per_second": round(rate, 1),
        "parameters": trainer.recipe.model.num_params(),
        "device": str(trainer.device),
        "bad": dict(bad),
        "id": model.id,
    }
    with atomic_write(out / "results.json", "w") as file:
        json.dump(result, file, indent=2)
    (out / "training.pt").unlink(missing_ok=True)
    print(
        f"{out}: held-out PSNR {found['psnr']:.2f} dB, SSIM {found['ssim']:.4f} over "
        f"{found['images']} images; codes used {found['codes_used']} of {found['codebook_size']}, "
        f"perplexity {found['perplexity']:.0f}; {trainer.step} steps, {rate:.0f} images/s; "
        f"unreadable images: {reasons(bad)}"
    )


def command_line() -> Any:
    """Return the command with one subcommand a preset, whose values are its defaults."""
    import tyro

    makers = {f.__name__: f for f in (presets.tiny_f4, presets.small_f8, presets.muse_f16_8192)}
    missing: Any = tyro.MISSING
    return tyro.extras.subcommand_type_from_defaults(
        {name: Train(recipe=f(), data=missing, out=missing) for name, f in makers.items()},
        {name: f.__doc__ or "" for name, f in makers.items()},
        prefix_names=False,
    )


if __name__ == "__main__":
    run(command_line(), main, prog="python -m tokenizer.train")
