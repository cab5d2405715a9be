"""The Triton kernels of `rope`; importing this file needs triton, nothing else does.

A program has a token: its angles are read once and all its heads of q and then of k are turned, in
tiles of `HEADS`. In memory ordered [B, T, heads, C] they lie in a row, as they do in what is
written.

    token (b, t):   cos, sin [C/2]      q [H, C]  tile ... tile      k [G, C]  tile ... tile
                        └────────────────► halves a, b of a tile:  a·cos - b·sin,  b·cos + a·sin

Backward through the norm walks over `span` tokens and keeps its shares of both weights' gradients
in registers; they are summed afterwards. No atomics: the order of every sum is fixed by the shape.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.program import Program

HEADS = 16  # of a tile
PROGRAMS = 528  # as in kernels/rms_norm_triton.py
SPAN = 8


@triton.jit
def turn_heads(
    x_ptr, head_stride, y_ptr, weight_ptr, cos, sin, eps,
    N: tl.constexpr, BN: tl.constexpr, C: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Turn the N heads of a token, whose channels are C/2 and C/2, from x [N, C] to y [N, C]."""
    columns = tl.arange(0, BC)
    real = columns < C // 2
    for first in range(0, N, BN):
        heads = first + tl.arange(0, BN)
        inside = (heads < N)[:, None] & real[None, :]
        at = x_ptr + heads[:, None] * head_stride + columns[None, :]
        a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(at + C // 2, mask=inside, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            r = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / C + eps)
            wa = tl.load(weight_ptr + columns, mask=real, other=0.0).to(tl.float32)
            wb = tl.load(weight_ptr + C // 2 + columns, mask=real, other=0.0).to(tl.float32)
            a = a * r[:, None] * wa[None, :]
            b = b * r[:, None] * wb[None, :]
        out = y_ptr + heads[:, None] * C + columns[None, :]
        dtype: tl.constexpr = y_ptr.dtype.element_ty
        tl.store(out, (a * cos[None, :] - b * sin[None, :]).to(dtype), mask=inside)
        tl.store(out + C // 2, (b * cos[None, :] + a * sin[None, :]).to(dtype), mask=inside)


@triton.jit
def load_angles(cos_ptr, sin_ptr, batch, t, batch_stride, t_stride, C: tl.constexpr, BC: tl.constexpr):  # fmt: skip  # noqa: E501
    """Return cos and sin [C/2] of a token."""
    columns = tl.arange(0, BC)
    at = batch * batch_stride + t * t_stride + columns
    cos = tl.load(cos_ptr + at, mask=columns < C // 2, other=0.0)
    return cos, tl.load(sin_ptr + at, mask=columns < C // 2, other=0.0)


@triton.jit(do_not_specialize=["length"])
def turn_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, q_out_ptr, k_out_ptr, length,
    q_batch, q_head, q_t, k_batch, k_head, k_t, angle_batch, angle_t, eps,
    H: tl.constexpr, G: tl.constexpr, BH: tl.constexpr, BG: tl.constexpr,
    C: tl.constexpr, BC: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Turn all heads of a token. The scalars are strides of q, k and the angles, in elements."""
    token = tl.program_id(0).to(tl.int64)
    batch, t = token // length, token % length
    cos, sin = load_angles(cos_ptr, sin_ptr, batch, t, angle_batch, angle_t, C, BC)
    if BACK:
        sin = -sin
    q = q_ptr + batch * q_batch + t * q_t
    k = k_ptr + batch * k_batch + t * k_t
    turn_heads(q, q_head, q_out_ptr + token * H * C, q_weight_ptr, cos, sin, eps, H, BH, C, BC)
    turn_heads(k, k_head, k_out_ptr + token * G * C, k_weight_ptr, cos, sin, eps, G, BG, C, BC)


@triton.jit
def norm_backward_heads(
    dy_ptr, dy_head, x_ptr, x_head, dx_ptr, weight_ptr, cos, sin, eps, da_weight, db_weight,
    N: tl.constexpr, BN: tl.constexpr, C: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write dx of a token's heads; return the shares [BN, C/2] of dw with the token's added."""
    columns = tl.arange(0, BC)
    real = columns < C // 2
    wa = tl.load(weight_ptr + columns, mask=real, other=0.0).to(tl.float32)[None, :]
    wb = tl.load(weight_ptr + C // 2 + columns, mask=real, other=0.0).to(tl.float32)[None, :]
    for first in range(0, N, BN):
        heads = first + tl.arange(0, BN)
        inside = (heads < N)[:, None] & real[None, :]
        at = dy_ptr + heads[:, None] * dy_head + columns[None, :]
        ya = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        yb = tl.load(at + C // 2, mask=inside, other=0.0).to(tl.float32)
        da = ya * cos[None, :] + yb * sin[None, :]
        db = yb * cos[None, :] - ya * sin[None, :]
        at = x_ptr + heads[:, None] * x_head + columns[None, :]
        a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(at + C // 2, mask=inside, other=0.0).to(tl.float32)
        r = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / C + eps)[:, None]
        a *= r
        b *= r
        da_weight += da * a
        db_weight += db * b
        da *= wa
        db *= wb
        mean = ((tl.sum(da * a, 1) + tl.sum(db * b, 1)) / C)[:, None]
        out = dx_ptr + heads[:, None] * C + columns[None, :]
        dtype: tl.constexpr = dx_ptr.dtype.element_ty
        tl.store(out, ((da - a * mean) * r).to(dtype), mask=inside)
        tl.store(out + C // 2, ((db - b * mean) * r).to(dtype), mask=inside)
    return da_weight, db_weight


@triton.jit
def store_share(share_ptr, da_weight, db_weight, C: tl.constexpr, BC: tl.constexpr):
    columns = tl.arange(0, BC)
    tl.store(share_ptr + columns, tl.sum(da_weight, 0), mask=columns < C // 2)
    tl.store(share_ptr + C // 2 + columns, tl.sum(db_weight, 0), mask=columns < C // 2)


@triton.jit(do_not_specialize=["tokens", "length", "span"])
def norm_backward_kernel(
    dq_ptr, dk_ptr, q_ptr, k_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr,
    q_out_ptr, k_out_ptr, share_ptr, tokens, length, span,
    dq_batch, dq_head, dq_t, dk_batch, dk_head, dk_t,
    q_batch, q_head, q_t, k_batch, k_head, k_t, angle_batch, angle_t, eps,
    H: tl.constexpr, G: tl.constexpr, BH: tl.constexpr, BG: tl.constexpr,
    C: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write gradients of raw q and k of `span` tokens, and shares [2, C] of the weights'."""
    program = tl.program_id(0).to(tl.int64)
    qa = tl.zeros((BH, BC), tl.float32)
    qb = tl.zeros((BH, BC), tl.float32)
    ka = tl.zeros((BG, BC), tl.float32)
    kb = tl.zeros((BG, BC), tl.float32)
    for token in range(program * span, tl.minimum(program * span + span, tokens)):
        batch, t = token // length, token % length
        cos, sin = load_angles(cos_ptr, sin_ptr, batch, t, angle_batch, angle_t, C, BC)
        qa, qb = norm_backward_heads(
            dq_ptr + batch * dq_batch + t * dq_t, dq_head, q_ptr + batch * q_batch + t * q_t,
            q_head, q_out_ptr + token * H * C, q_weight_ptr, cos, sin, eps, qa, qb, H, BH, C, BC,
        )  # fmt: skip
        ka, kb = norm_backward_heads(
            dk_ptr + batch * dk_batch + t * dk_t, dk_head, k_ptr + batch * k_batch + t * k_t,
            k_head, k_out_ptr + token * G * C, k_weight_ptr, cos, sin, eps, ka, kb, G, BG, C, BC,
        )  # fmt: skip
    store_share(share_ptr + program * 2 * C, qa, qb, C, BC)
    store_share(share_ptr + program * 2 * C + C, ka, kb, C, BC)


def launch(heads: int, groups: int, channels: int) -> tuple[dict[str, int], dict[str, Any]]:
    """Return the constants and the compile options of both kernels."""
    tiles = [min(HEADS, triton.next_power_of_2(n)) for n in (heads, groups)]
    block = max(8, triton.next_power_of_2(channels // 2))
    constants = {"H": heads, "G": groups, "BH": tiles[0], "BG": tiles[1], "C": channels}
    # Eight elements of either half a thread: one vector of 16 bytes in bf16.
    warps = min(8, max(1, max(tiles) * block // 256))
    return constants | {"BC": block}, {"num_warps": warps, "enable_fp_fusion": True}


def rows_of_channels(x: Tensor) -> Tensor:
    """Return x with the channels of a head beside each other."""
    return x if x.stride(3) == 1 else x.contiguous()


def prepare_angles(cos: Tensor, sin: Tensor, batch: int) -> tuple[Tensor, Tensor, int, int]:
    """Return both with equal strides, and those of batch and position; a batch of 1 serves all."""
    cos, sin = (x.float().contiguous().expand(batch, -1, -1, -1) for x in (cos, sin))
    return cos, sin, cos.stride(0), cos.stride(2)


def turn(
    x: tuple[Tensor, Tensor],
    out: tuple[Tensor, Tensor],
    cos: Tensor,
    sin: Tensor,
    weights: tuple[Tensor | None, Tensor | None],
    eps: float,
    back: bool,
) -> None:
    """Write q and k, normed if there are weights and turned, to `out` of order [B, T, heads, C]."""
    q, k = (rows_of_channels(y) for y in x)
    b, heads, t, channels = q.shape
    if not b * t:
        return
    cos, sin, *angle_strides = prepare_angles(cos, sin, b)
    q_weight, k_weight = (None if w is None else w.contiguous() for w in weights)
    constants, options = launch(heads, k.shape[1], channels)
    with torch.cuda.device_of(q):
        turn_kernel[(b * t,)](
            q, k, cos, sin, q_weight, k_weight, *out, t, *q.stride()[:3], *k.stride()[:3],
            *angle_strides, eps, BACK=back, **constants, **options,
        )  # fmt: skip


def norm_backward(
    dy: tuple[Tensor, Tensor],
    x: tuple[Tensor, Tensor],
    out: tuple[Tensor, Tensor],
    cos: Tensor,
    sin: Tensor,
    weights: tuple[Tensor, Tensor],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Write the gradients of raw q and k to `out`; return those of the weights."""
    dq, dk, q, k = (rows_of_channels(y) for y in (*dy, *x))
    b, heads, t, channels = q.shape
    if not b * t:
        return torch.zeros_like(weights[0]), torch.zeros_like(weights[1])
    cos, sin, *angle_strides = prepare_angles(cos, sin, b)
    span = max(SPAN, triton.cdiv(b * t, PROGRAMS))
    shares = cos.new_empty(triton.cdiv(b * t, span), 2, channels)  # fp32
    constants, options = launch(heads, k.shape[1], channels)
    strides = [stride for y in (dq, dk, q, k) for stride in y.stride()[:3]]
    with torch.cuda.device_of(q):
        norm_backward_kernel[(len(shares),)](
            dq, dk, q, k, cos, sin, *(w.contiguous() for w in weights), *out, shares,
            b * t, t, span, *strides, *angle_strides, eps, **constants, **options,
        )  # fmt: skip
    # Two sums: an operator may not return two views of one tensor.
    return shares[:, 0].sum(0).to(weights[0].dtype), shares[:, 1].sum(0).to(weights[1].dtype)


def programs() -> Iterator[Program]:
    """Yield the kernels at heads of the 300M and 1B models, shared keys, a 3B's, and the widest."""
    angles = {"cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    strides = [f"{x}_{axis}" for x in ("q", "k") for axis in ("batch", "head", "t")]
    numbers = dict.fromkeys([*strides, "angle_batch", "angle_t"], "i32") | {"eps": "fp32"}
    pointers = dict.fromkeys(["q_ptr", "k_ptr", "q_out_ptr", "k_out_ptr"], "*bf16") | angles
    weights = dict.fromkeys(["q_weight_ptr", "k_weight_ptr"], "*bf16")
    gradients = dict.fromkeys(["dq_ptr", "dk_ptr"], "*bf16") | {"share_ptr": "*fp32"}
    gradients |= dict.fromkeys([f"d{stride}" for stride in strides], "i32")
    sizes = {"tokens": "i32", "length": "i32", "span": "i32"}
    shapes = ((8, 8, 128), (16, 16, 128), (32, 8, 128), (32, 32, 100), (16, 16, 256))
    for heads, groups, channels in shapes:
        constants, options = launch(heads, groups, channels)
        shape = f"H={heads} G={groups} C={channels} bf16"
        # Strides of heads of 100 channels are multiples of 4 alone.
        aligned = frozenset({*strides, "angle_batch", "angle_t"} if channels % 16 == 0 else ())
        for normed in (False, True):
            yield Program(
                name=f"rope {shape}" + " norm" * normed,
                kernel=turn_kernel,
                types=pointers | (weights if normed else {}) | {"length": "i32"} | numbers,
                constants=constants | ({} if normed else dict.fromkeys(weights)) | {"BACK": False},
                options=options,
                aligned=aligned,
            )
        yield Program(
            name=f"rope norm backward {shape}",
            kernel=norm_backward_kernel,
            types=pointers | weights | gradients | sizes | numbers,
            constants=constants,
            options=options,
            aligned=aligned | {f"d{stride}" for stride in strides if channels % 16 == 0},
            core=(heads, groups, channels) == (16, 16, 128),
        )
