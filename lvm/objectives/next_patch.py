"""Next patch: what a place predicts of the patch `step` places ahead (AIM, XTRA, NEPA).

Sums over predicted patches and their count, over the whole batch: a mean of means would make the
loss depend on how a batch is cut.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lvm.objectives import Sums


def next_pixels(predicted: Tensor, target: Tensor, scored: Tensor, *, step: int = 1) -> Sums:
    """Sum over patches the mean squared error of `predicted` [B, N, C] at place i against `target`
    [B, N, C] at place i + step, where `scored` [B, N] is true at i (AIM, section 3.1)."""
    error = (predicted[:, :-step].float() - target[:, step:]).square().mean(-1)
    return _sums(error, scored[:, :-step])


def next_embedding(features: Tensor, embedded: Tensor, scored: Tensor, *, step: int = 1) -> Sums:
    """Sum 1 - cosine of features [B, N, D] at place i to `embedded` [B, N, D] at place i + step.

    The embedding gets no gradient from here; without that both would become constant (Xu et al.
    2025, NEPA).
    """
    goal = embedded.detach()[:, step:].float()
    error = 1 - F.cosine_similarity(features[:, :-step].float(), goal, dim=-1)
    return _sums(error, scored[:, :-step])


def _sums(error: Tensor, scored: Tensor) -> Sums:
    loss = torch.where(scored, error, 0.0).sum()
    return Sums(loss=loss, count=scored.sum(), nll=loss.detach(), correct=torch.zeros_like(loss))
