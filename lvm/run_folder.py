"""The run folder: is this command that run, where does it stand, what is written about it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from kernels.attention import choose
from kernels.mask import Mask
from lvm import metrics
from lvm.checkpoint import Phase, Trainer
from lvm.codebook import codes_alone, require_codebook
from lvm.config import Run, differences
from lvm.parallel import check_shards
from tokenizer.cli import InputError, duration
from tokenizer.files import atomic_write
from tokenizer.world import World
from visual_sentences.image_loader import require_images
from visual_sentences.loader import check_batch
from visual_sentences.manifest import Manifest
from visual_sentences.mixture import Mixture
from visual_sentences.reading import require_codes


def resolve(run: Run, manifest: Manifest, world: World) -> Run:
    """Fill in what the data and the ranks decide; raises InputError where they do not fit."""
    if run.patches is None:
        require_codes(manifest, run.data)
        run = replace(run, model=replace(run.model, vocab_size=table_width(run, manifest)))
    else:
        require_images(manifest, run.data)
    check_batch(run.batch_rows, world=world.size)
    micro = min(run.micro_rows, run.batch_rows // world.size)
    check_batch(run.batch_rows, world=world.size, micro_rows=micro)
    if run.eval_every and "val" not in manifest.splits:
        raise InputError(
            f"--eval-every {run.eval_every}: {run.data} has no split val, only "
            f"{', '.join(manifest.splits)}; build it with splits, or use --eval-every 0"
        )
    if run.eval_every and run.eval_rows < 1:
        raise InputError(
            f"--eval-rows {run.eval_rows} is not a number of rows; --eval-every 0 validates never"
        )
    if run.distil.required and not run.distil.on:
        raise InputError(
            f"{run.recipe} learns from a teacher, and none was given; wanted --distil.teacher, the "
            "folder of a trained model, or --distil.logits, its logits from `python -m lvm.distil`"
        )
    if run.distil.on and run.patches is not None:
        raise InputError("--distil goes with a model of codes; this recipe predicts patches")
    check_shards(run.shards, world=world.size)
    try:
        choose(run.attention, Mask(causal=True), world.device)
    except ValueError as error:
        raise InputError(f"--attention {run.attention}: {error}") from error
    return replace(run, micro_rows=micro)


def table_width(run: Run, manifest: Manifest) -> int:
    """Return how many ids the model has; raises InputError where the data need more."""
    if run.model.codebook_dim:
        return codes_alone(run, manifest)
    if run.codebook:
        raise InputError(
            f"--codebook {run.codebook}: the model's embedding is a table of its own "
            "(model.codebook_dim 0); leave it out, or take a recipe such as delvm_300m"
        )
    needed = manifest.vocab.pad + 1
    width = run.model.vocab_size or manifest.vocab.size
    if width < needed:
        raise InputError(
            f"--model.vocab-size {width} is too small for {run.data}: its tokenizer has "
            f"{manifest.codebook_size} codes and needs {needed} ids with the specials; 0 takes "
            f"{manifest.vocab.size}"
        )
    return width


def standing(run: Run, manifest: Manifest, folder: Path | None) -> Trainer:
    """Return where the run of `run.out` stands; raises InputError where `run` is not that run."""
    mixture = Mixture.of(manifest, split="train", seed=run.seed, mix=run.mix).counts()
    phase = Phase(manifest=manifest.hash, mixture=mixture, first=0)
    trainer = Trainer(phases=(phase,)) if folder is None else Trainer.load(folder)
    if folder is None and run.model.codebook_dim:
        require_codebook(run, manifest)
    if (seen := trainer.phases[-1].manifest) != manifest.hash:
        raise InputError(
            f"{run.out} was trained on data with manifest {seen[:12]}, {run.data} has "
            f"{manifest.hash[:12]}: the samples would not be the same. Give it the old data, build "
            "that again, or start a new run with another --out"
        )
    config = Path(run.out) / "config.json"
    if config.exists():
        old = Run.from_json(json.loads(config.read_text(encoding="utf-8")))
        if found := differences(old, run):
            raise InputError(
                f"{run.out} is a run of another config ({'; '.join(found)}); give it the old "
                "values, or start a new run with another --out"
            )
    if (used := trainer.phases[-1].mixture) != mixture:
        raise InputError(
            f"{run.out} was trained on rows in shares {used}, this is {mixture}: the samples would "
            "not be the same. Give it the old --mix, or start a new run with another --out"
        )
    return trainer


def finished(run: Run, trainer: Trainer) -> bool:
    """Say whether the run has met one of its bounds, `steps` or `seconds`."""
    return trainer.step >= run.steps or bool(run.seconds and trainer.elapsed >= run.seconds)


def open_folder(run: Run, environment: dict[str, Any]) -> None:
    """Write what a run folder says about the run."""
    out = Path(run.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "DONE").unlink(missing_ok=True)
    with atomic_write(out / "config.json", "w") as file:
        json.dump(run.to_json(), file, indent=1)
    metrics.record_environment(out / "environment.json", environment)


def close_folder(run: Run, trainer: Trainer) -> None:
    """Mark the run as finished; a run that was marked before keeps its mark."""
    if (Path(run.out) / "DONE").exists():
        return
    with atomic_write(Path(run.out) / "DONE", "w") as file:
        file.write(summary(run, trainer) + "\n")


def summary(run: Run, trainer: Trainer) -> str:
    """Say in a line how far the run came, and which of its bounds it met."""
    bound = f"of {run.steps:,} updates"
    if run.seconds:
        bound += f" or {duration(run.seconds)}, whichever comes first"
    return (
        f"{trainer.step:,} updates ({bound}), {trainer.samples:,} rows, {trainer.tokens:,} tokens "
        f"in {duration(trainer.elapsed)}: {run.out}"
    )
