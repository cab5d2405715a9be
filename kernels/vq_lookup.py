"""Nearest code: which of K vectors lies closest to each of N points, in fp32 and nothing less.

N points, K codes, D width. |p - c|² less |p|², which no code changes, is the score |c|² - 2 p·c.
The lowest score wins, and among equal scores the lowest index, on every backend:

    torch    scores in tables of `TABLE_ENTRIES`, reduced one after the other
    triton   scores never leave the registers: kernels/vq_lookup_triton.py

A table of 64 images of 256 points against 8192 codes is 512 MiB, written once and read once; points
and codes themselves are 6 MiB at D = 64.

Codes compared by direction (l2-normalised, as LlamaGen's) are the same search between unit vectors,
which the caller scales: training needs the scaled points too, and a norm summed here in another
order than `F.normalize`'s would decide near-ties otherwise.
"""

import torch
from torch import Tensor

from kernels.backend import Backend, choose

# 16 MiB on a CPU, 64 elsewhere. One table is written again and again and found in the cache; at 64
# MiB it is not, and below 4 MiB two threads wait for each other more than they work.
TABLE_ENTRIES = {"cpu": 1 << 22, "cuda": 1 << 24}
BLOCK = 64


def vq_lookup_reference(points: Tensor, codes: Tensor) -> Tensor:
    """Return the index of the closest code by differences in float64; the oracle of every backend.

    Shapes as in `vq_lookup`; the table of differences has N·K·D entries.
    """
    differences = points.double()[:, None] - codes.double()[None]
    return differences.square().sum(2).argmin(1)


def first_lowest(scores: Tensor) -> Tensor:
    """Return `scores.argmin(1)` of [N, K], the first of equals and NaN before all, int64 [N].

    Smallest entry of each block, first block that has the smallest, first place in it: on a CPU
    `amin` is vectorised and `argmin` is not, which makes this three times as fast at K = 8192.
    """
    if scores.shape[1] % BLOCK:
        return scores.min(1).indices
    blocks = scores.unflatten(1, (-1, BLOCK))
    block = blocks.amin(2).argmin(1)
    inside = torch.take_along_dim(blocks, block[:, None, None], 1)[:, 0].argmin(1)
    return block * BLOCK + inside


def search_tables(points: Tensor, codes: Tensor) -> Tensor:
    """Search in tables of scores with plain torch; both fp32."""
    squares = codes.square().sum(1)
    entries = TABLE_ENTRIES.get(points.device.type, TABLE_ENTRIES["cuda"])
    pieces = points.split(max(1, entries // len(codes)))
    table = points.new_empty(len(pieces[0]), len(codes))
    return torch.cat(
        [
            first_lowest(torch.addmm(squares, p, codes.T, alpha=-2, out=table[: len(p)]))
            for p in pieces
        ]
    )


def lookup(points: Tensor, codes: Tensor, backend: str) -> Tensor:
    with torch.no_grad(), torch.autocast(points.device.type, enabled=False):
        points, codes = points.float(), codes.float()
        if backend == "torch":
            return search_tables(points, codes)
        from kernels.vq_lookup_triton import search  # needs triton, which only some machines have

        return search(points, codes)


# One opaque operator: torch.compile then neither unrolls the loop over tables nor looks into the
# kernel. `triton_op`, which it could look into, refuses kernels that triton interprets.
lookup_op = torch.library.custom_op("kernels::vq_lookup", lookup, mutates_args=())


@lookup_op.register_fake
def _(points: Tensor, codes: Tensor, backend: str) -> Tensor:
    return points.new_empty(len(points), dtype=torch.int64)


def vq_lookup(points: Tensor, codes: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Return for each of `points` [N, D] the index of the closest of `codes` [K, D], int64 [N].

    Any floating dtype and strides; compared in fp32, under autocast too. No gradient passes. Codes
    must be finite; a point with NaN gets code 0. `auto` is triton on CUDA, where it imports, and
    torch elsewhere. Backends sum in different orders: they agree wherever two scores differ by more
    than fp32 rounding, about D·2⁻²⁴·(|p|² + |c|²). The torch backend on CUDA uses TF32 if
    `torch.set_float32_matmul_precision` allows it; the kernel never does.
    """
    if points.ndim != 2 or codes.ndim != 2 or points.shape[1] != codes.shape[1] or not len(codes):
        raise ValueError(
            f"lookup of points {tuple(points.shape)} in codes {tuple(codes.shape)}: "
            "wanted [N, D] and [K, D] with K at least 1"
        )
    chosen = choose(backend, points.device, what="lookup")
    # The first call of any operator imports torch's compiler: more than a second, which a command
    # that encodes a few images on a CPU would only wait for.
    plain = points.device.type == "cpu" and chosen == "torch" and not torch.compiler.is_compiling()
    return (lookup if plain else lookup_op)(points.detach(), codes.detach(), chosen)
