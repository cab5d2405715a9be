"""The Triton kernels of `attention`; kernels/attention_triton.py launches them.

B rows, H query heads, G key/value heads, T queries, S keys, D channels (BD: next power of two). A
program of the forward and of the dQ kernel holds BM queries of one head and walks over blocks of BN
keys; one of the dK/dV kernel holds BN keys of one key head and walks over blocks of BM queries of
all heads that share it. What is walked over is known before the walk (kernels.mask):

    visited   |- masked -|------ whole ------|- masked -|      whole blocks evaluate no mask; the
              start   whole start      whole stop    stop      two masked parts are one loop

Three kinds of mask, each a compilation of its own:

    STATIC  query i reads k < max(i + 1, prefix), prefix a number of the launch: causal 0, full S
    EXACT   the same with lo and prefix of each 128 queries: two scalars a block
    ROWS    lo and hi of every query

Softmax in base 2: p = 2^(c·s - m) with c = scale·log2(e), one multiply-add and one exp2 a pair. The
stored logarithm is log2 of the row's sum, +inf for a row that reads nothing, so that its
probabilities and with them all of its gradients are 0 in the backward pass.

Backward is two kernels without atomics: dQ = scale·dS·K by queries, dK = scale·dSᵀ·Q and dV = Pᵀ·dO
by keys, with dS = P∘(dO·Vᵀ - delta) and delta = rowsum(O∘dO) (Dao 2023, "FlashAttention-2"). They
compute S and dO·Vᵀ twice, 7 products in place of 5; in return each sum has one order: the same
input gives the same bits.
"""

import triton
import triton.language as tl

from kernels.mask import STRETCH

# Arguments that change from batch to batch, and would be compiled for again as 1 and as 16·n.
SIZES = ["queries", "keys", "stretches", "prefix"]

# Names that a kernel reads must be constants of triton.
STATIC: tl.constexpr = tl.constexpr(0)
EXACT: tl.constexpr = tl.constexpr(1)
ROWS: tl.constexpr = tl.constexpr(2)
GRAIN: tl.constexpr = tl.constexpr(STRETCH)
FAR: tl.constexpr = tl.constexpr(1 << 30)
# fp32 inputs as three products of TF32 each, on tensor cores: errors of a few 2^-22. IEEE products
# keep both operands in registers, and no tile was found that does not spill at 128 channels.
FP32: tl.constexpr = tl.constexpr("tf32x3")


@triton.jit
def load_tile(
    source, b, h, row, count, stride_b, stride_h, stride_t,
    N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Return [N, BD] from `row` on of one head, zeros past D and, where CHECK, past `count`."""
    if TMA:  # zeros past every end, CHECK or not
        tile = source.load([b, h, row, 0]).reshape(N, BD)
    else:
        rows = row + tl.arange(0, N)
        dims = tl.arange(0, BD)
        head = source + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
        at = head + rows.to(tl.int64)[:, None] * stride_t + dims[None, :]
        if CHECK and BD != D:
            tile = tl.load(at, mask=(rows < count)[:, None] & (dims < D)[None, :], other=0.0)
        elif CHECK:
            tile = tl.load(at, mask=(rows < count)[:, None], other=0.0)
        elif BD != D:
            tile = tl.load(at, mask=(dims < D)[None, :], other=0.0)
        else:
            tile = tl.load(at)
    return tile


@triton.jit
def store_tile(
    target, value, b, h, row, count, stride_b, stride_h, stride_t,
    N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write [N, BD] to the rows below `count` and the channels below D of one head."""
    rows = row + tl.arange(0, N)
    dims = tl.arange(0, BD)
    head = target + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
    at = head + rows.to(tl.int64)[:, None] * stride_t + dims[None, :]
    inside = (rows < count)[:, None]
    if BD != D:
        inside = inside & (dims < D)[None, :]
    tl.store(at, value.to(target.dtype.element_ty), mask=inside)


@triton.jit
def load_bounds(table, b, n, first, SPAN: tl.constexpr):
    """Join the entries of a table of `n` stretches for the block of SPAN positions at `first`."""
    at = first // GRAIN + tl.arange(0, SPAN // GRAIN)
    here = table + b * 4 * n + at
    inside = at < n
    start = tl.min(tl.load(here, mask=inside, other=FAR), 0)
    whole = tl.max(tl.load(here + n, mask=inside, other=0), 0)
    stop_whole = tl.min(tl.load(here + 2 * n, mask=inside, other=FAR), 0)
    stop = tl.max(tl.load(here + 3 * n, mask=inside, other=0), 0)
    return start, whole, stop_whole, stop


@triton.jit
def in_blocks(start, whole, stop_whole, stop, BLOCK: tl.constexpr):
    """Round a visited and an unmasked range to whole blocks; return also the masked blocks' count.

    The unmasked range shrinks, the visited one grows. Masked block j starts at start + j·BLOCK, and
    `stop_whole - whole` further on from `whole` on.
    """
    start = start // BLOCK * BLOCK
    stop = tl.maximum((stop + BLOCK - 1) // BLOCK * BLOCK, start)
    whole = tl.minimum((whole + BLOCK - 1) // BLOCK * BLOCK, stop)
    whole = tl.maximum(whole, start)
    stop_whole = tl.maximum(stop_whole // BLOCK * BLOCK, whole)
    stop_whole = tl.minimum(stop_whole, stop)
    masked = (stop - start - (stop_whole - whole)) // BLOCK
    return start, whole, stop_whole, masked


@triton.jit
def key_range(
    by_query, b, stretches, row, prefix, queries, keys,
    KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Return what `in_blocks` does of the keys that BM queries at `row` read, and their prefix."""
    if KIND == STATIC:
        start = 0
        whole = 0
        stop_whole = tl.minimum(tl.maximum(row + 1, prefix), keys)
        stop = tl.minimum(tl.maximum(tl.minimum(row + BM, queries), prefix), keys)
    else:
        start, whole, stop_whole, stop = load_bounds(by_query, b, stretches, row, BM)
        prefix = stop_whole
    start, whole, stop_whole, masked = in_blocks(start, whole, stop_whole, stop, BN)
    return start, whole, stop_whole, masked, prefix


@triton.jit
def query_range(
    by_key, b, stretches, key, prefix, queries, keys,
    KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Return what `in_blocks` does of the queries that read BN keys from `key` on."""
    if KIND == STATIC:
        last = tl.minimum(key + BN, keys) - 1
        start = tl.where(key < prefix, 0, key)
        whole = tl.where(last < prefix, 0, last)
        stop_whole = queries
        stop = queries
    else:
        start, whole, stop_whole, stop = load_bounds(by_key, b, stretches, key, BN)
    return in_blocks(start, whole, stop_whole, stop, BM)


@triton.jit
def masked_block(j, start, whole, stop_whole, BLOCK: tl.constexpr):
    """Return where the j-th masked block starts."""
    at = start + j * BLOCK
    return tl.where(at < whole, at, at + (stop_whole - whole))


@triton.jit
def row_ends(lo_ptr, hi_ptr, b, rows, queries, keys, prefix, KIND: tl.constexpr):
    """Return lo and hi of each of `rows`; of kinds with one lo a block, 0: it is a block's edge."""
    if KIND == ROWS:
        at = b.to(tl.int64) * queries + rows
        lo = tl.load(lo_ptr + at, mask=rows < queries, other=0)
        hi = tl.load(hi_ptr + at, mask=rows < queries, other=0)
    else:
        lo = tl.zeros_like(rows)
        hi = tl.minimum(tl.maximum(rows + 1, prefix), keys)
    return lo, hi


@triton.jit
def softmax_step(acc, total, top, scores, v, c, MASKED: tl.constexpr):
    """Add a block of scores [BM, BN] and values [BN, BD] to a running softmax in base 2."""
    higher = tl.maximum(top, tl.max(scores, 1) * c)
    # A row that has met no key yet would subtract infinity from infinity.
    base = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
    p = tl.math.exp2(scores * c - base[:, None])
    fade = tl.math.exp2(top - base)
    total = total * fade + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=FP32)
    return acc, total, higher


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q_src, k_src, v_src, o_ptr, log_ptr, lo_ptr, hi_ptr, by_query,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    queries, padded, keys, stretches, prefix, c, heads,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    KIND: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """O = softmax(scale·Q·Kᵀ)·V and the base-2 logarithm of each row's sum."""
    # The last queries of a causal row read most: they start first.
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    b = tl.program_id(1) // heads
    h = tl.program_id(1) % heads
    g = h // GROUP
    rows = row + tl.arange(0, BM)
    start, whole, stop_whole, masked, prefix = key_range(
        by_query, b, stretches, row, prefix, queries, keys, KIND, BM, BN
    )
    q = load_tile(q_src, b, h, row, queries, q_b, q_h, q_t, BM, D, BD, TMA, True)
    acc = tl.zeros((BM, BD), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    for key in tl.range(whole, stop_whole, BN):
        k = load_tile(k_src, b, g, key, keys, k_b, k_h, k_t, BN, D, BD, TMA, False)
        scores = tl.dot(q, k.T, input_precision=FP32)
        v = load_tile(v_src, b, g, key, keys, v_b, v_h, v_t, BN, D, BD, TMA, False)
        acc, total, top = softmax_step(acc, total, top, scores, v, c, False)
    lo, hi = row_ends(lo_ptr, hi_ptr, b, rows, queries, keys, prefix, KIND)
    for j in tl.range(masked):
        key = masked_block(j, start, whole, stop_whole, BN)
        k = load_tile(k_src, b, g, key, keys, k_b, k_h, k_t, BN, D, BD, TMA, True)
        scores = tl.dot(q, k.T, input_precision=FP32)
        at = key + tl.arange(0, BN)
        reads = at[None, :] < hi[:, None]
        if KIND == ROWS:
            reads = reads & (at[None, :] >= lo[:, None])
        scores = tl.where(reads, scores, float("-inf"))
        v = load_tile(v_src, b, g, key, keys, v_b, v_h, v_t, BN, D, BD, TMA, True)
        acc, total, top = softmax_step(acc, total, top, scores, v, c, True)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    log = tl.where(empty, float("inf"), top + tl.math.log2(total))
    tl.store(log_ptr + (b * heads + h).to(tl.int64) * padded + rows, log)
    store_tile(o_ptr, acc / total[:, None], b, h, row, queries, o_b, o_h, o_t, BM, D, BD)


@triton.jit(do_not_specialize=SIZES)
def query_gradient_kernel(
    q_src, k_src, v_src, do_src, o_ptr, log_ptr, delta_ptr, dq_ptr, lo_ptr, hi_ptr, by_query,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t, o_b, o_h, o_t, dq_b, dq_h, dq_t,
    queries, padded, keys, stretches, prefix, c, scale, heads,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    KIND: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dQ = scale·dS·K, and delta, which the other kernel reads: this one has O and dO in hand."""
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    b = tl.program_id(1) // heads
    h = tl.program_id(1) % heads
    g = h // GROUP
    rows = row + tl.arange(0, BM)
    start, whole, stop_whole, masked, prefix = key_range(
        by_query, b, stretches, row, prefix, queries, keys, KIND, BM, BN
    )
    at = (b * heads + h).to(tl.int64) * padded + rows
    log = tl.load(log_ptr + at)
    do = load_tile(do_src, b, h, row, queries, do_b, do_h, do_t, BM, D, BD, TMA, True)
    o = load_tile(o_ptr, b, h, row, queries, o_b, o_h, o_t, BM, D, BD, False, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + at, delta)
    q = load_tile(q_src, b, h, row, queries, q_b, q_h, q_t, BM, D, BD, TMA, True)
    dq = tl.zeros((BM, BD), tl.float32)
    for key in tl.range(whole, stop_whole, BN):
        k = load_tile(k_src, b, g, key, keys, k_b, k_h, k_t, BN, D, BD, TMA, False)
        v = load_tile(v_src, b, g, key, keys, v_b, v_h, v_t, BN, D, BD, TMA, False)
        p = tl.math.exp2(tl.dot(q, k.T, input_precision=FP32) * c - log[:, None])
        ds = p * (tl.dot(do, v.T, input_precision=FP32) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=FP32)
    lo, hi = row_ends(lo_ptr, hi_ptr, b, rows, queries, keys, prefix, KIND)
    for j in tl.range(masked):
        key = masked_block(j, start, whole, stop_whole, BN)
        k = load_tile(k_src, b, g, key, keys, k_b, k_h, k_t, BN, D, BD, TMA, True)
        v = load_tile(v_src, b, g, key, keys, v_b, v_h, v_t, BN, D, BD, TMA, True)
        keys_at = key + tl.arange(0, BN)
        reads = keys_at[None, :] < hi[:, None]
        if KIND == ROWS:
            reads = reads & (keys_at[None, :] >= lo[:, None])
        p = tl.math.exp2(tl.dot(q, k.T, input_precision=FP32) * c - log[:, None])
        p = tl.where(reads, p, 0.0)
        ds = p * (tl.dot(do, v.T, input_precision=FP32) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=FP32)
    store_tile(dq_ptr, dq * scale, b, h, row, queries, dq_b, dq_h, dq_t, BM, D, BD)


@triton.jit
def key_gradient_step(
    dk, dv, k, v, q, do, log, delta, reads, c, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what BM queries [BM, BD] give to dK and dV [BN, BD]; scores stand as [BN, BM]."""
    p = tl.math.exp2(tl.dot(k, q.T, input_precision=FP32) * c - log[None, :])
    if MASKED:
        p = tl.where(reads, p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=FP32)
    ds = p * (tl.dot(v, do.T, input_precision=FP32) - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=FP32)
    return dk, dv


@triton.jit
def head_and_block(i, g, count, GROUP: tl.constexpr):
    """Return the query head and the block of the i-th of GROUP·count steps: head after head."""
    if GROUP == 1:
        h = g
        j = i
    else:
        h = g * GROUP + i // count
        j = i % count
    return h, j


@triton.jit(do_not_specialize=SIZES)
def key_gradient_kernel(
    q_src, k_src, v_src, do_src, log_ptr, delta_ptr, dk_ptr, dv_ptr, lo_ptr, hi_ptr,
    by_query, by_key,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t,
    dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    queries, padded, keys, stretches, key_stretches, prefix, c, scale, groups,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    KIND: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dK = scale·dSᵀ·Q and dV = Pᵀ·dO of one key head, over all query heads that share it."""
    key = tl.program_id(0) * BN  # the first keys of a causal row are read most: they start first
    b = tl.program_id(1) // groups
    g = tl.program_id(1) % groups
    keys_at = key + tl.arange(0, BN)
    start, whole, stop_whole, masked = query_range(
        by_key, b, key_stretches, key, prefix, queries, keys, KIND, BM, BN
    )
    k = load_tile(k_src, b, g, key, keys, k_b, k_h, k_t, BN, D, BD, TMA, True)
    v = load_tile(v_src, b, g, key, keys, v_b, v_h, v_t, BN, D, BD, TMA, True)
    dk = tl.zeros((BN, BD), tl.float32)
    dv = tl.zeros((BN, BD), tl.float32)
    # Two loops in all, over blocks and heads at once: an outer loop over heads would spill.
    for i in tl.range(GROUP * masked, num_stages=1):
        h, j = head_and_block(i, g, masked, GROUP)
        row = masked_block(j, start, whole, stop_whole, BM)
        rows = row + tl.arange(0, BM)
        q = load_tile(q_src, b, h, row, queries, q_b, q_h, q_t, BM, D, BD, TMA, True)
        do = load_tile(do_src, b, h, row, queries, do_b, do_h, do_t, BM, D, BD, TMA, True)
        if KIND == EXACT:
            # The lowest hi of a stretch is all that its rows' prefix can still add.
            prefix = tl.load(by_query + (b * 4 + 2) * stretches + row // GRAIN)
        lo, hi = row_ends(lo_ptr, hi_ptr, b, rows, queries, keys, prefix, KIND)
        reads = keys_at[:, None] < hi[None, :]
        if KIND == ROWS:
            reads = reads & (keys_at[:, None] >= lo[None, :])
        at = (b * groups * GROUP + h).to(tl.int64) * padded + rows
        log = tl.load(log_ptr + at)
        delta = tl.load(delta_ptr + at)
        dk, dv = key_gradient_step(dk, dv, k, v, q, do, log, delta, reads, c, True)
    blocks = (stop_whole - whole) // BM
    for i in tl.range(GROUP * blocks):
        h, j = head_and_block(i, g, blocks, GROUP)
        row = whole + j * BM
        rows = row + tl.arange(0, BM)
        q = load_tile(q_src, b, h, row, queries, q_b, q_h, q_t, BM, D, BD, TMA, False)
        do = load_tile(do_src, b, h, row, queries, do_b, do_h, do_t, BM, D, BD, TMA, False)
        at = (b * groups * GROUP + h).to(tl.int64) * padded + rows
        log = tl.load(log_ptr + at)
        delta = tl.load(delta_ptr + at)
        dk, dv = key_gradient_step(dk, dv, k, v, q, do, log, delta, 0, c, False)
    store_tile(dk_ptr, dk * scale, b, g, key, keys, dk_b, dk_h, dk_t, BN, D, BD)
    store_tile(dv_ptr, dv, b, g, key, keys, dv_b, dv_h, dv_t, BN, D, BD)
