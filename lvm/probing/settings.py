"""What a probe is asked to do, and what it answers: and which images choose."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lvm.probing.data import Labelled
from lvm.probing.features import Dtype, Precision
from lvm.probing.fit import Schedule, Setting
from tokenizer.cli import InputError
from visual_sentences.seeds import seeded

Kind = Literal["linear", "attentive", "knn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything about a probe but the model and the data."""

    out: Path
    cache: Path
    blocks: Sequence[str]
    window: int
    settings: Sequence[Setting]
    schedule: Schedule
    held_out: float
    neighbours: int
    temperature: float
    dtype: Dtype
    precision: Precision
    head: Path | None
    stream: bool
    augment: bool
    batch: int
    workers: int
    device: torch.device


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """Images to learn from and images to be probed by, of the same classes."""

    train: Labelled
    val: Labelled
    held_out: np.ndarray
    """Bool [n]: images of train that choose among settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A probe's answers to the m images of the probed split, and how it was chosen."""

    top1: np.ndarray  # bool [m]
    top5: np.ndarray  # bool [m]
    chosen: dict[str, Any]
    sweep: list[dict[str, Any]]


def hold_out(groups: Sequence[str], *, share: float, seed: int) -> np.ndarray:
    """Return bool [n]: about `share` of the images, whole groups, by a hash of each group.

    Raises InputError where either part is empty.
    """
    limit = share * 2**64
    held = np.array([seeded(seed, "held out", group) < limit for group in groups])
    if not held.any() or held.all():
        raise InputError(
            f"--held-out {share} of {len(set(groups))} groups of training images leaves "
            f"{'nothing to learn from' if held.all() else 'nothing held out'}; change it, or "
            "--group-by, or --seed"
        )
    return held
