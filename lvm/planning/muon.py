"""What Muon does in an update on the fullest rank: who owns which matrix is lvm.muon's own deal."""

import functools
from dataclasses import dataclass

from lvm.config import ModelConfig
from lvm.muon import Shape, deal, products
from lvm.planning.units import matrix_shapes

ELEMENT = 2
"""Bytes of what is sent, bf16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Of an update. Each figure is the most of any rank, if all have as many rows as the first."""

    products: int
    """FLOPs of the matrices that a rank owns."""
    exchanged: int
    """Bytes received from ranks of the same copy: rows of own matrices, updates of own rows."""
    gathered: int
    """Bytes received from the other copies."""
    rounds: int
    """Exchanges one after the other, each there and back."""


@functools.cache
def muon_load(config: ModelConfig, *, shards: int, copies: int) -> Load:
    """Return what orthogonalising every block's matrices once is to the fullest rank."""
    shapes: tuple[Shape, ...] = matrix_shapes(config)
    rounds = deal(shapes, shards=shards, copies=copies)
    rows = [ELEMENT * columns * -(-n // shards) for n, columns in shapes]  # bytes on a rank
    others = [ELEMENT * n * columns - here for (n, columns), here in zip(shapes, rows, strict=True)]
    worked = [0] * (shards * copies)
    received = [0] * (shards * copies)
    gathered = 0
    for hands in rounds:
        totals = []
        for copy in range(copies):
            owners = range(copy * shards, (copy + 1) * shards)
            own = [(o, i) for o in owners if (i := hands[o]) is not None]
            totals.append(sum(rows[i] for _, i in own))
            for owner in owners:
                received[owner] += totals[-1]
            for owner, i in own:  # its rows of its own matrix come from nobody
                worked[owner] += products(shapes[i])
                received[owner] += others[i] - rows[i]
        gathered += (copies - 1) * max(totals)
    return Load(
        products=max(worked), exchanged=max(received), gathered=gathered, rounds=len(rounds)
    )
