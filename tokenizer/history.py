"""What a training run tells of itself: metrics.jsonl always, TensorBoard if asked for."""

import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenizer.cli import CommandError, InputError
from tokenizer.codebook import perplexity
from tokenizer.files import atomic_write

if TYPE_CHECKING:
    import numpy as np

    from tokenizer.trainer import Trainer

METRICS = "metrics.jsonl"


class Board:
    """TensorBoard's files in `folder`, or nothing; only the main rank writes."""

    def __init__(self, folder: Path, *, wanted: bool, main: bool, step: int) -> None:
        self.writer: Any = None
        if wanted:
            try:  # on every rank, so that all of them stop
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise InputError(
                    f"--tensorboard needs the package tensorboard ({error}); pip install "
                    "tensorboard, or leave it out: metrics.jsonl has the same figures"
                ) from error
            if main:
                self.writer = SummaryWriter(folder, purge_step=step or None)

    def scalars(self, row: dict[str, Any]) -> None:
        if self.writer is not None:
            for name, value in row.items():
                if name != "step":
                    self.writer.add_scalar(name, value, row["step"])

    def picture(self, name: str, image: "np.ndarray", *, step: int) -> None:
        if self.writer is not None:
            self.writer.add_image(name, image, step, dataformats="HWC")
            self.writer.flush()


class History:
    """One row every few steps and one a look at held-out images; only the main rank writes.

    A resumed run cuts it back to the step of its checkpoint.
    """

    def __init__(self, out: Path, trainer: "Trainer", *, tensorboard: bool) -> None:
        self.path, self.trainer, self.world = out / METRICS, trainer, trainer.world
        if self.world.main and self.path.exists():
            kept = [r for r in self.path.read_text().splitlines() if _step(r) <= trainer.step]
            with atomic_write(self.path, "w") as file:
                file.writelines(f"{line}\n" for line in kept)
        self.board = Board(
            out / "tensorboard", wanted=tensorboard, main=self.world.main, step=trainer.step
        )
        codes = trainer.model.codebook_size
        self.counts = torch.zeros(codes, dtype=torch.int64, device=self.world.device)
        self.images, self.since = 0, time.monotonic()

    def count(self, images: int, chosen: Tensor | None) -> None:
        """Note the images of a step, and the codes that were chosen for this rank's."""
        self.images += images
        if chosen is not None:
            self.counts += torch.bincount(chosen.flatten(), minlength=len(self.counts))

    def row(self, parts: dict[str, Tensor], bad: Counter[str]) -> dict[str, Any]:
        """Write and return the row of the present step; code use is that since the last row.

        Every rank calls. Raises CommandError where the loss is no number.
        """
        trainer, now = self.trainer, time.monotonic()
        names = sorted(parts.keys() - {"chosen"})
        sums = self.world.add(*(float(parts[name]) for name in names))
        means = {k: v / self.world.size for k, v in zip(names, sums, strict=True)}
        if not math.isfinite(means["loss"]):
            raise CommandError(
                f"the loss is {means['loss']} at step {trainer.step}; start again with a lower "
                "--lr or --precision fp32"
            )
        counts = self.world.total(self.counts)
        use = {"codes_used": int((counts > 0).sum()), "perplexity": perplexity(counts)}
        row = {
            "step": trainer.step,
            "elapsed": round(trainer.elapsed, 3),
            **{k: v for k, v in means.items() if k != "mse"},
            "psnr": -10 * math.log10(max(means["mse"], 1e-10)),
            **(use if use["codes_used"] else {}),  # nothing is chosen in the plain part
            "lr": trainer.rate,
            "images_per_second": round(self.images / max(now - self.since, 1e-9), 2),
            "bad": bad.total(),
        }
        self.write(row)
        self.counts.zero_()
        self.images, self.since = 0, now
        return row

    def write(self, row: dict[str, Any]) -> None:
        if self.world.main:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
            self.board.scalars(row)

    def pause(self, seconds: float) -> None:
        """Leave time that was spent on something else out of the rate."""
        self.since += seconds


def _step(line: str) -> float:
    """Return the step of a row, or more than any for the half row of a killed process."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf
