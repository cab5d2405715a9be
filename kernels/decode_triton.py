"""The Triton kernels of decode attention; importing this file needs triton, nothing else does.

`partial_kernel` is both passes. A program holds up to `BM` query rows that read the same keys, all
heads of a group of all candidates of a prompt, and walks over one stretch of that cache:

    length 0                                        length      S
      | tile tile tile | tile tile tile | tile tile til|  empty  |
        split 0          split 1          split 2

The grid is (caches x blocks of rows, groups, splits), from shapes alone; where a stretch begins is
computed by the program from the length in device memory. So every split has work whenever there
are as many tiles as splits, however little of the cache is filled, and a captured CUDA graph is
right for every length. A program without keys writes zeros with an LSE of -inf.

`merge_kernel` weighs the partial results of a row, of both passes, by their base-2 LSE. One split
writes the result itself and needs no merge. Sums have a fixed order: equal inputs give equal bits.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.decode import Cache
from kernels.program import Program

LOG2E = 1.4426950408889634
# Rows of a block, keys of a tile, warps, stages. Sized by what triton compiles (python -m
# kernels.report), not by a GPU's clock: no spills, and room for 8 warps a multiprocessor at least.
# From 64 rows on the products of 16-bit types are wgmma; fewer are fed from registers.
HALF = [(16, 64, 4, 3), (32, 64, 4, 2), (64, 32, 4, 3), (128, 32, 8, 3)]
FP32 = [(16, 32, 8, 3), (32, 16, 8, 3)]
# An H200 keeps 25 KiB a multiprocessor in flight (4.8 TB/s for 700 ns, over 132), and a program of
# 16 rows loads 64 KiB ahead; four in turn leave little idle at the end.
PROGRAMS = 4  # wanted for each multiprocessor
# Fewest keys of a split. In bf16 they are 512·D bytes, and its partial results 8·D a row, written
# and read: 2 % for a row of its own cache, a quarter for 16 candidates, but from the L2 cache.
SPAN = 128
SPLITS = 64  # most
CHUNK = 16  # partial results that a merge holds at once
MERGE: dict[str, Any] = {"num_warps": 2, "enable_fp_fusion": True}

# Nothing is specialised but the alignment of pointers: no launch compiles again because a count has
# become 1, least of all while a CUDA graph is captured.
PLAIN = [
    "q_row", "q_head", "k_cache", "k_group", "k_place", "v_cache", "v_group", "v_place",
    "blocks", "candidates", "places", "rows_n", "first",
]  # fmt: skip


@triton.jit(do_not_specialize=PLAIN)
def partial_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, out_ptr, lse_ptr,
    q_row, q_head, k_cache, k_group, k_place, v_cache, v_group, v_place,
    blocks, candidates, places, rows_n, first, scale,
    UNIT: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Attend from a block of stacked rows to one stretch of a cache.

    Row i of the stack is head i % M of the group's M, of candidate i // M. Partial results go to
    out [splits, R, H, D] and lse [splits, R, H] from split `first` on; scale includes log2(e).
    Strides of caches are in UNIT elements, which tells triton how wide a load may be.
    """
    cache = (tl.program_id(0) // blocks).to(tl.int64)
    group = tl.program_id(1)
    stacked = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    there = stacked < candidates * M
    row = cache * candidates + stacked // M
    head = group * M + stacked % M
    dims = tl.arange(0, BD)
    columns = tl.arange(0, BK)

    length = tl.maximum(tl.minimum(tl.load(lengths_ptr + cache), places), 0)
    span = tl.cdiv(tl.cdiv(length, BK), tl.num_programs(2)) * BK
    begin = tl.program_id(2) * span
    end = tl.minimum(begin + span, length)

    q = tl.load(
        q_ptr + (row * q_row + head * q_head)[:, None] + dims[None, :],
        mask=there[:, None] & (dims < D)[None, :],
        other=0.0,
    )
    k_ptr += (cache * k_cache + group.to(tl.int64) * k_group) * UNIT
    v_ptr += (cache * v_cache + group.to(tl.int64) * v_group) * UNIT
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    out = tl.zeros((BM, BD), tl.float32)
    for start in range(begin, end, BK):
        place = start + columns
        inside = place < end
        k = tl.load(
            k_ptr + (place.to(tl.int64) * k_place * UNIT)[None, :] + dims[:, None],
            mask=inside[None, :] & (dims < D)[:, None],
            other=0.0,
        )
        v = tl.load(
            v_ptr + (place.to(tl.int64) * v_place * UNIT)[:, None] + dims[None, :],
            mask=inside[:, None] & (dims < D)[None, :],
            other=0.0,
        )
        scores = tl.dot(q, k, input_precision="ieee") * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        top = higher

    part = ((first + tl.program_id(2)).to(tl.int64) * rows_n + row) * tl.num_programs(1) * M + head
    total = tl.where(total == 0.0, 1.0, total)  # no key at all: zeros, and an LSE of top, -inf
    tl.store(lse_ptr + part, top + tl.log2(total), mask=there)
    tl.store(
        out_ptr + part[:, None] * D + dims[None, :],
        out / total[:, None],
        mask=there[:, None] & (dims < D)[None, :],
    )


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    parts_ptr, lse_ptr, out_ptr, splits,
    D: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Merge the partial results of one head of one row. Parts [splits, R·H, D], lse [splits, R·H].

    Empty parts are not read.
    """
    row = tl.program_id(0).to(tl.int64)
    heads = tl.num_programs(0)
    dims = tl.arange(0, BD)
    every = tl.arange(0, BS)
    lse = tl.load(lse_ptr + every * heads + row, mask=every < splits, other=float("-inf"))
    top = tl.max(lse, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(lse - top), 0)
    out = tl.zeros((BD,), tl.float32)
    for start in range(0, splits, BC):
        part = start + tl.arange(0, BC)
        place = part.to(tl.int64) * heads + row
        weight = tl.exp2(tl.load(lse_ptr + place, mask=part < splits, other=float("-inf")) - top)
        values = tl.load(
            parts_ptr + place[:, None] * D + dims[None, :],
            mask=(weight > 0.0)[:, None] & (dims < D)[None, :],
            other=0.0,
        )
        out += tl.sum(weight[:, None] * values, 0)
    tl.store(out_ptr + row * D + dims, out / tl.where(total == 0.0, 1.0, total), mask=dims < D)


def launch(rows: int, width: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, Any]]:
    """Return the constants and compile options for so many stacked rows of a head dimension."""
    table = FP32 if dtype == torch.float32 else HALF
    most, keys, warps, stages = next((x for x in table if rows <= x[0]), table[-1])
    constants = {"BM": most, "BK": keys, "BD": max(16, triton.next_power_of_2(width))}
    return constants, {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def merge_constants(splits: int, width: int) -> dict[str, int]:
    """Return the constants of a merge of so many partial results."""
    return {
        "BS": max(CHUNK, triton.next_power_of_2(splits)),
        "BC": CHUNK,
        "BD": max(16, triton.next_power_of_2(width)),
    }


def split_count(programs: int, places: int, processors: int) -> int:
    """Return in how many stretches a cache is read by a grid of so many programs otherwise."""
    if places == 0:
        return 0
    wanted = PROGRAMS * processors // programs
    return max(1, min(wanted, triton.cdiv(places, SPAN), SPLITS))


def attend(q: Tensor, caches: Sequence[Cache], scale: float) -> Tensor:
    """Attend from q [R, H, D] to every one of `caches`; row r reads entry r // (R/N) of each.

    Reads no tensor on the host.
    """
    (rows_n, heads, width), groups = q.shape, caches[0][0].shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if rows_n == 0:
        return out
    cuda = q.device.type == "cuda"
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if cuda else 132
    q = q if q.stride(2) == 1 else q.contiguous()
    passes = []
    for k, v, lengths in caches:
        candidates = rows_n // len(k)
        stacked = candidates * (heads // groups)
        constants, options = launch(stacked, width, q.dtype)
        blocks = triton.cdiv(stacked, constants["BM"])
        splits = split_count(len(k) * blocks * groups, k.shape[2], processors)
        passes.append((k, v, lengths, candidates, constants, options, blocks, splits))
    total = sum(splits for *_, splits in passes)
    if total == 0:
        return out.zero_()
    parts = out if total == 1 else q.new_empty(total, *q.shape, dtype=torch.float32)
    lse = q.new_empty(total, rows_n, heads, dtype=torch.float32)
    first = 0
    with torch.cuda.device_of(q):
        for k, v, lengths, candidates, constants, options, blocks, splits in passes:
            if splits:
                strides = *k.stride()[:3], *v.stride()[:3]
                unit = math.gcd(16, *strides)
                partial_kernel[len(k) * blocks, groups, splits](
                    q, k, v, lengths.contiguous(), parts, lse,
                    *q.stride()[:2], *(x // unit for x in strides),
                    blocks, candidates, k.shape[2], rows_n, first, scale * LOG2E,
                    UNIT=unit, M=heads // groups, D=width, **constants, **options,
                )  # fmt: skip
            first += splits
        if total > 1:
            merge_kernel[rows_n * heads,](
                parts, lse, out, total, D=width, **merge_constants(total, width), **MERGE
            )
    return out


def programs() -> Iterator[Program]:
    """Yield the launches at shapes of known models: widths, heads a group M, rows of a stack."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    integers = dict.fromkeys(PLAIN, "i32")
    for dtype, width, m, rows in [
        (torch.bfloat16, 128, 1, 1),
        (torch.bfloat16, 128, 1, 16),
        (torch.bfloat16, 128, 1, 32),
        (torch.bfloat16, 128, 1, 64),
        (torch.bfloat16, 128, 4, 256),
        (torch.bfloat16, 100, 1, 16),
        (torch.bfloat16, 100, 1, 64),
        (torch.bfloat16, 96, 1, 64),
        (torch.bfloat16, 80, 1, 128),
        (torch.bfloat16, 32, 1, 16),
        (torch.float16, 128, 1, 1),
        (torch.float32, 128, 1, 16),
        (torch.float32, 128, 1, 64),
        (torch.float32, 32, 1, 16),
    ]:
        constants, options = launch(rows, width, dtype)
        name, whole = names[dtype], rows == 1  # whole: one split, which writes the result itself
        form = "whole" if whole else "partial"
        yield Program(
            name=f"decode {form} D={width} {name} M={m} BM={constants['BM']}",
            kernel=partial_kernel,
            types=integers
            | dict.fromkeys(["q_ptr", "k_ptr", "v_ptr"], f"*{name}")
            | {"lengths_ptr": "*i32", "out_ptr": f"*{name if whole else 'fp32'}"}
            | {"lse_ptr": "*fp32", "scale": "fp32"},
            constants={"UNIT": math.gcd(16, width), "M": m, "D": width, **constants},
            options=options,
            products="fp32" if name == "fp32" else "tensor" if constants["BM"] >= 64 else "mma",
            core=(width, rows, name) == (128, 16, "bf16"),
        )
    for splits, width in [(2, 128), (2 * SPLITS, 128), (32, 100)]:
        yield Program(
            name=f"decode merge D={width} splits={splits}",
            kernel=merge_kernel,
            types={"parts_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": "*bf16", "splits": "i32"},
            constants={"D": width, **merge_constants(splits, width)},
            options=MERGE,
        )
