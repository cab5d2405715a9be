"""Rotary positions of queries and keys, with the RMSNorm of each head before them (QK-norm).

B batch, T positions, H query heads, G key heads, C channels of a head. Channel i < C/2 pairs with
i + C/2, as in Hugging Face (Su et al., "RoFormer", 2021; norm of heads: Dehghani et al., "Scaling
vision transformers to 22 billion parameters", 2023; with RMSNorm as in Qwen3):

    n = x · w / sqrt(mean(x²) + eps)           where weights are given, else n = x
    y_i        = n_i · cos - n_{i+C/2} · sin
    y_{i+C/2}  = n_{i+C/2} · cos + n_i · sin

A rotation's transpose is the rotation back: backward turns dy by the negative angle, then goes
through the norm. Without a norm nothing is kept but the angles, which all layers share; with one
the raw q and k are, and the root mean square of a head is computed again from the row that is read
anyway. Angles take no gradient.

With e bytes an element and X = B·T·(H + G)·C elements, forward moves 2·e·X + 4·B·T·C bytes (the
angles once a token, not once a head), backward as much, with QK-norm 3·e·X. One op at a time in
bf16: 48·X forward, not 4·X. FLOPs: 3·X, with QK-norm 7·X, forward. Memory of q, k and results is
ordered [B, T, heads, C], as the linear layers write it; the [B, heads, T, C] tensors are views.

torch.compile can fuse each of q and k into as few bytes, and keeps as much and 4 bytes a head: no
memory to save there. So the kernel is for code that is not compiled, and stays behind
`backend="triton"` until a GPU has timed it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.rms_norm import Backend, wants_kernel

MAX_CHANNELS = 256  # of a head: 16 heads of both halves are in the registers of one program


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [B, heads, T, C] by angles [B, 1, T, C/2] in fp32; the type of x."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def rope_reference(
    x: Tensor, cos: Tensor, sin: Tensor, *, weight: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """Return x of q or k, normed and turned, in float64 as complex numbers; the oracle."""
    x = x.double()
    if weight is not None:
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    turned = torch.complex(*x.chunk(2, -1)) * torch.complex(cos.double(), sin.double())
    return torch.cat((turned.real, turned.imag), -1)


def empty_heads(x: Tensor) -> Tensor:
    """Return an empty [B, heads, T, C] like x whose memory is ordered [B, T, heads, C]."""
    b, heads, t, c = x.shape
    return x.new_empty(b, t, heads, c).transpose(1, 2)


@torch.library.custom_op("kernels::rope", mutates_args=())
def rope_op(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    back: bool,
) -> tuple[Tensor, Tensor]:
    """Turn q and k, backwards if `back`, after the norm of their heads if there are weights."""
    from kernels.rope_triton import turn  # needs triton, which only some machines have

    out = empty_heads(q), empty_heads(k)
    turn((q, k), out, cos, sin, (q_weight, k_weight), eps, back)
    return out


@rope_op.register_fake
def _(q, k, cos, sin, q_weight, k_weight, eps, back) -> tuple[Tensor, Tensor]:
    return empty_heads(q), empty_heads(k)


@torch.library.custom_op("kernels::rope_norm_backward", mutates_args=())
def rope_norm_backward_op(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of raw q and k and of both weights."""
    from kernels.rope_triton import norm_backward

    out = empty_heads(q), empty_heads(k)
    weights = norm_backward((dq, dk), (q, k), out, cos, sin, (q_weight, k_weight), eps)
    return *out, *weights


@rope_norm_backward_op.register_fake
def _(dq, dk, q, k, cos, sin, q_weight, k_weight, eps) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_heads(q), empty_heads(k), torch.empty_like(q_weight), torch.empty_like(k_weight)


def keep(ctx, inputs, output) -> None:
    q, k, cos, sin, q_weight, k_weight, ctx.eps, ctx.back = inputs
    ctx.normed = q_weight is not None
    ctx.save_for_backward(cos, sin, *((q, k, q_weight, k_weight) if ctx.normed else ()))


def differentiate(ctx, dq: Tensor, dk: Tensor):
    cos, sin, *normed = ctx.saved_tensors
    if not ctx.normed:
        dq, dk = rope_op(dq, dk, cos, sin, None, None, ctx.eps, not ctx.back)
        return dq, dk, None, None, None, None, None, None
    q, k, q_weight, k_weight = normed
    dq, dk, dq_weight, dk_weight = rope_norm_backward_op(
        dq, dk, q, k, cos, sin, q_weight, k_weight, ctx.eps
    )
    return dq, dk, None, None, dq_weight, dk_weight, None, None


rope_op.register_autograd(differentiate, setup_context=keep)


def check(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, weights: tuple[Tensor | None, Tensor | None]
) -> None:
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"rope of {q.ndim} and {k.ndim} dimensions: wanted [B, heads, T, C]")
    b, _, t, c = q.shape
    if k.shape[0] != b or k.shape[2:] != (t, c) or c % 2:
        raise ValueError(
            f"rope of q {tuple(q.shape)} and k {tuple(k.shape)}: "
            "wanted [B, H, T, C] and [B, G, T, C] with C even"
        )
    for angle in (cos, sin):
        if angle.ndim != 4 or angle.shape[0] not in (1, b) or angle.shape[1:] != (1, t, c // 2):
            raise ValueError(f"rope with angles {tuple(angle.shape)}: wanted [B, 1, T, C/2]")
    for weight in weights:
        if (weight is None) != (weights[0] is None) or (weight is not None and len(weight) != c):
            raise ValueError(f"rope with norms: wanted both weights, [C] = [{c}], or neither")


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    backend: Backend = "torch",
) -> tuple[Tensor, Tensor]:
    """Return q [B, H, T, C] and k [B, G, T, C] turned by angles cos, sin, fp32 [B or 1, 1, T, C/2].

    With weights [C] each head is normed first. Any floating type, fp32 inside, results in the type
    of q and k. `torch` is the model's own form bit for bit (with norms: `F.rms_norm`, which rounds
    to that type, then `rotate`) and open to torch.compile; `triton` is one launch for q and k,
    rounds once, at the end, and has the same bits on every run.
    """
    check(q, k, cos, sin, (q_weight, k_weight))
    if wants_kernel(backend):
        if q.shape[3] > MAX_CHANNELS:
            raise ValueError(f"rope of {q.shape[3]} channels: the kernel takes {MAX_CHANNELS}")
        return rope_op(q, k, cos.detach(), sin.detach(), q_weight, k_weight, eps, False)
    if q_weight is not None and k_weight is not None:
        q = F.rms_norm(q, (q.shape[3],), q_weight, eps)
        k = F.rms_norm(k, (k.shape[3],), k_weight, eps)
    return rotate(q, cos, sin), rotate(k, cos, sin)
