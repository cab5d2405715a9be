"""The Fréchet distance between two sets of features, from statistics that take no room.

    d² = |μ₁ − μ₂|² + tr C₁ + tr C₂ − 2 tr (C₁ C₂)^½          (Dowson and Landau, 1982)

With Inception's features this is FID; between originals and their reconstructions, rFID.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenizer.cli import InputError

FULL_RANK = 2048  # images below this leave the covariance of 2048 features singular
STEADY = 10_000  # and below this the distance is biased upwards by more than one cares to publish


@dataclass(slots=True)
class Moments:
    """Count, mean and scatter of rows that come in pieces; float64, whatever the rows are.

    Two pieces are joined by Chan, Golub and LeVeque's rule (1979), which loses no digits where
    Σxx' − n·μμ' would: 2048 features need 32 MiB however many the images.
    """

    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))  # [D]
    scatter: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))

    def update(self, rows: Tensor) -> None:
        """Take in [N, D]."""
        rows = rows.double()
        mean = rows.mean(dim=0)
        centred = rows - mean
        scatter = centred.T @ centred
        if not self.count:
            self.count, self.mean, self.scatter = len(rows), mean, scatter
            return
        total = self.count + len(rows)
        gap = mean - self.mean
        self.scatter += scatter + torch.outer(gap, gap) * (self.count * len(rows) / total)
        self.mean = self.mean + gap * (len(rows) / total)
        self.count = total

    def covariance(self) -> Tensor:
        """Return the unbiased covariance [D, D]."""
        if self.count < 2:
            raise InputError(f"a covariance of {self.count} images; wanted 2 at least")
        return self.scatter / (self.count - 1)


def frechet(first: Moments, second: Moments) -> float:
    """Return the squared Fréchet distance of two Gaussians with these moments.

    With S = C₁^½: tr (C₁C₂)^½ is the sum of the roots of the eigenvalues of C₁C₂ = S·(SC₂), and
    S·(SC₂) has those of (SC₂)·S, as any AB has those of BA. S C₂ S is symmetric, so `eigh` finds
    them real and not below 0, without the square root of a lopsided matrix that other programs
    take from scipy, and without its imaginary rest where a covariance is singular.
    """
    one, two = first.covariance(), second.covariance()
    values, vectors = torch.linalg.eigh(one)
    root = (vectors * rooted(values)) @ vectors.T
    shared = rooted(torch.linalg.eigvalsh(root @ two @ root)).sum()
    gap = (first.mean - second.mean).square().sum()
    return float(gap + one.trace() + two.trace() - 2 * shared)


def rooted(values: Tensor) -> Tensor:
    """Return the square roots of eigenvalues, 0 for those that are only rounding.

    The root of a rounding error of 1e-16 is 1e-8, and of a singular covariance there are thousands.
    """
    noise = values.max().clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    return torch.where(values > noise, values, 0.0).sqrt()


def caution(images: int) -> str:
    """Return what keeps an rFID over so few images from being compared with others, or ""."""
    if images < FULL_RANK:
        return (
            f"{images} images are fewer than the {FULL_RANK} features: the covariance is singular "
            "and the figure far too high; compare it with nothing"
        )
    if images < STEADY:
        return (
            f"{images} images bias it upwards; compare it only over the same images "
            "(published figures: the 50,000 of ImageNet's validation set at 256 px)"
        )
    return ""
