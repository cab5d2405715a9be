"""The Triton kernel of `linear_cross_entropy`; importing this file needs triton, nothing else does.

One program reads one row of logits three times and overwrites it with its gradient:

    1  largest logit, and whether any beats the label's       one reduction over the threads
    2  sum of exponentials, and of the soft targets           one reduction each
    3  gradient, written where the logit stood

A row of 8320 in bf16 is 16 KiB, so the second and third pass find it in L1. In one pass for both
sums (online softmax) every block would wait for a reduction over all threads. Rows are walked in
blocks of at most `WIDEST`: in one tile 8320 columns would be padded to 16,384. Two exponentials an
entry; rows without a label are not read.

Bytes: a row read and written once from memory, 4 C in 16 bits, and as much again for soft targets.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cross_entropy import Terms
from kernels.program import Program

WIDEST = 2048
PER_WARP = 512  # columns: 16 a thread
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def read(row_ptr, column, pitch, columns):
    """Read a block of logits in fp32, -inf beyond the live columns."""
    # `pitch` is known to be divisible by 16 and `columns` is not: this mask keeps loads wide.
    z = tl.load(row_ptr + column, mask=column < pitch, other=0.0).to(tl.float32)
    return tl.where(column < columns, z, -float("inf"))


@triton.jit
def read_target(row_ptr, column, pitch, columns):
    """Read a block of soft targets in fp32, 0 beyond the live columns; `pitch` as above."""
    target = tl.load(row_ptr + column, mask=column < pitch, other=0.0).to(tl.float32)
    return tl.where(column < columns, target, 0.0)


@triton.jit(do_not_specialize=["rows_n", "columns", "ignore"])
def row_kernel(
    logits_ptr, labels_ptr, soft_ptr, sums_ptr, rows_n, pitch, soft_pitch, columns, ignore,
    z_loss, hard_weight, soft_weight, rate,
    GRADIENT: tl.constexpr, SOFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of a row into column `row` of sums [4, rows_n]; `rate` is 1/temperature."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    row_ptr = logits_ptr + row * pitch
    soft_row_ptr = soft_ptr + row * soft_pitch
    lane = tl.arange(0, BLOCK)
    if label == ignore:
        if GRADIENT:
            nothing = tl.zeros((BLOCK,), tl.float32).to(logits_ptr.dtype.element_ty)
            for start in range(0, pitch, BLOCK):
                tl.store(row_ptr + start + lane, nothing, mask=start + lane < pitch)
    else:
        known = (label >= 0) & (label < columns)
        chosen = tl.load(row_ptr + label, mask=known, other=0.0).to(tl.float32)
        chosen = tl.where(known, chosen, float("nan"))
        high = tl.full((BLOCK,), -float("inf"), tl.float32)
        beaten = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, pitch, BLOCK):
            column = start + lane
            z = read(row_ptr, column, pitch, columns)
            high = tl.maximum(high, z)
            beaten |= ((z > chosen) | ((z == chosen) & (column < label))).to(tl.int32)
        top = tl.max(high, 0)

        total = tl.zeros((BLOCK,), tl.float32)
        soft_total = tl.zeros((BLOCK,), tl.float32)
        mass = tl.zeros((BLOCK,), tl.float32)
        product = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, pitch, BLOCK):
            column = start + lane
            # Relative to the largest: a product of targets with logits near 1e4 would lose digits.
            z = read(row_ptr, column, pitch, columns) - top
            total += tl.exp2(z * LOG2E)
            if SOFT:
                target = read_target(soft_row_ptr, column, soft_pitch, columns)
                soft_total += tl.exp2(z * (rate * LOG2E))
                mass += target
                product += target * tl.where(column < columns, z, 0.0)
        z_sum = tl.sum(total, 0)
        log_sum = tl.log(z_sum)
        log_z = top + log_sum
        sums_ptr += row
        plane = rows_n.to(tl.int64)
        tl.store(sums_ptr, log_sum + (top - chosen))
        tl.store(sums_ptr + plane, log_z * log_z)
        right = (tl.max(beaten, 0) == 0) & known
        tl.store(sums_ptr + 3 * plane, right.to(tl.float32))
        q_factor = 0.0
        if SOFT:
            row_mass = tl.sum(mass, 0)
            q_sum = tl.sum(soft_total, 0)
            cross = row_mass * tl.log(q_sum) - tl.sum(product, 0) * rate
            tl.store(sums_ptr + 2 * plane, cross)
            q_factor = row_mass * soft_weight * rate / q_sum

        if GRADIENT:
            factor = (hard_weight + 2.0 * z_loss * log_z) / z_sum
            for start in range(0, pitch, BLOCK):
                column = start + lane
                z = read(row_ptr, column, pitch, columns) - top
                gradient = tl.exp2(z * LOG2E) * factor
                gradient = tl.where(column == label, gradient - hard_weight, gradient)
                if SOFT:
                    target = read_target(soft_row_ptr, column, soft_pitch, columns)
                    gradient += tl.exp2(z * (rate * LOG2E)) * q_factor - target * soft_weight * rate
                gradient = gradient.to(logits_ptr.dtype.element_ty)
                tl.store(row_ptr + column, gradient, mask=column < pitch)


def launch(pitch: int, *, gradient: bool, soft: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the kernel's constants and compile options for rows of `pitch` columns."""
    block = min(WIDEST, triton.next_power_of_2(pitch))
    constants = {"GRADIENT": gradient, "SOFT": soft, "BLOCK": block}
    return constants, {"num_warps": max(1, block // PER_WARP), "enable_fp_fusion": True}


def reduce_rows(
    logits: Tensor, labels: Tensor, soft: Tensor | None, sums: Tensor, terms: Terms, gradient: bool
) -> Tensor:
    """Write nll, (log Z)^2, soft and correct of each row to sums [4, n]; return d loss / d logits.

    Logits [n, columns or more], contiguous; what stands beyond `terms.columns` is not used. They
    are overwritten. Rows without a label leave `sums` as it is.
    """
    n, pitch = logits.shape
    targets = logits if soft is None else soft.contiguous()
    constants, options = launch(pitch, gradient=gradient, soft=soft is not None)
    with torch.cuda.device_of(logits):
        row_kernel[n,](
            logits, labels.contiguous(), targets, sums, sums.stride(0), pitch, targets.stride(0),
            terms.columns, terms.ignore, terms.z_loss, terms.hard_weight, terms.soft_weight,
            1.0 / terms.temperature, **constants, **options,
        )  # fmt: skip
    return logits


def programs() -> Iterator[Program]:
    """Yield the launches at V = 8320 of training, validation and distillation, and of the demo."""
    types = {
        "logits_ptr": "*bf16", "labels_ptr": "*i64", "soft_ptr": "*bf16", "sums_ptr": "*fp32",
        "rows_n": "i32", "pitch": "i32", "soft_pitch": "i32", "columns": "i32", "ignore": "i32",
        "z_loss": "fp32", "hard_weight": "fp32", "soft_weight": "fp32", "rate": "fp32",
    }  # fmt: skip
    for name, kind, pitch, gradient, soft in (
        ("bf16 V=8320", "bf16", 8320, True, False),
        ("bf16 V=8320 validation", "bf16", 8320, False, False),
        ("bf16 V=8320 soft", "bf16", 8320, True, True),
        ("fp32 V=8320", "fp32", 8320, True, False),
        ("fp16 V=8320", "fp16", 8320, True, False),
        ("bf16 V=640", "bf16", 640, True, False),
        ("bf16 V=64", "bf16", 64, True, False),
    ):
        constants, options = launch(pitch, gradient=gradient, soft=soft)
        yield Program(
            name=f"cross-entropy {name}",
            kernel=row_kernel,
            types={**types, "logits_ptr": f"*{kind}"},
            constants=constants,
            options=options,
            aligned=frozenset({"pitch", "soft_pitch"}),
            core=name == "bf16 V=8320",
        )
