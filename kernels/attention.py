"""Attention: one entry point and one mask value for every backend.

B batch, H query heads, G key/value heads (G divides H), T queries, S keys, D head dimension.

A mask says which keys a query reads. Most masks of visual sentences (causal, packed documents,
prefixes, images as blocks) let row i read one interval of keys, lo[i] <= k < hi[i]:

    two documents of three and two positions, causal      lo       hi
        1 . . . .                                          0        1
        1 1 . . .                                          0        2
        1 1 1 . .                                          0        3
        . . . 1 .                                          3        4
        . . . 1 1                                          3        5

The interval form is what a block-skipping kernel wants; SDPA wants the dense form. `resolve` makes
what a backend needs once a batch, so that no layer does it again.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Backend = Literal["auto", "sdpa"]


@dataclass(frozen=True, slots=True)
class Mask:
    """Which keys each query reads. Made by the class methods; `dense` wins where it is present."""

    causal: bool = False  # T == S and row i reads k <= i; nothing is stored
    lo: Tensor | None = None  # [B, T] int32, first key read
    hi: Tensor | None = None  # [B, T] int32, one past the last key read
    dense: Tensor | None = None  # [B, T, S] bool, True where read

    @classmethod
    def interval(cls, lo: Tensor, hi: Tensor) -> "Mask":
        """Row i reads lo[i] <= k < hi[i]; lo == hi reads nothing and gives zeros."""
        return cls(lo=lo, hi=hi)

    @classmethod
    def full(cls) -> "Mask":
        """Every query reads every key."""
        return cls()


def densify(mask: Mask, keys: int) -> Tensor | None:
    """Return the bool [B, T, S] form of a mask, or None where it is causal or full."""
    if mask.dense is not None or mask.lo is None or mask.hi is None:
        return mask.dense
    k = torch.arange(keys, device=mask.lo.device, dtype=torch.int32)
    return (k >= mask.lo[:, :, None]) & (k < mask.hi[:, :, None])


def choose(backend: Backend) -> Backend:
    """Return the backend that `auto` stands for; an unknown name fails with the known ones."""
    if backend not in get_args(Backend):
        raise ValueError(f"attention backend {backend!r}: wanted one of {get_args(Backend)}")
    return "sdpa"


def resolve(mask: Mask, keys: int, *, backend: Backend = "auto") -> Mask:
    """Add the form that `backend` reads; call once a batch, before the layers."""
    choose(backend)
    return replace(mask, dense=densify(mask, keys))


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, scale: float | None = None
) -> Tensor:
    """Softmax attention written out in float64; the oracle of every backend. Shapes as below."""
    groups = q.shape[1] // k.shape[1]
    keys, values = (x.double().repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q.double() @ keys.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    allowed = densify(mask, k.shape[2])
    if mask.causal:
        allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()[None]
    if allowed is not None:
        scores = scores.masked_fill(~allowed[:, None], float("-inf"))
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)  # a row without keys gives zeros
    return (weights @ values).to(q.dtype)


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

    `scale` defaults to 1/sqrt(D). Query head h reads key head h // (H/G).
    """
    choose(backend)
    dense = densify(mask, k.shape[2])
    dtype = q.dtype
    if q.device.type == "cpu" and dtype == torch.bfloat16 and q.requires_grad:
        # torch 2.13's CPU kernel is slow backward in bf16: fp32, casts included, takes 30 ms for 45
        # there, and 18 for 11 forward (8 rows, 4 heads of 32, 512 positions; a Xeon core with AMX).
        q, k, v = q.float(), k.float(), v.float()
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if dense is None else dense[:, None],
            is_causal=mask.causal,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        ).to(dtype)
