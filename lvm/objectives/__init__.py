"""Objectives: one term a file.

A term turns a batch and the model's features into `Sums`: a sum and the count it is a sum over,
never a mean, so that accumulation, data parallelism and packing change no number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sums:
    """What a term adds up over the positions that count."""

    loss: Tensor  # fp32 scalar, the sum to be minimised
    count: Tensor  # scalar, how many positions
    nll: Tensor  # fp32 scalar, for the logs: negative log-likelihood, or the distance of patches
    correct: Tensor  # scalar, positions whose most likely code is the label

    @classmethod
    def stack(cls, parts: Sequence[Self]) -> Self:
        """Return the sums of several groups as tensors [groups]."""
        return cls(
            loss=torch.stack([part.loss for part in parts]),
            count=torch.stack([part.count for part in parts]),
            nll=torch.stack([part.nll for part in parts]),
            correct=torch.stack([part.correct for part in parts]),
        )
