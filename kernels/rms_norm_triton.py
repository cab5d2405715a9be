"""The Triton kernels of `rms_norm`; importing this file needs triton, nothing else does.

Forward: a program has one row, whole, in its registers, so each element is read once. Backward: a
program walks over `span` rows and keeps its share of dw in registers; the shares, fp32
[programs, D], are summed afterwards. No atomics: the order of every sum is fixed by the shape.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.program import Program

# Four for each multiprocessor of an H100, on any GPU: dw has the same bits everywhere.
PROGRAMS = 528
# Rows a program at least. Its share of dw is 8·D bytes written and read; a row of bf16 is 6·D.
SPAN = 8
# Elements a warp: two vectors of 16 bytes a thread in bf16; in backward one, whose fp32 copies of
# five rows are more registers: with two, ptxas spills on sm_100.
FORWARD_ELEMENTS = 512
BACKWARD_ELEMENTS = 256


@triton.jit
def forward_kernel(
    x_ptr, residual_ptr, weight_ptr, total_ptr, y_ptr, r_ptr, eps,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Normalise a row of x, or of x + residual where that is not None. All [N, D] but r [N]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BD)
    inside = columns < D
    at = row * D + columns
    total = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        total += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rounded = total.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, rounded, mask=inside)
        # What is normalised is what is kept: backward sees no other sum.
        total = rounded.to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(total * total, 0) / D + eps)
    tl.store(r_ptr + row, r)
    tl.store(y_ptr + at, (total * r * weight).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows_n", "span"])
def backward_kernel(
    dy_ptr, dtotal_ptr, total_ptr, weight_ptr, r_ptr, dx_ptr, share_ptr, rows_n, span,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write dx of `span` rows and their share of dw."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BD)
    inside = columns < D
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    share = tl.zeros((BD,), tl.float32)
    for row in range(program * span, tl.minimum(program * span + span, rows_n)):
        at = row * D + columns
        unit = tl.load(total_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + row)
        unit *= r
        share += dy * unit
        dy *= weight
        dx = (dy - unit * (tl.sum(dy * unit, 0) / D)) * r
        if dtotal_ptr is not None:
            dx += tl.load(dtotal_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(share_ptr + program * D + columns, share, mask=inside)


def launch(width: int, elements: int) -> tuple[dict[str, int], dict[str, Any]]:
    """Return the constants and the compile options for rows of a width, `elements` a warp."""
    block = triton.next_power_of_2(width)
    warps = min(32, max(1, block // elements))
    return {"D": width, "BD": block}, {"num_warps": warps, "enable_fp_fusion": True}


def forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [..., D], the sum [..., D] (empty without a residual), fp32 r [...]."""
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    r = x.new_empty(x.shape[:-1], dtype=torch.float32)
    total = x.new_empty(0)
    if residual is not None:
        residual, total = residual.contiguous(), torch.empty_like(x)
    if not x.numel():
        return y, total, r
    constants, options = launch(x.shape[-1], FORWARD_ELEMENTS)
    written = None if residual is None else total
    with torch.cuda.device_of(x):
        forward_kernel[(r.numel(),)](
            x, residual, weight, written, y, r, eps, **constants, **options
        )
    return y, total, r


def backward(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, r: Tensor
) -> tuple[Tensor, Tensor]:
    """Return dx in the type of the sum, dw in that of the weight."""
    dy, total, weight = dy.contiguous(), total.contiguous(), weight.contiguous()
    dtotal = None if dtotal is None else dtotal.contiguous()
    dx = torch.empty_like(total)
    rows, width = r.numel(), total.shape[-1]
    if not total.numel():
        return dx, torch.zeros_like(weight)
    span = max(SPAN, triton.cdiv(rows, PROGRAMS))
    shares = r.new_empty(triton.cdiv(rows, span), width)
    constants, options = launch(width, BACKWARD_ELEMENTS)
    with torch.cuda.device_of(dy):
        backward_kernel[(len(shares),)](
            dy, dtotal, total, weight, r, dx, shares, rows, span, **constants, **options
        )
    return dx, shares.sum(0).to(weight.dtype)


def programs() -> Iterator[Program]:
    """Yield both kernels at the widths of the 300M, 1B, 3B and 7B models and at the widest."""
    shapes = [(width, "bf16") for width in (1024, 2048, 3200, 4096, 8192)]
    for width, dtype in [*shapes, (2048, "fp32"), (8192, "fp32")]:
        rows = dict.fromkeys(["weight_ptr", "total_ptr"], f"*{dtype}") | {"r_ptr": "*fp32"}
        forward_types = dict.fromkeys(["x_ptr", "residual_ptr", "y_ptr"], f"*{dtype}") | rows
        backward_types = dict.fromkeys(["dy_ptr", "dtotal_ptr", "dx_ptr"], f"*{dtype}") | rows
        backward_types |= {"share_ptr": "*fp32", "rows_n": "i32", "span": "i32"}
        forms = [
            ("forward", forward_kernel, forward_types | {"eps": "fp32"}, FORWARD_ELEMENTS),
            ("backward", backward_kernel, backward_types, BACKWARD_ELEMENTS),
        ]
        for name, kernel, types, elements in forms:
            constants, options = launch(width, elements)
            optional = ["residual_ptr", "total_ptr"] if name == "forward" else ["dtotal_ptr"]
            for added in (False, True):
                absent = [] if added else optional
                yield Program(
                    name=f"rms_norm {name} D={width} {dtype}" + " residual" * added,
                    kernel=kernel,
                    types={key: value for key, value in types.items() if key not in absent},
                    constants=constants | dict.fromkeys(absent),
                    options=options,
                    core=(name, width, dtype, added) == ("backward", 2048, "bf16", True),
                )
