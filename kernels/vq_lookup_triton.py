"""The Triton kernels of `vq_lookup`; importing this file needs triton, nothing else does.

A program holds a tile of points and walks over the codes, or over a stretch of them, tile by tile.
Each entry of the tile keeps the best score that its column has met and the tile where that was; the
columns meet once, at the end. A strict comparison on the way and the lowest index at the end make
ties fall to the lowest index, and no score depends on the tiling: the same codes for any N.

Products are IEEE fp32 (FFMA, never tensor cores): N·K·(D + 1) fused multiply-adds, and N·K
comparisons with two selections. Bytes moved: 4·K·D for each tile of points, from the L2 cache.

One image is 256 points, four programs for 132 multiprocessors. So where tiles of points are few,
the codes are cut into stretches as well, and their winners meet in a small second reduction.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.program import Program

POINTS = 64  # of a tile; as many codes. 64 x 64 leaves room for three programs a multiprocessor.
CODES = 64
NARROW = 8  # widest code for `narrow_kernel`
# Sized by what triton compiles for sm_90 (python -m kernels.report), not by a GPU's clock.
NARROW_WARPS = 8
WIDE_WARPS = 4
WIDE_STAGES = 3
PROGRAMS = 8  # wanted for each multiprocessor
WIDE_CHUNK = 32  # 64 take 8 % fewer instructions and spill on sm_80


@triton.jit
def keep_closer(score, best, tile, k):
    """Take the scores of the tile that begins at code k where they are lower; NaN never is."""
    closer = score < best
    return tl.where(closer, score, best), tl.where(closer, k, tile)


@triton.jit
def store_winners(best, tile, columns, rows, points_n, low_ptr, index_ptr):
    """Reduce a tile along its columns and write the lowest score and the first code that has it."""
    low = tl.min(best, 1)
    candidates = tl.where(best == low[:, None], tile + columns[None, :], 2147483647)
    out = tl.program_id(1).to(tl.int64) * points_n + rows
    tl.store(low_ptr + out, low, mask=rows < points_n)
    tl.store(index_ptr + out, tl.min(candidates, 1).to(tl.int64), mask=rows < points_n)


@triton.jit(do_not_specialize=["points_n", "codes_n", "span"])
def wide_kernel(
    points_ptr, codes_ptr, squares_ptr, low_ptr, index_ptr, points_n, codes_n, span,
    D: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Score by `tl.dot` over chunks of BD dimensions. Points [N, D], codes [K, D] row by row.

    Tiles and chunks are one loop, so that loads run ahead over the end of a tile too.
    """
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    start = tl.program_id(1) * span
    columns = tl.arange(0, BK)
    CHUNKS: tl.constexpr = (D + BD - 1) // BD
    best = tl.full((BN, BK), float("inf"), tl.float32)
    tile = tl.zeros((BN, BK), tl.int32)
    dot = tl.zeros((BN, BK), tl.float32)
    for step in range(tl.cdiv(tl.minimum(span, codes_n - start), BK) * CHUNKS):
        k = start + step // CHUNKS * BK
        dims = step % CHUNKS * BD + tl.arange(0, BD)
        codes = k + columns
        p = tl.load(
            points_ptr + rows[:, None] * D + dims[None, :],
            mask=(rows < points_n)[:, None] & (dims < D)[None, :],
            other=0.0,
        )
        c = tl.load(
            codes_ptr + codes.to(tl.int64)[None, :] * D + dims[:, None],
            mask=(codes < codes_n)[None, :] & (dims < D)[:, None],
            other=0.0,
        )
        dot = tl.dot(p, c, dot, input_precision="ieee")
        if step % CHUNKS == CHUNKS - 1:
            square = tl.load(squares_ptr + codes, mask=codes < codes_n, other=float("inf"))
            best, tile = keep_closer(tl.fma(dot, -2.0, square[None, :]), best, tile, k)
            dot = tl.zeros((BN, BK), tl.float32)
    store_winners(best, tile, columns, rows, points_n, low_ptr, index_ptr)


@triton.jit(do_not_specialize=["points_n", "codes_n", "span"])
def narrow_kernel(
    points_ptr, codes_ptr, squares_ptr, low_ptr, index_ptr, points_n, codes_n, span,
    D: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Score by outer products, one dimension at a time. Points [N, D], codes transposed: [D, K].

    `tl.dot` wants at least 16 dimensions. At D = 8 its padding costs 23 instructions an entry and
    this 14; the points stay in registers.
    """
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    start = tl.program_id(1) * span
    columns = tl.arange(0, BK)
    best = tl.full((BN, BK), float("inf"), tl.float32)
    tile = tl.zeros((BN, BK), tl.int32)
    p = ()
    for d in tl.static_range(D):
        value = tl.load(points_ptr + rows * D + d, mask=rows < points_n, other=0.0)
        p = p + (value,)  # type: ignore[assignment]  # noqa: RUF005 - no unpacking in triton
    for k in range(start, tl.minimum(start + span, codes_n), BK):
        codes = k + columns
        inside = codes < codes_n
        dot = tl.zeros((BN, BK), tl.float32)
        dimension = codes_ptr  # moved by K at a time: d * K would overflow 32 bits
        for d in tl.static_range(D):
            c = tl.load(dimension + codes, mask=inside, other=0.0)
            dot = tl.fma(p[d][:, None], c[None, :], dot)
            dimension += codes_n
        square = tl.load(squares_ptr + codes, mask=inside, other=float("inf"))
        best, tile = keep_closer(tl.fma(dot, -2.0, square[None, :]), best, tile, k)
    store_winners(best, tile, columns, rows, points_n, low_ptr, index_ptr)


def launch(width: int) -> tuple[Any, dict[str, int], dict[str, Any]]:
    """Return the kernel for codes of a width, its constants and its compile options."""
    constants = {"D": width, "BN": POINTS, "BK": CODES}
    # Every multiply-add is written as one. Said so, as triton's default is about to change.
    options = {"num_warps": NARROW_WARPS, "enable_fp_fusion": False}
    if width <= NARROW:
        return narrow_kernel, constants, options
    options |= {"num_warps": WIDE_WARPS, "num_stages": WIDE_STAGES}
    return wide_kernel, {**constants, "BD": 16 if width <= 16 else WIDE_CHUNK}, options


def stretch(points_n: int, codes_n: int, processors: int) -> int:
    """Return how many codes a program searches: all, or fewer where that leaves processors idle.

    Eight programs a processor, of which two or three run at a time, so that the last ones to finish
    leave little idle: 160 tiles of points on 132 processors would else take as long as 264.
    """
    tiles = triton.cdiv(codes_n, CODES)
    wanted = max(1, PROGRAMS * processors // triton.cdiv(points_n, POINTS))
    return triton.cdiv(tiles, min(wanted, tiles)) * CODES


def search(points: Tensor, codes: Tensor) -> Tensor:
    """Return int64 [N], the closest of `codes` [K, D] to each of `points` [N, D], both fp32."""
    (n, width), k = points.shape, len(codes)
    if n == 0:
        return torch.empty(0, dtype=torch.int64, device=points.device)
    cuda = points.device.type == "cuda"
    processors = (
        torch.cuda.get_device_properties(points.device).multi_processor_count if cuda else 132
    )
    span = stretch(n, k, processors)
    spans = triton.cdiv(k, span)
    points, squares = points.contiguous(), codes.square().sum(1)
    low = torch.empty(spans, n, dtype=torch.float32, device=points.device)
    index = torch.empty(spans, n, dtype=torch.int64, device=points.device)
    kernel, constants, options = launch(width)
    table = codes.T.contiguous() if width <= NARROW else codes.contiguous()
    with torch.cuda.device_of(points):
        kernel[triton.cdiv(n, POINTS), spans](
            points, table, squares, low, index, n, k, span, **constants, **options
        )
    # The first of equal scores is of the stretch with the lower codes.
    return index[0] if spans == 1 else index.gather(0, low.argmin(0, keepdim=True))[0]


def programs() -> Iterator[Program]:
    """Yield the search at the widths of known tokenizers and at awkward ones."""
    types = {
        "points_ptr": "*fp32", "codes_ptr": "*fp32", "squares_ptr": "*fp32", "low_ptr": "*fp32",
        "index_ptr": "*i64", "points_n": "i32", "codes_n": "i32", "span": "i32",
    }  # fmt: skip
    for width in (4, 8, 12, 64, 100, 256):
        kernel, constants, options = launch(width)
        yield Program(
            name=f"vq_lookup D={width}",
            kernel=kernel,
            types=types,
            constants=constants,
            options=options,
            products="fp32",
            # One index is kept in local memory: a load beside 1000 multiply-adds.
            allowance={89: 8, 100: 8},
            core=width == 64,
        )
