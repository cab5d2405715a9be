"""Train a VQ-GAN: `python -m tokenizer.train PRESET --data DIR --out DIR`.

A run folder is a tokenizer folder (`config.json`, `model.safetensors`) with `run.json` (what was
asked), `metrics.jsonl`, `pictures/` of held-out images on the way, while it lasts `training.pt`,
and in the end `results.json` and `samples.png`. `torchrun --nproc-per-node N -m tokenizer.train`
splits each batch over N processes. A killed run goes on from its last checkpoint when the command
is repeated; bounded by steps alone, it ends with the very weights of a run that nothing
interrupted.
"""

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from torch import Tensor
from tyro.conf import OmitArgPrefixes

from tokenizer import interop, presets
from tokenizer.cli import InputError, Progress, run
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
from tokenizer.devices import Device
from tokenizer.evaluate import SHOWN, measure, picture
from tokenizer.files import atomic_write, remove_temporaries
from tokenizer.history import History
from tokenizer.images import save_image
from tokenizer.presets import Recipe
from tokenizer.provenance import provenance
from tokenizer.trainer import Trainer
from tokenizer.world import Signals
from tokenizer.world import world as open_world

VAL_MOST = 2048  # images of --val that are measured
CHECKED = 256  # held-out images of each look on the way
LOG_EVERY = 10  # steps between rows of metrics.jsonl
SHOWN_WHILE = ("loss", "psnr", "codes_used", "perplexity", "judged", "images_per_second")


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
    check_every: int = 500
    """Steps between looks at 256 held-out images once codes are in use, with figures and a picture;
    0: none."""
    tensorboard: bool = False
    """Write figures and pictures for TensorBoard too; needs the package tensorboard."""


def fit(trainer: Trainer, images: Images, held: Tensor, *, command: Train) -> bool:
    """Train from where `trainer` is, with checkpoints on the way; False if told to stop before."""
    recipe, world, out = trainer.recipe, trainer.world, command.out
    history = History(out, trainer, tensorboard=command.tensorboard)
    order = {"batch": recipe.batch, "seed": recipe.seed}
    batches = images.batches(trainer.step, **order)
    before, start = trainer.elapsed, time.monotonic()
    left = recipe.seconds - before if recipe.seconds else None
    with (
        Signals() as signals,
        Progress(
            "train",
            total=recipe.steps,
            unit="steps",
            done=trainer.step,
            seconds=left,
            enabled=world.main,
        ) as progress,
    ):
        while not finished(trainer):
            fraction = trainer.fraction()
            if not trainer.quantizing and fraction >= recipe.plain:
                trainer.start_codes(images.batches(trainer.step, **order))
            parts = trainer.learn(next(batches), fraction)
            history.count(recipe.batch, parts.get("chosen"))
            shown, saves = {}, trainer.step % command.save_every == 0
            if trainer.step % LOG_EVERY == 0 or saves or trainer.step == recipe.steps:
                # Before every save too: none then holds a loss that is no number, and a resumed
                # run counts the use of codes over the same steps.
                row = history.row(parts, images.bad)
                shown = {k: row[k] for k in SHOWN_WHILE if k in row}
            due = command.check_every and trainer.step % command.check_every == 0
            if due and trainer.quantizing:
                check(trainer, history, held, out=out)
            # One small sum over the hosts, so that all ranks stop and schedule alike.
            clock = before + time.monotonic() - start if world.main else 0.0
            told, trainer.elapsed = world.add(bool(signals.seen), clock)
            if told or saves:
                save(trainer, out)
            progress.update(1, **shown)
            if told:
                return finished(trainer)
    return True


def finished(trainer: Trainer) -> bool:
    steps, seconds = trainer.recipe.steps, trainer.recipe.seconds
    return (steps is not None and trainer.step >= steps) or (
        seconds is not None and trainer.elapsed >= seconds
    )


def save(trainer: Trainer, out: Path) -> None:
    if trainer.world.main:
        trainer.save(out / "training.pt")
        interop.save(trainer.model, out)
    trainer.world.wait()


def check(trainer: Trainer, history: History, held: Tensor, *, out: Path) -> None:
    """Look at held-out images: a row of figures, and a picture of the same few every time."""
    began = time.monotonic()
    if trainer.world.main:
        model = trainer.model.eval()
        found = measure(model, held[spread(range(len(held)), CHECKED)]).summary()
        names = ("psnr", "ssim", "codes_used", "perplexity")
        row = {"step": trainer.step, "elapsed": round(trainer.elapsed, 3)}
        history.write(row | {f"held_out_{name}": found[name] for name in names})
        shown = picture(model, held[spread(range(len(held)), 2 * SHOWN)])
        (out / "pictures").mkdir(exist_ok=True)
        save_image(out / "pictures" / f"{trainer.step:07d}.png", shown)
        history.board.picture("held out", shown, step=trainer.step)
        model.train()
    trainer.world.wait()
    history.pause(time.monotonic() - began)


def main(command: Train) -> None:
    recipe, out = command.recipe, command.out
    least = min(command.save_every, command.limit or 1, command.check_every + 1)
    if least <= 0 or command.workers < 0:
        raise InputError(
            "--save-every and --limit must be more than 0, --check-every and --workers not below 0"
        )
    with open_world(command.device) as world:
        if recipe.batch % world.size:
            raise InputError(
                f"--batch {recipe.batch} does not divide by {world.size} processes; give a "
                f"multiple of {world.size}"
            )
        named = spread(find_images(command.data), command.limit)
        if command.val:
            files = [p for _, p in named]
            held = [p for _, p in spread(find_images(command.val), VAL_MOST)]
        else:
            files, held = hold_out(named)
        asked = {**asdict(recipe), "images": len(files), "held_out": len(held)}
        asked["names"] = fingerprint(named)
        state = standing(out, json.loads(json.dumps(asked, default=str)))
        world.wait()  # nobody writes before everybody has looked
        if state == "finished":
            if world.main:
                found = json.loads((out / "results.json").read_text())
                print(f"{out} is finished ({found['steps']} steps); for another give another --out")
            return
        trainer = Trainer(recipe, world)
        if state == "new" and world.main:
            out.mkdir(parents=True, exist_ok=True)
            with atomic_write(out / "run.json", "w") as file:
                json.dump({"asked": asked, **provenance()}, file, indent=2, default=str)
        elif world.main:
            remove_temporaries(out)
        if (out / "training.pt").exists():
            trainer.restore(out / "training.pt")
            if world.main:
                print(f"resuming {out} at step {trainer.step}")
        reading: dict[str, Any] = {
            "size": recipe.model.image_size,
            "preprocess": recipe.preprocess,
            "workers": command.workers or default_workers(),
        }
        seen, bad = decode_all(held, label="read held-out images", progress=world.main, **reading)
        images = Images(files, world=world, **reading)
        if not fit(trainer, images, seen, command=command):
            if world.main:
                print(f"told to stop at step {trainer.step}; the same command goes on")
            return
        if world.main:
            finish(trainer, seen, out=out, bad=images.bad + bad)
        world.wait()


def standing(out: Path, asked: dict[str, Any]) -> Literal["new", "begun", "finished"]:
    """Look at the run folder; raises InputError where it holds something else.

    What only bounds a run, steps and seconds, may change between the parts of one.
    """
    record = out / "run.json"
    if not record.exists():
        if out.exists() and any(out.iterdir()):
            raise InputError(f"{out} is not empty and holds no training run; give another --out")
        return "new"
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
    return "finished" if (out / "results.json").exists() else "begun"


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
        "device": str(trainer.world.device),
        "processes": trainer.world.size,
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

    offered = (presets.tiny_f4, presets.small_f8, presets.muse_f16_8192, presets.vq_f16_16384)
    makers = {f.__name__: f for f in offered}
    missing: Any = tyro.MISSING
    return tyro.extras.subcommand_type_from_defaults(
        {name: Train(recipe=f(), data=missing, out=missing) for name, f in makers.items()},
        {name: f.__doc__ or "" for name, f in makers.items()},
        prefix_names=False,
    )


if __name__ == "__main__":
    run(command_line(), main, prog="python -m tokenizer.train")
