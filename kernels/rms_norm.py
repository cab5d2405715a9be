"""RMSNorm, with the addition of the residual branch before it: y = x / rms(x) · w.

N rows, D width, all sums in fp32 (Zhang & Sennrich, "Root mean square layer normalization", 2019):

    s = x + residual                     one rounding to the type of x, as where torch adds
    r = 1 / sqrt(mean(s²) + eps)         one fp32 number a row, kept for the backward pass
    y = s · r · w

Backward, with x̂ = s · r and g = w · dy:  ds = r · (g - x̂ · mean(x̂ · g)) + the gradient of the sum,
dx = dresidual = ds, dw = the sum of dy · x̂ over the rows.

About 4·N·D FLOPs forward and 9·N·D backward; limited by bytes. With e bytes an element:

    backend "triton"     forward 2·e·N·D,  with a residual 4·e·N·D (read x, r; write s, y)
                         backward 3·e·N·D, with a residual 4·e·N·D (read dy, s, ds; write dx)
                         and 8·D for each of the programs that sum dw
    one op at a time     forward 5·e·N·D with a residual: the sum is read again

Kept for the backward pass: s, which other layers keep too, and 4·N bytes. torch.compile keeps the
same, so there is no memory to save, and it fuses the same bytes; the kernel is for code that is not
compiled, and stays behind `backend="triton"` until a GPU has timed it.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import has_triton

Backend = Literal["torch", "triton"]

MAX_WIDTH = 8192  # a row is in the registers of one program; rows of 16384 spill in backward


def wants_kernel(backend: Backend) -> bool:
    """Say whether a backend is the kernel; refuse names that are unknown or cannot run."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend {backend!r}: wanted one of {get_args(Backend)}")
    if backend == "triton" and not has_triton():
        raise ValueError("backend 'triton': triton does not import here; take 'torch'")
    return backend == "triton"


def rms_norm_reference(
    x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return y and the sum in float64, by the formula; the oracle of every backend."""
    total = x.double() if residual is None else x.double() + residual.double()
    rms = (total.square().mean(-1, keepdim=True) + eps).sqrt()
    return total / rms * weight.double(), total


# Two opaque operators, one a direction. `triton_op`, which torch.compile could look into, refuses
# kernels that triton interprets.
@torch.library.custom_op("kernels::rms_norm", mutates_args=())
def rms_norm_op(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the sum (empty without a residual) and fp32 r of the rows."""
    from kernels.rms_norm_triton import forward  # needs triton, which only some machines have

    return forward(x, weight, residual, eps)


@rms_norm_op.register_fake
def _(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(0) if residual is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), total, x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("kernels::rms_norm_backward", mutates_args=())
def rms_norm_backward_op(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, r: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the normalised sum and of the weight."""
    from kernels.rms_norm_triton import backward

    return backward(dy, dtotal, total, weight, r)


@rms_norm_backward_op.register_fake
def _(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, r: Tensor
) -> tuple[Tensor, Tensor]:
    return total.new_empty(total.shape), weight.new_empty(weight.shape)


def keep(ctx, inputs, output) -> None:
    x, weight, residual, _ = inputs
    _, total, r = output
    ctx.mark_non_differentiable(r)
    ctx.added = residual is not None
    ctx.save_for_backward(total if ctx.added else x, weight, r)


def differentiate(ctx, dy: Tensor, dtotal: Tensor, _: Tensor):
    total, weight, r = ctx.saved_tensors
    dx, dweight = rms_norm_backward_op(dy, dtotal if ctx.added else None, total, weight, r)
    return dx, dweight, dx if ctx.added else None, None


rms_norm_op.register_autograd(differentiate, setup_context=keep)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    residual: Tensor | None = None,
    backend: Backend = "torch",
) -> Tensor | tuple[Tensor, Tensor]:
    """Return y = norm of x [..., D] times weight [D]; given a residual, (y, x + residual).

    Any floating type; sums in fp32, results in the type of x. `torch` is `F.rms_norm`, bit for bit
    `nn.RMSNorm`, and open to torch.compile. `triton` sums dw in an order that depends on the shape
    alone: the same bits on every run.
    """
    width = x.shape[-1] if x.ndim else 0
    if weight.shape != (width,) or (residual is not None and residual.shape != x.shape):
        other = "no" if residual is None else tuple(residual.shape)
        raise ValueError(
            f"norm of {tuple(x.shape)} with weight {tuple(weight.shape)} and {other} residual: "
            "wanted [..., D], [D] and [..., D]"
        )
    if wants_kernel(backend):
        if width > MAX_WIDTH:
            raise ValueError(f"norm of width {width}: the kernel takes {MAX_WIDTH}; take 'torch'")
        y, total, _ = rms_norm_op(x, weight, residual, eps)
        return y if residual is None else (y, total)
    if residual is None:
        return F.rms_norm(x, (width,), weight, eps)
    total = x + residual
    return F.rms_norm(total, (width,), weight, eps), total
