"""Objectives: one term a file.

A term turns a batch and the model's features into `Sums`: a sum and the count it is a sum over,
never a mean, so that accumulation, data parallelism and packing change no number.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sums:
    """What a term adds up over the positions that count."""

    loss: Tensor  # fp32 scalar, the sum to be minimised
    count: Tensor  # scalar, how many positions
    nll: Tensor  # fp32 scalar, the part of `loss` that is negative log-likelihood, for the logs
    correct: Tensor  # scalar, positions whose most likely code is the label
