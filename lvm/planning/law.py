"""A scaling law L(N, D) = E + A / N^a + B / D^b, fitted to the final losses of runs.

N weights without tables, D tokens, L mean negative log-likelihood (nats a code); E is what no model
and no amount of data removes (Hoffmann et al. 2022, "Training compute-optimal large language
models", approach 3). As there, the sum of Huber's loss (δ = 1e-3) of the residuals of log L is
minimised from many starts, for one bad run must not bend the law. Here the minimiser is a damped
Gauss–Newton (Levenberg–Marquardt) on reweighted squares, for all starts and all resamples at once;
the unknowns are log E, log a, log b, and the logarithms of both terms at the runs' mean log N and
log D, which are less entangled than A and B themselves.

The best spending of C = 6·N·D FLOPs (attention and tables left out, as in that paper) is

    N = G (C/6)^(b/(a+b)),   D = (C/6)^(a/(a+b)) / G,   G = (a·A / (b·B))^(1/(a+b))
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DELTA = 1e-3
ITERATIONS = 200
STALL = 1e-13
"""Smallest fall of the objective, relative to itself, that counts as one."""
SPAN = (-4.0, 1.0)
"""log a and log b: exponents from 0.018 to 2.7."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One finished run."""

    name: str
    params: float
    tokens: float
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """L(N, D) = E + A / N^a + B / D^b."""

    E: float
    A: float
    a: float
    B: float
    b: float

    def at_an_end(self, name: str) -> bool:
        """Say whether an exponent has run to an end of what is searched: it stands for nothing."""
        value = math.log(getattr(self, name))
        return min(value - SPAN[0], SPAN[1] - value) < 1e-6

    def loss(self, params: float, tokens: float) -> float:
        return self.E + self.A * params**-self.a + self.B * tokens**-self.b

    def best(self, flops: float) -> tuple[float, float]:
        """Return the N and D that spend `flops` best."""
        ratio = math.log(self.a * self.A / (self.b * self.B)) / (self.a + self.b)
        c = math.log(flops / 6)
        params = ratio + c * self.b / (self.a + self.b)
        most = 700.0  # beyond that a double overflows; a law of noise may ask for it
        return math.exp(min(params, most)), math.exp(min(c - params, most))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A law and how far it is to be trusted."""

    law: Law
    residual: float
    """Root mean square of log L less the law's, as a part of L."""
    explained: float
    """Adjusted R² of log L: 1 all of its variance, 0 what its mean says; five unknowns counted."""
    resampled: tuple[Law, ...]
    """Laws of runs drawn with replacement, for bands."""


def fit(points: Sequence[Point], *, resamples: int = 200, seed: int = 0) -> Fit:
    """Fit the law to at least six runs of three sizes and three lengths (`enough` says whether)."""
    n = torch.tensor([p.params for p in points], dtype=torch.float64).log()
    d = torch.tensor([p.tokens for p in points], dtype=torch.float64).log()
    loss = torch.tensor([p.loss for p in points], dtype=torch.float64).log()
    x, y = n - n.mean(), d - d.mean()
    starts = _starts(float(loss.exp().min()))
    ones = torch.ones(len(starts), len(points), dtype=torch.float64)
    found, cost = _minimise(starts, x, y, loss, ones)
    best = found[cost.argmin()]

    draws = _draws(points, resamples, seed)
    # The best law, and a few starts besides, for a resample may lie in another valley.
    few = torch.cat([best[None], starts[:: max(1, len(starts) // 8)]])
    several = few.repeat(len(draws), 1)
    weights = draws.repeat_interleave(len(few), 0)
    found, cost = _minimise(several, x, y, loss, weights)
    chosen = cost.view(len(draws), len(few)).argmin(1) if len(draws) else cost.long()
    found = found.view(-1, len(few), 5)[torch.arange(len(draws)), chosen]

    residual = _predict(best[None], x, y)[0][0] - loss
    spread = float((loss - loss.mean()).square().sum())
    freedom = (len(points) - 1) / max(1, len(points) - 5)
    explained = 1 - float(residual.square().sum()) / spread * freedom if spread else 0.0
    centre = float(n.mean()), float(d.mean())
    return Fit(
        law=_law(best, centre),
        residual=float(residual.square().mean().sqrt()),
        explained=explained,
        resampled=tuple(_law(one, centre) for one in found),
    )


def enough(points: Sequence[Point]) -> bool:
    """Say whether runs can tell the five unknowns apart."""
    sizes, lengths = {p.params for p in points}, {p.tokens for p in points}
    return len(points) >= 6 and len(sizes) >= 3 and len(lengths) >= 3


def _starts(least: float) -> Tensor:
    """Return starts [K, 5]: parts of the least loss, of what is above it, and exponents."""
    parts = (0.2, 0.5, 0.8, 0.95)
    shares = (0.2, 0.5, 0.8)
    exponents = (0.1, 0.3, 0.6, 1.0)
    rows = [
        (least * part, least * (1 - part) * share, a, least * (1 - part) * (1 - share), b)
        for part in parts
        for share in shares
        for a in exponents
        for b in exponents
    ]
    return torch.tensor(rows, dtype=torch.float64).log()


def _predict(theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return log L [K, n] and its derivative [K, n, 5] by theta [K, 5]."""
    e, p, log_a, q, log_b = (column[:, None] for column in theta.unbind(1))
    a, b = log_a.exp(), log_b.exp()
    terms = torch.stack([e.expand(-1, len(x)), p - a * x, q - b * y], -1)
    share = terms.softmax(-1)
    of_e, of_p, of_q = share.unbind(-1)
    jacobian = torch.stack([of_e, of_p, -of_p * a * x, of_q, -of_q * b * y], -1)
    return terms.logsumexp(-1), jacobian


def _cost(residual: Tensor, weights: Tensor) -> Tensor:
    size = residual.abs()
    huber = torch.where(size <= DELTA, size.square() / 2, DELTA * (size - DELTA / 2))
    return (weights * huber).sum(1)


def _minimise(
    theta: Tensor, x: Tensor, y: Tensor, loss: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Minimise K problems at once from theta [K, 5]; weights [K, n] count each run."""
    theta = theta.clone()
    damping = torch.full((len(theta),), 1e-2, dtype=torch.float64)
    predicted, jacobian = _predict(theta, x, y)
    residual = predicted - loss
    cost = _cost(residual, weights)
    least = float(loss.min()) - 20.0  # log E: e^-20 of a loss is 0
    for _ in range(ITERATIONS):
        pull = weights * (DELTA / residual.abs().clamp_min(DELTA))
        weighted = jacobian * pull[..., None]
        curvature = weighted.transpose(1, 2) @ jacobian
        slope = (weighted * residual[..., None]).sum(1)
        scale = curvature.diagonal(dim1=1, dim2=2).clamp_min(1e-12)
        system = curvature + torch.diag_embed(scale * damping[:, None] + 1e-15)
        move = torch.linalg.solve(system, -slope[..., None])[..., 0].clamp(-1.0, 1.0)
        tried = theta + move
        tried[:, 0].clamp_(min=least)
        tried[:, 2].clamp_(*SPAN)
        tried[:, 4].clamp_(*SPAN)
        predicted, new_jacobian = _predict(tried, x, y)
        new_residual = predicted - loss
        new_cost = _cost(new_residual, weights)
        better = new_cost < cost
        gain = (cost - new_cost).where(better, 0) / cost.clamp_min(1e-300)
        theta = torch.where(better[:, None], tried, theta)
        residual = torch.where(better[:, None], new_residual, residual)
        jacobian = torch.where(better[:, None, None], new_jacobian, jacobian)
        cost = torch.where(better, new_cost, cost)
        damping = torch.where(better, damping / 3, damping * 4).clamp(1e-12, 1e12)
        if not bool(((gain > STALL) | (~better & (damping < 1e8))).any()):
            break
    return theta, cost


def _draws(points: Sequence[Point], resamples: int, seed: int) -> Tensor:
    """Return how often each run is in each resample, [resamples, n]; those that cannot tell the
    unknowns apart are drawn again."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    while len(rows) < resamples:
        drawn = torch.randint(len(points), (len(points),), generator=generator).tolist()
        if enough([points[i] for i in drawn]):
            rows.append(torch.bincount(torch.tensor(drawn), minlength=len(points)))
    return torch.stack(rows).double() if rows else torch.zeros(0, len(points), dtype=torch.float64)


def _law(theta: Tensor, centre: tuple[float, float]) -> Law:
    e, p, log_a, q, log_b = theta.tolist()
    a, b = math.exp(log_a), math.exp(log_b)
    return Law(
        E=math.exp(e),
        A=math.exp(p + a * centre[0]),
        a=a,
        B=math.exp(q + b * centre[1]),
        b=b,
    )
