"""Attention: one entry point and one mask value for every backend.

B batch, H query heads, G key/value heads (G divides H), T queries, S keys, D head dimension.

    triton   our kernels (kernels/attention_triton.py): causal, full and interval masks, blocks that
             nothing reads are skipped, work in proportion to the pairs that are read
    flex     torch's FlexAttention: skips blocks too, any mask; no backward on a CPU
    sdpa     torch's scaled_dot_product_attention: fused kernels for causal and full masks, a dense
             table of pairs and all of their work for the others
    auto     what was measured to be fastest for the device and kind of mask; sdpa if nothing was

A mask is resolved once a batch: what its backend reads is made then, for all layers.

FLOPs: 4·D a pair that is read and head forward, 10·D backward (two products and five). Bytes at the
least: Q, K, V read and O written once. LVM 1B, one causal row: 16 heads of 128 channels and 8.4 M
pairs are 69 GFLOP and 64 MiB forward, 1,000 FLOP a byte: bound by the matrix units, not by memory.
"""

import functools
import json
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import has_triton
from kernels.mask import Mask, bounds, densify, padded

Backend = Literal["auto", "triton", "flex", "sdpa"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # that the kernels take
CHANNELS = 128  # of a head, the most that the kernels take
GRAIN = 16  # they come in multiples of this

MEASURED = Path(__file__).with_name("backends.json")
"""What `auto` takes: {"sm_90": {"causal": "sdpa", …}, …}, written by `kernels.bench --choose`."""


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, scale: float | None = None
) -> Tensor:
    """Softmax attention written out in float64; the oracle of every backend. Shapes as below."""
    groups = q.shape[1] // k.shape[1]
    keys, values = (x.double().repeat_interleave(groups, dim=1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q.double() @ keys.transpose(-1, -2) * scale
    allowed = densify(mask, k.shape[2])
    if mask.causal:
        allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()[None]
    if allowed is not None:
        scores = scores.masked_fill(~allowed[:, None], float("-inf"))
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)  # a row without keys gives zeros
    return (weights @ values).to(q.dtype)


@functools.cache
def measured(capability: str) -> dict[str, Any]:
    """Return the fastest backend of each kind of mask on an architecture; {} where unmeasured.

    Beside the kinds "measured" says on what device, when and with what software.
    """
    return json.loads(MEASURED.read_text(encoding="utf-8")).get(capability, {})


def choose(backend: Backend, mask: Mask, device: torch.device) -> Backend:
    """Return the backend that `auto` stands for; refuse one that cannot run here, with what can."""
    if backend not in get_args(Backend):
        raise ValueError(f"attention backend {backend!r}: wanted one of {get_args(Backend)}")
    if backend == "auto":
        if device.type != "cuda":
            return "sdpa"
        major, minor = torch.cuda.get_device_capability(device)
        found = measured(f"sm_{major}{minor}").get(mask.kind, "sdpa")
        return "sdpa" if found == "triton" and not has_triton() else found
    if backend == "triton" and not has_triton():
        raise ValueError("attention backend 'triton': triton does not import here; take 'sdpa'")
    if backend == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"attention backend 'triton' on {device.type}: wanted cuda; take 'auto'")
    if backend == "triton" and mask.kind == "dense":
        raise ValueError(
            "attention backend 'triton' reads intervals; a mask with islands is none: take 'auto', "
            "'flex' or 'sdpa'"
        )
    return backend


def resolve(
    mask: Mask, *, queries: int, keys: int, device: torch.device, backend: Backend = "auto"
) -> Mask:
    """Choose a backend and add the form that it reads; call once a batch, before the layers."""
    backend = choose(backend, mask, device)
    if backend == "sdpa":
        return replace(mask, backend=backend, dense=densify(mask, keys))
    if backend == "flex":
        return replace(mask, backend=backend, flex=flex_mask(mask, queries, keys, device))
    if mask.lo is None or mask.hi is None or mask.by_key is not None:
        return replace(mask, backend=backend)
    lo, hi = mask.lo.int().contiguous(), mask.hi.int().contiguous()
    by_query, by_key = bounds(lo, hi, keys)
    return replace(mask, backend=backend, lo=lo, hi=hi, by_query=by_query, by_key=by_key)


def flex_mask(mask: Mask, queries: int, keys: int, device: torch.device) -> Any:
    """Return the BlockMask of a mask. Causal and full ones are the same for every batch."""
    from torch.nn.attention.flex_attention import create_block_mask

    lo, hi, dense = mask.lo, mask.hi, mask.dense

    def reads(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if lo is not None and hi is not None:
            return (k >= lo[b, q]) & (k < hi[b, q])
        if dense is not None:
            return dense[b, q, k]
        return k <= q if mask.causal else k < keys

    rows = lo if lo is not None else dense
    batch = None if rows is None else rows.shape[0]
    return create_block_mask(reads, batch, None, queries, keys, device=device)


@functools.cache
def compiled_flex() -> Any:
    """Return FlexAttention compiled, which it needs in order not to make the table of scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    grouped = q.shape[1] != k.shape[1]
    if q.device.type == "cuda" and not torch.compiler.is_compiling():
        return compiled_flex()(q, k, v, block_mask=mask.flex, scale=scale, enable_gqa=grouped)
    with warnings.catch_warnings():  # that it is slow uncompiled; on a CPU it is there to compare
        warnings.simplefilter("ignore")
        return flex_attention(q, k, v, block_mask=mask.flex, scale=scale, enable_gqa=grouped)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None) -> Tensor:
    dtype = q.dtype
    if q.device.type == "cpu" and dtype == torch.bfloat16 and q.requires_grad:
        # torch 2.13's CPU kernel is slow backward in bf16: fp32, casts included, takes 30 ms for 45
        # there, and 18 for 11 forward (8 rows, 4 heads of 32, 512 positions; a Xeon core with AMX).
        q, k, v = q.float(), k.float(), v.float()
    dense = None if mask.dense is None else mask.dense[:, None]
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=dense, is_causal=mask.causal, scale=scale, enable_gqa=grouped
    ).to(dtype)


# Opaque operators: torch.compile neither looks into the kernels nor breaks its graph at them, and
# activation checkpointing can name them in a policy.
@torch.library.custom_op("kernels::attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor | None,
    hi: Tensor | None,
    by_query: Tensor | None,
    by_key: Tensor | None,
    causal: bool,
    exact: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from kernels.attention_triton import forward  # needs triton, which only some machines have

    mask = Mask(causal=causal, lo=lo, hi=hi, exact=exact, by_query=by_query, by_key=by_key)
    return forward(q, k, v, mask, scale)


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    b, h, t, d = q.shape
    log = q.new_empty(b, h, padded(t), dtype=torch.float32)
    return q.new_empty(b, t, h, d).transpose(1, 2), log


@torch.library.custom_op("kernels::attention_backward", mutates_args=())
def attention_backward_op(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    log: Tensor,
    lo: Tensor | None,
    hi: Tensor | None,
    by_query: Tensor | None,
    by_key: Tensor | None,
    causal: bool,
    exact: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from kernels.attention_triton import backward

    mask = Mask(causal=causal, lo=lo, hi=hi, exact=exact, by_query=by_query, by_key=by_key)
    return backward(do, q, k, v, o, log, mask, scale)


@attention_backward_op.register_fake
def _(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    def like(x: Tensor) -> Tensor:
        return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)

    return like(q), like(k), like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal, ctx.exact, ctx.scale = inputs
    o, log = output
    q, k, v, *masks = tensors
    ctx.mark_non_differentiable(log)
    ctx.save_for_backward(q, k, v, o, log, *masks)


def _backward(ctx: Any, do: Tensor, _: Any) -> tuple[Any, ...]:
    q, k, v, o, log, *masks = ctx.saved_tensors
    rest = (ctx.causal, ctx.exact, ctx.scale)
    grads = attention_backward_op(packed(do), q, k, v, o, log, *masks, *rest)
    return (*grads, *(None for _ in range(len(masks) + len(rest))))


attention_op.register_autograd(_backward, setup_context=_save)


def packed(x: Tensor) -> Tensor:
    """Return x with its channels side by side in memory, which the kernels rely on."""
    return x if x.stride(-1) == 1 else x.contiguous()


def by_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None) -> Tensor:
    dim = q.shape[-1]
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise ValueError(
            f"attention of {q.dtype}, {k.dtype}, {v.dtype} by triton: wanted one of {DTYPES}"
        )
    if scale is not None and scale <= 0:  # the largest product would not be the largest score
        raise ValueError(f"attention with scale {scale} by triton: wanted more than 0")
    if dim > CHANNELS:
        raise ValueError(
            f"heads of {dim} channels: the triton backend takes up to {CHANNELS}; take 'sdpa'"
        )
    scale = dim**-0.5 if scale is None else scale
    # Heads of 100 channels start at no multiple of 16 bytes, which wide loads and tensor maps want.
    # A copy with zeros costs 1/T of the pairs' work; autograd cuts and fills the gradients.
    q, k, v = (F.pad(x, (0, -dim % GRAIN)) if dim % GRAIN else packed(x) for x in (q, k, v))
    tables = (mask.lo, mask.hi, mask.by_query, mask.by_key)
    return attention_op(q, k, v, *tables, mask.causal, mask.exact, scale)[0][..., :dim]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attend from q [B, H, T, D] to k, v [B, G, S, D] under `mask`; returns [B, H, T, D].

    `scale` defaults to 1/sqrt(D). Query head h reads key head h // (H/G). A row that reads nothing
    gives zeros. `backend` is for a mask that was not resolved; a resolved one names its own. The
    triton backend is deterministic and runs in fp32, fp16 and bf16, with sums in fp32.
    """
    if mask.backend is None:
        queries, keys = q.shape[2], k.shape[2]
        mask = resolve(mask, queries=queries, keys=keys, device=q.device, backend=backend)
    with torch.autocast(q.device.type, enabled=False):
        if mask.backend == "sdpa":
            return sdpa(q, k, v, mask, scale)
        if mask.backend == "flex":
            return flex(q, k, v, mask, scale)
        return by_kernel(q, k, v, mask, scale)
