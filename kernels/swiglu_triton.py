"""The Triton kernels of `swiglu`; importing this file needs triton, nothing else does.

Elementwise: a program has `BLOCK` elements of the flattened tensors, each read once and written
once. fp32 inside; each result is rounded once.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.program import Program

BLOCK = 2048  # 16 elements a thread: two vectors of 16 bytes in bf16
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}


# `elements` is specialised, as a multiple of 16 or not: else no load is wider than one element.
@triton.jit
def forward_kernel(gate_ptr, up_ptr, product_ptr, elements, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    product = gate * tl.sigmoid(gate) * up
    tl.store(product_ptr + at, product.to(product_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    dproduct_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, product_ptr, elements, BLOCK: tl.constexpr
):
    """Write both gradients and, where its pointer is not None, the product."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    dproduct = tl.load(dproduct_ptr + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    silu = gate * s
    dgate = dproduct * up * s * (1.0 + gate * (1.0 - s))
    dup = dproduct * silu
    tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + at, dup.to(dup_ptr.dtype.element_ty), mask=inside)
    if product_ptr is not None:
        product = silu * up
        tl.store(product_ptr + at, product.to(product_ptr.dtype.element_ty), mask=inside)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) · up, contiguous."""
    gate, up = gate.contiguous(), up.contiguous()
    product = torch.empty_like(gate)
    if gate.numel():
        with torch.cuda.device_of(gate):
            forward_kernel[(triton.cdiv(gate.numel(), BLOCK),)](
                gate, up, product, gate.numel(), BLOCK=BLOCK, **OPTIONS
            )
    return product


def backward(
    dproduct: Tensor, gate: Tensor, up: Tensor, recompute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dgate, dup and the product (empty unless it is wanted), contiguous."""
    dproduct, gate, up = dproduct.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(gate)
    product = torch.empty_like(gate) if recompute else gate.new_empty(0)
    if gate.numel():
        written = product if recompute else None
        with torch.cuda.device_of(gate):
            backward_kernel[(triton.cdiv(gate.numel(), BLOCK),)](
                dproduct, gate, up, dgate, dup, written, gate.numel(), BLOCK=BLOCK, **OPTIONS
            )
    return dgate, dup, product


def programs() -> Iterator[Program]:
    """Yield the kernels in bf16 and fp32; their size is no constant of them."""
    for dtype in ("bf16", "fp32"):
        names = ["gate_ptr", "up_ptr", "product_ptr", "dproduct_ptr", "dgate_ptr", "dup_ptr"]
        types = dict.fromkeys(names, f"*{dtype}") | {"elements": "i32"}
        forms = [
            ("forward", forward_kernel, {"dproduct_ptr", "dgate_ptr", "dup_ptr"}),
            ("backward", backward_kernel, {"product_ptr"}),
            ("backward with product", backward_kernel, set()),
        ]
        for name, kernel, absent in forms:
            yield Program(
                name=f"swiglu {name} {dtype}",
                kernel=kernel,
                types={key: value for key, value in types.items() if key not in absent},
                constants={"BLOCK": BLOCK} | ({"product_ptr": None} if name == "backward" else {}),
                options=OPTIONS,
                aligned=frozenset({"elements"}),
                core=name == "backward with product" and dtype == "bf16",
            )
