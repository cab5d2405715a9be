"""What test_ranks runs on each of several ranks: the runs of a JSON file, one after the other.

Each run opens a process group at a port of its own, from PORTS: a rank that is ahead must not meet
the store of the group before. A run with `die_at` kills its process in the middle of that step, one
with `gradients` saves those of a single step.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from tokenizer import VQGANConfig, train
from tokenizer.dataset import Images
from tokenizer.images import list_images
from tokenizer.presets import Recipe
from tokenizer.trainer import Trainer
from tokenizer.world import World
from tokenizer.world import world as open_world

MODEL = VQGANConfig(
    image_size=16, channels=32, multipliers=(1, 2), res_blocks=1, latent_dim=16, code_dim=4,
    codebook_size=32, normalize_codes=True, pixel_range=(-1.0, 1.0),
)  # fmt: skip
RECIPE = {
    "model": MODEL, "steps": 8, "batch": 8, "plain": 0.3, "precision": "fp32", "restart_every": 2,
    "adversarial": 0.5, "adversarial_from": 0.6, "patch_layers": 2, "lecam": 0.01,
    "entropy": 0.01, "lr": 1e-3,
}  # fmt: skip


def command(data: Path, out: Path, **changes: Any) -> train.Train:
    recipe = Recipe(**{**RECIPE, **changes})
    return train.Train(
        recipe=recipe, data=(data,), out=out, device="cpu", workers=1, save_every=3, check_every=4
    )


def die_at(step: int) -> None:
    learn = Trainer.learn

    def dying(self: Trainer, *args: Any) -> Any:
        result = learn(self, *args)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    Trainer.learn = dying  # type: ignore[method-assign]


def gradients(data: Path, out: Path, world: World) -> None:
    """Save the gradients of one step, after the step that started the codes, and the averages."""
    trainer = Trainer(Recipe(**RECIPE | {"clip": 1e9}), world)
    images = Images(list_images(data), size=16, preprocess="crop", workers=1, world=world)
    trainer.start_codes(images.batches(0, batch=8, seed=0))
    trainer.step = 1  # codes out of use restart after the second step
    trainer.stats.counts[:5] = 0.0
    trainer.learn(next(images.batches(0, batch=8, seed=0)), 0.7)
    named = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    judged = {f"judge.{n}": p.grad for n, p in trainer.adversary.net.named_parameters()}
    if world.main:
        codes = {"codes": trainer.model.quantize.embedding.weight.detach()}
        torch.save(named | judged | codes | trainer.stats.state(), out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs = json.loads(Path(sys.argv[1]).read_text())
    for run, port in zip(runs, os.environ["PORTS"].split(), strict=True):
        os.environ["MASTER_PORT"] = port
        if step := run.pop("die_at", None):
            die_at(step)
        if run.pop("gradients", None):
            with open_world("cpu") as world:
                gradients(Path(run["data"]), Path(run["out"]), world)
            continue
        train.main(command(Path(run.pop("data")), Path(run.pop("out")), **run))
