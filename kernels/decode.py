"""Decode attention: one new position a row against a cache of keys and values.

R rows, H query heads, G key heads (query head h reads key head h // (H/G)), D head dimension, S
places of a row's cache, of which the first lengths[r] are filled. Two forms:

    decode_attention          every row has a cache of its own
    shared_prefix_attention   C candidates of one prompt read its cache and then their own

Each key is read once and used for a few products, so the time is the time to read the cache. With
b bytes an element a step moves

    own caches        2·R·G·length·D·b
    shared prefix     2·B·G·prefix·D·b + 2·R·G·suffix·D·b      B = R/C prompts

Sixteen half-drawn candidates after seven images (prefix 1793, suffix 128; 300M: 22 layers, G 8,
D 128, bf16): 2.8 GB become 0.35 GB. The rows of a matrix product are all that read the same keys:

    own, H/G = 2                       shared, C = 3, H/G = 2
              keys of row r                      keys of the prompt
    head 0  [ . . . . . . ]            candidate 0, head 0  [ . . . . . . ]
    head 1  [ . . . . . . ]            candidate 0, head 1  [ . . . . . . ]
                                       candidate 1, head 0  [ . . . . . . ]   ...

so that own caches are the case C = 1. A pass gives for each row a result over its keys and the
logarithm of its sum of exponentials (LSE); passes, and stretches of one cache, are put together by

    out = Σ_i 2^(lse_i - top) · out_i / Σ_i 2^(lse_i - top),    top = max_i lse_i

(split-KV: Dao et al., "Flash-Decoding", 2023; shared prefix: Ye et al., "Cascade Inference", 2024,
and Juravsky et al., "Hydragen", arXiv 2402.05099.)

    triton   kernels/decode_triton.py: stretches of a cache run at once. `lengths` is read by the
             kernel only and the grid follows from shapes: one CUDA graph serves every length
    torch    on a CPU, SDPA's kernel on the stacked rows, over exactly the keys that are there;
             elsewhere masked matrix products over the whole cache, which read no length either

Inference only: no gradient passes.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from kernels.backend import Backend, choose

Cache = tuple[Tensor, Tensor, Tensor]  # k, v [N, G, S, D], lengths int32 [N]
Part = tuple[Tensor, Tensor]  # results [..., D] and their natural LSE [...], fp32

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 128  # head dimension that the kernel is compiled for


def decode_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend row by row in float64, each row's keys cut out and set together; the oracle.

    Shapes as in `shared_prefix_attention`, or as in `decode_attention` without a prefix. Returns
    float64 [R, H, D].
    """
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for r in range(len(q)):
        keys, values = (x[r, :, : int(lengths[r])].double() for x in (k, v))
        if prefix_k is not None and prefix_v is not None and prefix_lengths is not None:
            b = r // (len(q) // len(prefix_k))
            stretch = slice(int(prefix_lengths[b]))
            keys = torch.cat([prefix_k[b, :, stretch].double(), keys], 1)
            values = torch.cat([prefix_v[b, :, stretch].double(), values], 1)
        if keys.shape[1]:
            keys, values = (
                x.repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (keys, values)
            )
            scores = (keys @ q[r].double()[:, :, None])[..., 0]
            scores *= q.shape[2] ** -0.5 if scale is None else scale
            out[r] = (scores.softmax(1)[:, None] @ values)[:, 0]
    return out


def stack_rows(q: Tensor, caches: int, groups: int) -> Tensor:
    """Return [N, G, C·H/G, D] of q [N·C, H, D]: the rows that read the same keys."""
    rows, heads, width = q.shape
    stack = q.reshape(caches, rows // caches, groups, heads // groups, width)
    return stack.transpose(1, 2).flatten(2, 3)


def unstack_rows(x: Tensor, q: Tensor) -> Tensor:
    """Undo `stack_rows` on x [N, G, C·H/G, ...]: return [R, H, ...] as q's rows and heads are."""
    (n, groups, _, *rest), (rows, heads, _) = x.shape, q.shape
    stack = x.reshape(n, groups, rows // n, heads // groups, *rest)
    return stack.transpose(1, 2).reshape(rows, heads, *rest)


def attend_filled(rows: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Part:
    """Attend from rows [N, G, M, D] to the filled places of k, v [N, G, S, D], on a CPU.

    Lengths lie in the CPU's memory, so caches are cut where they end: nothing past the end is read
    or masked. Neighbours of equal length, as candidates are, go together.
    """
    out, lse, start = [], [], 0
    for length, run in groupby(lengths.tolist()):
        part = slice(start, start := start + len(list(run)))
        end = min(max(0, length), k.shape[2])
        if end == 0:
            out.append(torch.zeros_like(rows[part]))
            lse.append(torch.full_like(rows[part, ..., 0], -torch.inf, dtype=torch.float32))
            continue
        # What F.scaled_dot_product_attention calls on a CPU, which returns no LSE: scores in fp32
        # a block at a time, where a matrix product would round those of bf16 and write them out.
        result, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
            rows[part], k[part, :, :end], v[part, :, :end], scale=scale
        )
        out.append(result)
        lse.append(sums)
    return (out[0], lse[0]) if len(out) == 1 else (torch.cat(out), torch.cat(lse))


def attend_masked(rows: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Part:
    """The same on any device by masked matrix products in fp32; no length is waited for.

    Values past the end are set to zero, in a copy: their weight is zero, but 0·NaN is not.
    """
    filled = torch.arange(k.shape[2], device=k.device) < lengths[:, None]
    scores = (rows.float() * scale) @ k.float().mT
    scores.masked_fill_(~filled[:, None, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None]).exp_()
    return weights @ v.float().masked_fill(~filled[:, None, :, None], 0.0), lse


def merge(first: Part, second: Part) -> Tensor:
    """Return fp32 [..., D] over the keys of both parts; zeros where neither has any.

    The weight of one of two is the sigmoid of the difference of their LSE.
    """
    (out, lse), (other, other_lse) = first, second
    weight = torch.sigmoid(other_lse - lse).masked_fill_(other_lse == -torch.inf, 0.0)
    return torch.lerp(out.float(), other.float(), weight[..., None])


def attend_torch(q: Tensor, caches: Sequence[Cache], scale: float, *, masked: bool) -> Tensor:
    """Attend from q [R, H, D] to every one of `caches`; row r reads entry r // (R/N) of each."""
    attend_cache = attend_masked if masked else attend_filled
    q = q if q.stride(2) == 1 else q.contiguous()
    parts: list[Part] = []
    for k, v, lengths in caches:
        n, groups, places = k.shape[:3]
        if n and places:
            stack = stack_rows(q, n, groups)
            out, lse = attend_cache(stack, k, v, lengths, scale)
            parts.append((unstack_rows(out, q), unstack_rows(lse, q)))
    if not parts:
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    return (merge(*parts) if len(parts) > 1 else parts[0][0]).to(q.dtype).contiguous()


def attend(
    q: Tensor,
    k: list[Tensor],
    v: list[Tensor],
    lengths: list[Tensor],
    scale: float,
    backend: str,
) -> Tensor:
    """Run a backend on the caches k[i], v[i], lengths[i]."""
    caches = list(zip(k, v, lengths, strict=True))
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        if backend == "torch":
            return attend_torch(q, caches, scale, masked=q.device.type != "cpu")
        from kernels import decode_triton  # needs triton, which only some machines have

        return decode_triton.attend(q, caches, scale)


# Opaque to torch.compile, which would break the graph where a CPU reads lengths.
decode_op = torch.library.custom_op("kernels::decode_attention", attend, mutates_args=())


@decode_op.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def check(q: Tensor, caches: Sequence[Cache]) -> None:
    """Refuse what the kernels would read wrongly, naming what was seen and wanted.

    The first cache has one entry a row; the others one for every so many.
    """
    if q.ndim != 3 or q.dtype not in DTYPES:
        raise ValueError(
            f"decode of queries {tuple(q.shape)} {q.dtype}: wanted [R, H, D] in one of {DTYPES}"
        )
    rows, heads, width = q.shape
    for i, (k, v, lengths) in enumerate(caches):
        n, wanted = len(k), ""
        if k.ndim != 4 or k.shape != v.shape or k.shape[3] != width:
            wanted = f"keys and values [N, G, S, {width}]"
        elif k.shape[1] != caches[0][0].shape[1] or heads % max(1, k.shape[1]) or not k.shape[1]:
            wanted = f"one G for all caches that divides H = {heads}"
        elif n != rows and (i == 0 or n == 0 or rows % n):
            wanted = f"N {'that divides' if i else 'of'} R = {rows}"
        elif not k.dtype == v.dtype == q.dtype:
            wanted = "the dtype of the queries"
        elif k.stride(3) != 1 or v.stride(3) != 1:
            wanted = "stride 1 for the last dimension"
        elif lengths.shape != k.shape[:1] or lengths.dtype != torch.int32:
            wanted = f"lengths int32 [{n}]"
        elif not q.device == k.device == v.device == lengths.device:
            wanted = f"all on {q.device}"
        if wanted:
            raise ValueError(
                f"decode of {tuple(q.shape)} {q.dtype} with {'prefix' if i else 'cache'} "
                f"{tuple(k.shape)} {k.dtype}, {tuple(v.shape)} {v.dtype}, strides {k.stride()}, "
                f"{v.stride()}, lengths {tuple(lengths.shape)} {lengths.dtype} on "
                f"{lengths.device}: wanted {wanted}"
            )
    tensors = [q, *(x for cache in caches for x in cache)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise RuntimeError("decode attention has no backward: call it under torch.no_grad()")


def dispatch(q: Tensor, caches: Sequence[Cache], scale: float | None, backend: Backend) -> Tensor:
    """Check the arguments and run the operator, or what it runs."""
    check(q, caches)
    chosen = choose(backend, q.device, what="decode")
    if chosen == "triton" and q.shape[2] > WIDEST:
        raise ValueError(
            f"decode of head dimension {q.shape[2]} by triton: wanted at most {WIDEST}; "
            "backend='torch' takes any"
        )
    keys, values, lengths = (list(x) for x in zip(*caches, strict=True))
    scale = q.shape[2] ** -0.5 if scale is None else scale
    # Called directly plain torch saves 25 us, a tenth of a call for a small model on a CPU. Tensors
    # without data, of FakeTensorMode, are of a class of their own.
    direct = chosen == "torch" and type(q) is Tensor and not torch.compiler.is_compiling()
    return (attend if direct else decode_op)(q, keys, values, lengths, scale, chosen)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attend from q [R, H, D] to each row's own cache k, v [R, G, S, D]; returns [R, H, D].

    Row r reads places 0 to lengths[r] - 1 (int32 [R], on the device; outside 0 to S is clamped);
    length 0 gives zeros. What lies past a length may be anything, NaN too. Query head h reads key
    head h // (H/G). Strides are free but the last. fp32 (IEEE products), fp16 and bf16 (fp32 sums).
    `scale` defaults to 1/sqrt(D). Moves 2·R·G·length·D elements.

    `auto` is triton on CUDA, where it imports, and torch elsewhere. Neither reads `lengths` on the
    host, but on a CPU: a CUDA graph captured once is right whatever is written there later. Raises
    ValueError for shapes, types, strides or devices other than these, and RuntimeError where a
    gradient would be wanted. The torch backend on CUDA uses TF32 if
    `torch.set_float32_matmul_precision` allows it; the kernel never does.
    """
    return dispatch(q, [(k, v, lengths)], scale, backend)


def shared_prefix_attention(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_lengths: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attend from q [R, H, D] to a prompt's cache and to each row's own; returns [R, H, D].

    prefix_k, prefix_v [B, G, P, D] with prefix_lengths int32 [B]: row r is one of the C = R/B
    candidates of prompt r // C. k, v [R, G, S, D] with lengths int32 [R]: what each candidate has
    drawn since. The result is that of `decode_attention` with both set together, and all else is
    as there. Moves 2·B·G·prefix·D + 2·R·G·suffix·D elements: a prompt is read once, not C times.
    """
    return dispatch(q, [(k, v, lengths), (prefix_k, prefix_v, prefix_lengths)], scale, backend)
