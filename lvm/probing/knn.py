"""k nearest neighbours by cosine, votes weighted by exp(similarity / temperature).

As DINO evaluates (Caron et al. 2021, appendix; Wu et al. 2018): k 20, temperature 0.07. Nothing is
learnt, and nothing centred: what all features share adds to every similarity alike.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 1 << 16  # remembered images compared at once


def votes(
    queries: Tensor,
    memory: Tensor,
    labels: Tensor,
    *,
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """Return votes fp32 [q, K] of queries [q, D] from memory [n, D] with labels int64 [n].

    All of a memory of fewer than k images votes. The weights are relative to the nearest
    neighbour's, so that none overflows.
    """
    queries = F.normalize(queries.float(), dim=1)
    near, which = queries.new_empty(len(queries), 0), labels.new_empty(len(queries), 0)
    for first in range(0, len(memory), CHUNK):
        part = F.normalize(memory[first : first + CHUNK].float(), dim=1)
        near = torch.cat([near, queries @ part.T], 1)
        mine = torch.arange(first, first + len(part), device=labels.device)
        which = torch.cat([which, mine.expand(len(queries), -1)], 1)
        near, kept = near.topk(min(k, near.shape[1]), dim=1)
        which = which.gather(1, kept)
    weights = ((near - near[:, :1]) / temperature).exp()
    return weights.new_zeros(len(queries), classes).scatter_add_(1, labels[which], weights)
