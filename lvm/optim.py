"""Optimisers, learning-rate schedules and gradient clipping.

An update is counted from 0, as optax counts: with warm-up, update 0 has rate 0.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lvm.config import Optim
from lvm.muon import Muon

FALL = 0.2  # the part of a wsd run that falls, where the config does not say


def horizon(step: int, *, steps: int, elapsed: float = 0.0, seconds: float = 0.0) -> float:
    """Return how many updates the run will have made at its end, as far as that is known.

    A run bounded by time ends after `steps` updates or `seconds`, whichever comes first. Its
    progress is max(step / steps, elapsed / seconds), and step / progress is where the pace so far
    leads to. Both bounds give `steps` at the first update.
    """
    if not seconds or not step:
        return float(steps)
    return step / max(step / steps, elapsed / seconds)


def rate(step: int, optim: Optim, *, horizon: float) -> float:
    """Return the schedule's factor of the peak rate at update `step` of `horizon`.

    cosine  warm-up from 0 in `warmup` updates, then half a cosine to `final` at `decay_steps`,
            counted from update 0 as in optax.warmup_cosine_decay_schedule, and `final` from there
    wsd     warm-up, the peak, and in the last `decay_steps` updates a straight line to `final`
            (warm-up, stable, decay; Hu et al. 2024, MiniCPM)
    """
    if step < optim.warmup:
        return step / optim.warmup
    if optim.schedule == "cosine":
        end = optim.decay_steps or horizon
        done = (step - optim.warmup) / max(end - optim.warmup, 1.0)
        shape = (1.0 + math.cos(math.pi * min(1.0, done))) / 2.0
    else:
        length = optim.decay_steps or FALL * horizon
        shape = min(1.0, max(0.0, (horizon - step) / max(length, 1.0)))
    return optim.final + (1.0 - optim.final) * shape


def role(name: str, parameter: Tensor) -> str:
    """Return what a weight is to the optimiser: matrix (of a block), embedding, head or vector."""
    if parameter.ndim < 2:
        return "vector"
    if "layers." in name:
        return "matrix"
    return "embedding" if name.endswith(("embed.weight", "embed.pos")) else "head"


def optimisers(model: nn.Module, optim: Optim) -> list[torch.optim.Optimizer]:
    """Make the optimisers of a sharded or whole model: AdamW, or Muon for the blocks' matrices too.

    Muon (lvm.muon) scales the rate of a matrix by its shape, as `muon_scale` says (Jordan et al.
    2024; Liu et al. 2025, "Muon is scalable for LLM training"); its decay follows the rate before
    that. Norms and the embedding are not decayed unless `decay_all` says so. Every group carries
    its peak rate as "peak", from which `set_rate` computes "lr".
    """
    parts: dict[str, list[nn.Parameter]] = {"vector": [], "matrix": [], "embedding": [], "head": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts[role(name, parameter)].append(parameter)
    muon = parts.pop("matrix") if optim.name == "muon" else []
    decayed = parts["head"] + parts.get("matrix", [])
    spared = parts["embedding"] + parts["vector"]
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay, "peak": optim.lr},
        {
            "params": spared,
            "weight_decay": optim.weight_decay if optim.decay_all else 0.0,
            "peak": optim.lr,
        },
    ]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True
        )
    ]
    if muon:
        matrices = [{"params": muon, "peak": optim.muon_lr}]
        made.append(
            Muon(
                matrices,
                lr=optim.muon_lr,
                weight_decay=optim.weight_decay,
                adjust_lr_fn=optim.muon_scale,
            )
        )
    return made


def set_rate(made: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's rate to `factor` of its peak."""
    for optimiser in made:
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * factor


def clip(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients so that their joint norm is at most `limit` (0: leave them).

    Returns the norm before, a scalar on the device; on every rank that of the whole gradient.
    """
    with_grad = [p for p in parameters if p.grad is not None]
    norm = get_total_norm([p.grad for p in with_grad if p.grad is not None], foreach=True)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if limit:
        clip_grads_with_norm_(with_grad, limit, norm, foreach=True)
    return norm
