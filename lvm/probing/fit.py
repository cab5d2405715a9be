"""Training a bank of heads: AdamW, warm-up and cosine, exact resume; and measuring it.

All members see the same batches; the sum of their losses is minimised, so each gets its own
gradient, and its own rate and decay from its parameter group.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lvm.probing.features import Features
from lvm.probing.heads import AttentiveHead, Bank, LinearHead
from tokenizer.cli import CommandError, Progress
from tokenizer.files import atomic_write
from visual_sentences.seeds import seeded

WARMUP = 0.05  # part of the steps in which the rate rises from 0
BETAS = (0.9, 0.999)


@dataclass(frozen=True, slots=True)
class Setting:
    """Of AdamW: the peak rate, and the decay of matrices."""

    rate: float
    decay: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    epochs: int
    batch: int
    """Images a step, or all there are; those left over at the end of an epoch wait for the next,
    which has another order."""
    seed: int = 0
    save_seconds: float = 60.0
    """Between states written; 0 writes one after every step."""

    def __post_init__(self) -> None:
        assert self.epochs > 0 and self.batch > 1, "batch norm needs two images"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Of M members on n images."""

    top1: np.ndarray  # bool [M, n]
    top5: np.ndarray  # bool [M, n]
    loss: np.ndarray  # fp64 [M], mean cross entropy


def fit(
    bank: Bank,
    settings: Sequence[Setting],
    features: Features,
    labels: np.ndarray,
    rows: np.ndarray,
    *,
    schedule: Schedule,
    state: Path,
    device: torch.device,
    label: str = "probe",
    show: bool = False,
) -> None:
    """Train a bank on images `rows` [n] of `features`, whose labels are int64 [len(features)].

    The bank, made on the CPU, ends on `device` in eval mode. `state` is a file that is read if it
    is there and written now and then: a run that was killed goes on from it to the same bits. The
    caller deletes it.
    """
    _draw(bank, schedule.seed)
    bank.to(device).train()
    optimiser = torch.optim.AdamW(_groups(bank, settings), betas=BETAS)
    batch = min(schedule.batch, len(rows))
    each = len(rows) // batch
    total, done = schedule.epochs * each, 0
    if state.is_file():
        found = torch.load(state, map_location=device, weights_only=True)
        bank.load_state_dict(found["bank"])
        optimiser.load_state_dict(found["optimiser"])
        done = found["step"]
    saved = time.monotonic()
    order: tuple[int, np.ndarray] = (-1, rows)
    with Progress(label, total=total, unit="steps", done=done, enabled=show) as progress:
        for step in range(done, total):
            epoch, place = divmod(step, each)
            if order[0] != epoch:
                random = np.random.default_rng(seeded(schedule.seed, "epoch", epoch))
                order = (epoch, random.permutation(rows))
            chosen = order[1][place * batch : (place + 1) * batch]
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * factor(step, total)
            losses = _losses(bank(features.batch(chosen, epoch)), _labels(labels, chosen, device))
            optimiser.zero_grad()
            losses.mean(1).sum().backward()
            optimiser.step()
            progress.update(loss=float(losses.detach().mean(1).min()))
            last = step + 1 == total
            if last or time.monotonic() - saved >= schedule.save_seconds:
                with atomic_write(state) as file:
                    torch.save(
                        {
                            "step": step + 1,
                            "bank": bank.state_dict(),
                            "optimiser": optimiser.state_dict(),
                        },
                        file,
                    )
                saved = time.monotonic()
    bank.eval()


def factor(step: int, total: int) -> float:
    """Return what multiplies the peak rate at a step from 0: up to 1, then along a cosine to 0."""
    warm = max(1, round(WARMUP * total))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


@torch.no_grad()
def measure(
    bank: nn.Module, features: Features, labels: np.ndarray, rows: np.ndarray, *, batch: int
) -> Measured:
    """Return how the members of a bank in eval mode do on images `rows` [n]; or one head.

    A class counts as found if fewer than 1 (or 5) others have logits as high: ties are misses, so a
    head that says nothing finds nothing.
    """
    device = next(bank.parameters()).device
    top1, top5, loss = [], [], np.zeros(1)
    for first in range(0, len(rows), batch):
        chosen = rows[first : first + batch]
        goal = _labels(labels, chosen, device)
        logits = bank(features.batch(chosen))
        logits = logits if logits.dim() == 3 else logits[None]
        found = places(logits, goal)
        top1.append((found < 1).cpu().numpy())
        top5.append((found < 5).cpu().numpy())
        loss = loss + _losses(logits, goal).double().sum(1).cpu().numpy()
    return Measured(
        top1=np.concatenate(top1, 1), top5=np.concatenate(top5, 1), loss=loss / len(rows)
    )


def places(logits: Tensor, goal: Tensor) -> Tensor:
    """Return how many other classes stand as high as the right one, [..., B]; of NaN, all."""
    right = logits.gather(-1, goal.expand(logits.shape[:-1])[..., None])
    return (~(logits < right)).sum(-1) - right[..., 0].eq(right[..., 0]).long()


def best(measured: Measured) -> int:
    """Return the member of the most images right, of equals the one of the smallest loss."""
    loss = np.nan_to_num(measured.loss, nan=np.inf)
    return min(range(len(loss)), key=lambda m: (-measured.top1[m].mean(), loss[m], m))


def _losses(logits: Tensor, goal: Tensor) -> Tensor:
    """Return the cross entropy [M, B] of logits [M, B, K]."""
    goal = goal.expand(logits.shape[:-1])
    return F.cross_entropy(logits.flatten(0, 1), goal.flatten(), reduction="none").view(goal.shape)


def _labels(labels: np.ndarray, rows: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(labels[rows]).to(device)


def _draw(bank: Bank, seed: int) -> None:
    """Give all members the same first weights, whatever their number."""
    for member in bank.members:
        assert isinstance(member, LinearHead | AttentiveHead)
        member.init_weights(torch.Generator().manual_seed(seed))


def _groups(bank: Bank, settings: Sequence[Setting]) -> list[dict[str, object]]:
    """Return a group of matrices and one of vectors for each member; only matrices decay."""
    groups: list[dict[str, object]] = []
    for number, member in enumerate(bank.members):
        setting = settings[number % len(settings)]
        for matrices in (True, False):
            chosen = [p for p in member.parameters() if (p.dim() == 2) == matrices]
            decay = setting.decay if matrices else 0.0
            groups.append(
                {"params": chosen, "lr": setting.rate, "peak": setting.rate, "weight_decay": decay}
            )
    return groups


def unusable(measured: Measured) -> None:
    """Raise CommandError where no member has a finite loss."""
    if not np.isfinite(measured.loss).any():
        raise CommandError(
            "no setting of the sweep has a finite loss; give smaller --rates, or --dtype fp32"
        )
