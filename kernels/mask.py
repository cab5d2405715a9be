"""Which keys each query reads: one value for every attention backend.

B rows, T queries, S keys. Most masks of visual sentences (causal, packed documents, prefixes,
images as blocks) let query i read one interval of keys, lo[i] <= k < hi[i]:

    two documents of three and two positions, causal      lo       hi
        1 . . . .                                          0        1
        1 1 . . .                                          0        2
        1 1 1 . .                                          0        3
        . . . 1 .                                          3        4
        . . . 1 1                                          3        5

A kernel that walks over blocks of keys wants to know, before it starts, which blocks a block of
queries reads at all and which it reads whole. `bounds` says so for stretches of 32 positions, from
which blocks of any multiple are put together:

    keys       0    32    64    96   128         a stretch of 32 queries (its rows drawn as lines)
    query i    . . . [###########################.     starts  lowest lo    highest lo
    query i+1  . . . . .[#########################     ends    lowest hi    highest hi
    query i+2  . . . . . . . [#####################
                    |masked |   whole      |masked|

The tables take 4 ints for 32 queries and 4 for 32 keys; no T x S matrix is made. Nothing here waits
for the device.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

STRETCH = 32
"""Positions an entry of the tables stands for."""

EXACT = 128
"""Of a block-exact mask, documents start at multiples of this; no block of a kernel is longer."""

FAR = 1 << 30


@dataclass(frozen=True, slots=True)
class Mask:
    """Which keys each query reads. Made by the class methods; `dense` wins where it is present."""

    causal: bool = False  # T == S and query i reads k <= i; nothing is stored
    lo: Tensor | None = None  # [B, T] int32, first key read
    hi: Tensor | None = None  # [B, T] int32, one past the last key read
    exact: bool = False  # see `interval`
    by_query: Tensor | None = None  # [B, 4, ceil(T/32)] int32, see `bounds`
    by_key: Tensor | None = None  # [B, 4, ceil(S/32)] int32, see `bounds`
    dense: Tensor | None = None  # [B, T, S] bool, True where read
    flex: Any = None  # FlexAttention's BlockMask
    backend: str | None = None  # the one that a resolved mask is for

    @classmethod
    def interval(cls, lo: Tensor, hi: Tensor, *, exact: bool = False) -> "Mask":
        """Query i reads lo[i] <= k < hi[i]; lo == hi reads nothing and gives zeros.

        Any interval inside 0 … S is right. Where both ends never fall along a row, no block is
        computed in vain. `exact` promises that T == S and that within each 128 queries (from 0 on)
        lo is one multiple of 128 and hi is max(i + 1, one number): documents that start at
        multiples of 128, each causal, with a prefix, or in image blocks of multiples of 128. A
        kernel then needs no bound of single queries. A wrong promise gives wrong numbers: `check`.
        """
        return cls(lo=lo, hi=hi, exact=exact)

    @classmethod
    def full(cls) -> "Mask":
        """Every query reads every key."""
        return cls()

    @property
    def kind(self) -> str:
        """What backends are told apart by: dense, interval, causal or full."""
        if self.dense is not None and self.lo is None:
            return "dense"
        return "interval" if self.lo is not None else "causal" if self.causal else "full"


def padded(queries: int) -> int:
    """Return a number of queries rounded up to what the longest block of a kernel divides."""
    return (queries + EXACT - 1) // EXACT * EXACT


def densify(mask: Mask, keys: int) -> Tensor | None:
    """Return the bool [B, T, S] form of a mask, or None where it is causal or full."""
    if mask.dense is not None or mask.lo is None or mask.hi is None:
        return mask.dense
    k = torch.arange(keys, device=mask.lo.device, dtype=torch.int32)
    return (k >= mask.lo[:, :, None]) & (k < mask.hi[:, :, None])


def is_exact(lo: Tensor, hi: Tensor) -> Tensor:
    """Say (bool scalar on the device) whether intervals [B, T] may be called `exact`."""
    length = lo.shape[1]
    pad = -length % EXACT
    row = torch.arange(length + pad, device=lo.device, dtype=torch.int32)
    start = torch.nn.functional.pad(lo, (0, pad), mode="replicate").unflatten(1, (-1, EXACT))
    ends = torch.cat([hi, hi[:, -1:].maximum(row[length:] + 1)], 1).unflatten(1, (-1, EXACT))
    after = row.unflatten(0, (-1, EXACT)) + 1
    one = (start == start[:, :, :1]).all() & (start[:, :, 0] % EXACT == 0).all()
    return one & (ends == after.maximum(ends[:, :, :1])).all()


def bounds(lo: Tensor, hi: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """Return the tables of intervals [B, T]: by query and by key, int32 [B, 4, stretches].

    by_query[:, j] of a stretch of 32 queries, in keys, and by_key[:, j] of 32 keys, in queries:

        j  by_query                          by_key
        0  lowest lo of those that read      first query that reads any of the keys
        1  highest lo                        first of a run of queries that read all the keys
        2  lowest hi                         one past the last of that run
        3  highest hi of those that read     one past the last query that reads any of the keys

    so that [0, 3) is visited and [1, 2) needs no mask. Empty ranges have their start past their
    end. A stretch with a query that reads nothing has no unmasked part; keys past S and queries
    past T belong to none. Ends of by_key are multiples of 32, but for T.
    """
    queries = lo.shape[1]
    pad = -queries % STRETCH
    reads = lo < hi

    def stretches(x: Tensor, fill: int) -> Tensor:
        return torch.nn.functional.pad(x, (0, pad), value=fill).unflatten(1, (-1, STRETCH))

    low = stretches(torch.where(reads, lo, FAR), FAR).amin(2)
    high = stretches(torch.where(reads, hi, 0), 0).amax(2)
    last_start = stretches(torch.where(reads, lo, FAR), 0).amax(2)
    first_end = stretches(torch.where(reads, hi, 0), FAR).amin(2)
    by_query = torch.stack([low, last_start, first_end, high], 1).int()

    start = torch.arange(0, keys, STRETCH, device=lo.device, dtype=torch.int32)[:, None]
    end = (start + STRETCH).clamp(max=keys)
    any_read = (low[:, None] < end) & (high[:, None] > start)  # [B, stretches of keys, of queries]
    all_read = (last_start[:, None] <= start) & (first_end[:, None] >= end)
    count = low.shape[1]
    at = torch.arange(count, device=lo.device, dtype=torch.int32)
    first = torch.where(any_read, at, FAR // STRETCH).amin(2)
    last = torch.where(any_read, at + 1, 0).amax(2)
    whole = torch.where(all_read, at, FAR // STRETCH).amin(2)
    stop = torch.where(~all_read & (at >= whole[:, :, None]), at, count).amin(2)
    by_key = torch.stack([first, whole, stop, last], 1).int() * STRETCH
    return by_query, by_key.minimum(torch.full_like(by_key, queries).clamp(max=FAR))
