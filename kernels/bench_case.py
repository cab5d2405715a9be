"""What the tables of the benchmark share: rivals against float64, their passes, what was found."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from kernels.timing import Body, Lost, Row, describe, recover, show

Forward = Callable[..., Tensor | tuple[Tensor, ...]]

BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest relative error (norm of the difference over norm of the reference) against float64."""

ROUNDINGS = 3e-3
"""What rounding to bf16 costs: 1.7e-3 each for probabilities, their gradients and the result,
squares added. A rival that keeps the first two in fp32 is no measure of who does not."""


def limits(dtype: torch.dtype, rival: Sequence[float], count: int) -> list[float]:
    """Return the bounds of `count` errors of ours: in bf16 also 1.5 times those of a `rival`."""
    bounds = [BOUNDS[dtype]] * count
    if dtype != torch.bfloat16 or len(rival) != count:
        return bounds
    return [min(a, max(1.5 * b, ROUNDINGS)) for a, b in zip(bounds, rival, strict=True)]


@dataclass(slots=True)
class Bench:
    """What the tables of one program share: the device, how often, until when, what was found."""

    device: str
    repeats: int = 10
    until: float = math.inf  # of time.monotonic(): no case begins after it
    tables: dict[str, list[Row]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def add(self, table: str, row: Row) -> None:
        """Store and print a row."""
        self.tables.setdefault(table, []).append(row)
        show(row, under=table)

    def verdict(self, table: str, row: Row, *, error: float, bound: float) -> str:
        """Store and print what a comparison with float64 gave: "ok" or "BROKEN"."""
        word = "ok" if error <= bound else "BROKEN"  # NaN is not below a bound
        found = {**row, "error": f"{error:.2e}", "bound": f"{bound:.2e}"}
        if word != "ok":
            self.broken.append(f"{table} " + " ".join(map(str, found.values())))
        self.add("checks", {"of": table, **found, "verdict": word})
        return word

    def fail(self, table: str, row: Row, why: str, *, ours: bool) -> None:
        """Store and print why something did not run; only what is ours counts as broken."""
        if ours:
            self.broken.append(f"{table} " + " ".join([*map(str, row.values()), why]))
        self.add(table, {**row, "did not run": why})

    @contextmanager
    def guarded(self, table: str, row: Row, *, ours: bool) -> Iterator[None]:
        """Make of an error within a line that says so, and go on. Raises Lost."""
        try:
            yield
            return
        except Lost:
            raise
        except Exception as error:
            why = describe(error)
        # Out of the clause, where the error no longer holds the tensors of its frames.
        self.fail(table, row, why, ours=ours)
        recover(self.device)

    def late(self, table: str, what: str) -> bool:
        """Say whether it is too late to begin a case, and print so."""
        if time.monotonic() < self.until:
            return False
        show({what: "skipped, out of time"}, under=table)
        return True


def outputs(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def passes(
    forward: Forward, sets: Sequence[Sequence[Tensor]], grads: Sequence[Sequence[Tensor]]
) -> dict[str, Body]:
    """Return the bodies of the forward pass, of both, and of the backward pass alone.

    Call i takes entry i of `sets`, inputs of which some want gradients, and of `grads`, the
    gradients of the outputs, and begins anew at the end. The forward pass keeps what backward
    needs, as in training.
    """

    def fwd(i: int) -> tuple[Tensor, ...]:
        return outputs(forward(*sets[i % len(sets)]))

    def begin(i: int) -> tuple[tuple[Tensor, ...], int]:
        return fwd(i), i

    def bwd(state: tuple[tuple[Tensor, ...], int]) -> object:
        out, i = state
        wanted = [x for x in sets[i % len(sets)] if x.requires_grad]
        return torch.autograd.grad(out, wanted, grads[i % len(grads)])

    return {
        "fwd": Body(fwd),
        "fwd+bwd": Body(lambda i: bwd(begin(i))),
        "bwd": Body(bwd, before=begin),
    }


def results(
    forward: Forward, inputs: Sequence[Tensor], grads: Sequence[Tensor] | None
) -> list[Tensor]:
    """Return the outputs and, given gradients of them, those of the inputs that want one."""
    out = outputs(forward(*inputs))
    found = [x.detach() for x in out]
    if grads is not None:
        found += torch.autograd.grad(out, [x for x in inputs if x.requires_grad], grads)
    return found


def doubled(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies in float64, as leaves that want gradients where the originals do."""
    return [
        x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for x in tensors
    ]


def relative(got: Tensor, want: Tensor) -> float:
    """Return the norm of the difference over that of the reference, in float64."""
    want = want.double()
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-300))


def compiled(forward: Forward) -> Forward:
    """Return `forward` compiled for each shape by itself, by default options."""
    return cast(Forward, cast(Any, torch.compile(forward, dynamic=False)))


def verify(
    bench: Bench, table: str, row: Row, forward: Forward, *, want: Sequence[Tensor],
    inputs: Sequence[Tensor], grads: Sequence[Tensor], ours: bool,
) -> bool:  # fmt: skip
    """Compare outputs and gradients with float64; returns whether the backend runs at all."""
    runs = False
    with bench.guarded(table, row, ours=ours):
        got = results(forward, inputs, grads)
        error = max(relative(a, b) for a, b in zip(got, want, strict=True))
        bench.verdict(table, row, error=error, bound=BOUNDS[torch.bfloat16])
        runs = True
    return runs
