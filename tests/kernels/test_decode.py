"""Decode attention: both functions on every backend against float64, and what may not change them.

Interpreted kernels run in a process of their own: see interpreter.py.
"""

from unittest.mock import patch

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import decode
from kernels.decode import (
    attend_torch,
    decode_attention,
    decode_op,
    decode_reference,
    shared_prefix_attention,
)

# Norm of the difference over the norm of the reference, in float64 from the same rounded inputs.
# fp32: a few hundred products, rounded at 6e-8 each. 16 bits: the result is rounded, and the
# weights before their product with the values: 5e-4 each in fp16, 4e-3 in bf16.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
NAN = float("nan")


def close(got, want, dtype=torch.float32):
    assert got.dtype == dtype and got.shape == want.shape
    error = (got.double() - want).norm() / want.norm().clamp(min=1e-30)
    assert float(error) <= TOLERANCE[dtype], float(error)


def cache(caches, groups, places, width, lengths, rng, dtype=torch.float32, device="cpu"):
    """k, v and lengths; what lies past a length is NaN."""
    k, v = (torch.randn(caches, groups, places, width, generator=rng) for _ in range(2))
    lengths = torch.tensor(lengths, dtype=torch.int32)
    past = torch.arange(places) >= lengths[:, None]
    k, v = (x.masked_fill(past[:, None, :, None], NAN).to(device, dtype) for x in (k, v))
    return k, v, lengths.to(device)


def queries(rows, heads, width, rng, dtype=torch.float32, device="cpu"):
    return torch.randn(rows, heads, width, generator=rng).to(device, dtype)


def check_lengths(backend, rng, device="cpu"):
    """Nothing, one key, about a tile's edge, about a split's, all, and lengths outside a cache."""
    lengths = [0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 199, 200]
    for dtype in TOLERANCE:
        q = queries(13, 2, 32, rng, dtype, device)
        k, v, n = cache(13, 2, 200, 32, lengths, rng, dtype, device)
        got = decode_attention(q, k, v, n, backend=backend)
        close(got, decode_reference(q, k, v, n), dtype)
        assert not got[0].any()
    outside = n.clone()
    outside[0], outside[12] = -5, 1000
    assert torch.equal(decode_attention(q, k, v, outside, backend=backend), got)
    assert not decode_attention(q, k, v, n * 0, backend=backend).any()


def check_groups_and_widths(backend, rng, device="cpu"):
    """Heads a group from one to all, also beyond one tile; widths that are padded; given scales."""
    for dtype, heads, groups, width, scale in [
        (torch.float32, 4, 4, 16, None), (torch.float32, 4, 2, 32, 0.3),
        (torch.bfloat16, 8, 2, 64, None),
        (torch.float16, 5, 1, 80, 0.05), (torch.bfloat16, 2, 1, 96, None),
        (torch.float32, 3, 1, 100, None), (torch.bfloat16, 1, 1, 100, None),
        (torch.float16, 2, 2, 128, 1.0), (torch.float32, 40, 1, 20, None),
    ]:  # fmt: skip
        q = queries(3, heads, width, rng, dtype, device)
        own = cache(3, groups, 70, width, [70, 13, 37], rng, dtype, device)
        prefix = cache(1, groups, 40, width, [35], rng, dtype, device)
        got = decode_attention(q, *own, scale=scale, backend=backend)
        close(got, decode_reference(q, *own, scale=scale), dtype)
        got = shared_prefix_attention(q, *prefix, *own, scale=scale, backend=backend)
        close(got, decode_reference(q, *own, *prefix, scale=scale), dtype)


def check_candidates(backend, rng, device="cpu"):
    """Candidates of one and two prompts of unequal lengths, one tile of rows and several."""
    for dtype, prompts, candidates, heads, groups, ends in [
        (torch.float32, 1, 1, 2, 2, [65]), (torch.float32, 2, 3, 4, 2, [0, 130]),
        (torch.bfloat16, 2, 16, 2, 2, [129, 33]), (torch.float32, 2, 70, 1, 1, [64, 1]),
        (torch.bfloat16, 1, 70, 4, 2, [100]), (torch.float16, 2, 3, 2, 1, [0, 0]),
    ]:  # fmt: skip
        rows = prompts * candidates
        q = queries(rows, heads, 32, rng, dtype, device)
        prefix = cache(prompts, groups, 130, 32, ends, rng, dtype, device)
        for suffix in ([(5 * r) % 34 for r in range(rows)], [7] * rows)[: 1 if rows > 9 else 2]:
            own = cache(rows, groups, 33, 32, suffix, rng, dtype, device)
            got = shared_prefix_attention(q, *prefix, *own, backend=backend)
            close(got, decode_reference(q, *own, *prefix), dtype)


def check_shared_is_own(backend, rng, device="cpu"):
    """A prefix read once is a prefix copied before each candidate's own places."""
    q = queries(6, 4, 32, rng, device=device)
    pk, pv, pn = cache(2, 2, 90, 32, [90, 41], rng, device=device)
    k, v, n = cache(6, 2, 20, 32, [0, 1, 20, 7, 19, 0], rng, device=device)
    whole_k, whole_v = (torch.full((6, 2, 110, 32), NAN, device=device) for _ in range(2))
    for r in range(6):
        p, s = int(pn[r // 3]), int(n[r])
        for whole, prefix, own in ((whole_k, pk, k), (whole_v, pv, v)):
            whole[r, :, : p + s] = torch.cat([prefix[r // 3, :, :p], own[r, :, :s]], 1)
    together = pn.repeat_interleave(3) + n
    shared = shared_prefix_attention(q, pk, pv, pn, k, v, n, backend=backend)
    close(decode_attention(q, whole_k, whole_v, together, backend=backend), shared.double())


def check_equal_candidates(backend, rng, device="cpu"):
    """Equal queries and equal own keys give equal results, and a second call equal bits.

    Equal bits in all rows on a GPU; a CPU's matrix products round rows at the edge differently.
    """
    q = queries(1, 4, 32, rng, device=device).expand(20, -1, -1)
    prefix = cache(1, 2, 100, 32, [77], rng, device=device)
    k, v, n = cache(1, 2, 40, 32, [33], rng, device=device)
    own = k.expand(20, -1, -1, -1), v.expand(20, -1, -1, -1), n.expand(20)
    got = shared_prefix_attention(q, *prefix, *own, backend=backend)
    assert float((got - got[:1]).abs().max()) <= (0.0 if device == "cuda" else 1e-6)
    again = shared_prefix_attention(q, *prefix, *own, backend=backend)
    assert torch.equal(again, got)


def check_strides(backend, rng, device="cpu"):
    """Slices of one storage of all layers, places before groups, a wider pitch; k unlike v."""
    q = queries(3, 4, 20, rng, device=device)
    layers = [cache(3, 2, 50, 20, [50, 9, 0], rng, device=device) for _ in range(2)]
    orders = ((0, 1, 2, 3, 4), (0, 1, 3, 2, 4), (3, 0, 2, 1, 4))  # of layers, R, G, S, D
    for k_order, v_order in zip(orders, orders[1:] + orders[:1], strict=True):
        stored = []
        for order in (k_order, v_order):
            whole = torch.full((2, 3, 2, 50, 32), NAN, device=device).permute(order).contiguous()
            stored.append(whole.permute([order.index(i) for i in range(5)])[..., :20])
        for i, (k, v, lengths) in enumerate(layers):
            own = stored[0][i].copy_(k), stored[1][i].copy_(v), lengths
            for x in (q, torch.stack([q, q], -1)[..., 0]):
                got = decode_attention(x, *own, backend=backend)
                close(got, decode_reference(q, k, v, lengths))


def check_written_in_place(backend, rng, device="cpu"):
    """The same tensors with other lengths and other keys in them: nothing is remembered."""
    q = queries(4, 2, 32, rng, device=device)
    prefix = cache(2, 2, 70, 32, [70, 70], rng, device=device)
    own = cache(4, 2, 70, 32, [70] * 4, rng, device=device)
    compiled = torch.compile(
        lambda *x: shared_prefix_attention(*x, backend=backend) + 0,
        fullgraph=True,
        backend="aot_eager",
    )
    for step in range(4):
        prefix[2].copy_(torch.tensor([step, 70 - step]))
        own[2].copy_(torch.tensor([0, 1, 31, 64]) + step)
        want = decode_reference(q, *own, *prefix)
        close(shared_prefix_attention(q, *prefix, *own, backend=backend), want)
        close(compiled(q, *prefix, *own), want)
        own[0].mul_(-1)


def check_empty(backend, rng, device="cpu"):
    """No rows, no places for a prefix, none at all."""
    q = queries(2, 2, 16, rng, device=device)
    own = cache(2, 2, 9, 16, [9, 4], rng, device=device)
    nothing = cache(1, 2, 0, 16, [0], rng, device=device)
    want = decode_reference(q, *own)
    close(shared_prefix_attention(q, *nothing, *own, backend=backend), want)
    none = cache(2, 2, 0, 16, [0, 0], rng, device=device)
    got = shared_prefix_attention(q, *nothing, *none, backend=backend)
    assert got.shape == q.shape and not got.any()
    no_rows = (x[:0] for x in own)
    assert decode_attention(q[:0], *no_rows, backend=backend).shape == (0, 2, 16)


def check_operator(backend, rng, device="cpu"):
    """Schema, shapes without data, compilation in one graph, autocast; a gradient is refused."""
    q = queries(4, 4, 32, rng, device=device)
    prefix = cache(2, 2, 20, 32, [20, 3], rng, device=device)
    own = cache(4, 2, 10, 32, [10, 3, 0, 5], rng, device=device)
    caches = [list(x) for x in zip(own, prefix, strict=True)]
    torch.library.opcheck(decode_op, (q, *caches, 0.2, backend))
    torch.library.opcheck(
        decode_op, (q.mT.contiguous().mT, *([x[0]] for x in caches), 0.2, backend)
    )
    compiled = torch.compile(
        lambda x, *c: decode_attention(x * 2, *c, backend=backend) + 1,
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    close(compiled(q, *own), decode_reference(q * 2, *own) + 1)
    close(
        compiled(q[:3], *(x[:3] for x in own)),
        decode_reference(q[:3] * 2, *(x[:3] for x in own)) + 1,
    )
    with torch.autocast(device, torch.bfloat16):
        close(decode_attention(q, *own, backend=backend), decode_reference(q, *own))
    for i in range(3):
        args = [x.clone().requires_grad_(j == i) for j, x in enumerate((q, *own[:2]))]
        with pytest.raises(RuntimeError, match="no backward"):
            decode_attention(*args, own[2], backend=backend)
        with torch.no_grad():
            assert not decode_attention(*args, own[2], backend=backend).requires_grad


class NoReads(TorchDispatchMode):
    """Fails where Python asks for the value of a tensor, which a CUDA graph would freeze."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value is read"
        return func(*args, **(kwargs or {}))


def check_splits(backend, rng, device="cpu"):
    """Any number of stretches of a cache gives the same but for rounding; one has no merge."""
    from kernels import decode_triton

    q = queries(3, 2, 32, rng, torch.bfloat16, device)
    prefix = cache(1, 1, 200, 32, [161], rng, torch.bfloat16, device)
    own = cache(3, 1, 300, 32, [300, 65, 0], rng, torch.bfloat16, device)
    want, alone = decode_reference(q, *own, *prefix), decode_reference(q, *own)
    for programs, span in ((0, 128), (4, 512), (4, 64), (100, 1)):
        with patch.multiple(decode_triton, PROGRAMS=programs, SPAN=span):
            close(shared_prefix_attention(q, *prefix, *own, backend=backend), want, q.dtype)
            close(decode_attention(q, *own, backend=backend), alone, q.dtype)


def check_nothing_is_read(backend, rng, device="cpu"):
    """The launch depends on shapes: no value of a tensor reaches Python."""
    from kernels import decode_triton

    q = queries(4, 2, 32, rng, device=device)
    own = cache(4, 2, 70, 32, [70, 0, 1, 33], rng, device=device)
    prefix = cache(2, 2, 140, 32, [140, 65], rng, device=device)
    want = decode_reference(q, *own, *prefix)
    seen = Recorder(decode_triton.partial_kernel)
    with patch.object(decode_triton, "partial_kernel", seen), NoReads():
        got = decode_triton.attend(q, [own, prefix], 32**-0.5)
        own[2].zero_()
        decode_triton.attend(q, [own, prefix], 32**-0.5)
    close(got, want)
    assert seen.launches[:2] == seen.launches[2:]


class Recorder:
    """Stands before a kernel and keeps the grid and the numbers of every launch."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        def start(*args, **constants):
            numbers = [x for x in args if not isinstance(x, torch.Tensor)]
            self.launches.append((grid, numbers, constants))
            self.kernel[grid](*args, **constants)

        return start


CHECKS = [
    check_lengths, check_groups_and_widths, check_candidates, check_shared_is_own,
    check_equal_candidates, check_strides, check_written_in_place, check_empty, check_operator,
]  # fmt: skip
KERNEL_CHECKS = [*CHECKS, check_splits, check_nothing_is_read]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_torch_decode(check, rng):
    check("torch", rng)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_torch_decode_with_masks(check, rng, monkeypatch):
    """The form of other devices than CPUs, on a CPU."""
    monkeypatch.setattr(decode, "attend_filled", decode.attend_masked)
    check("torch", rng)


@pytest.mark.parametrize("check", KERNEL_CHECKS, ids=lambda check: check.__name__)
def test_interpreted_triton_decode(check, interpreted):
    assert interpreted(__file__)[check.__name__] == ""


def test_shapes_alone_give_a_shape(rng):
    """On tensors that say they are on a CPU and have no data, whose lengths nobody may read."""
    with FakeTensorMode():
        q, cache_ = torch.empty(4, 4, 32), torch.empty(4, 2, 70, 32)
        lengths = torch.empty(4, dtype=torch.int32)
        assert decode_attention(q, cache_, cache_, lengths).shape == q.shape


def test_masks_read_no_length(rng):
    """Tensors without data have no value to be read."""
    q = queries(4, 4, 32, rng, device="meta")
    own = (torch.empty(4, 2, 70, 32, device="meta"),) * 2 + (
        torch.empty(4, dtype=torch.int32, device="meta"),
    )
    assert attend_torch(q, [own, tuple(x[:2] for x in own)], 1.0, masked=True).shape == q.shape


def test_bad_arguments_are_named(rng, monkeypatch):
    q = queries(4, 4, 32, rng)
    k, v, n = cache(4, 2, 7, 32, [7] * 4, rng)
    for wrong, said in [
        ((q[0], k, v, n), r"\(4, 32\).*\[R, H, D\]"),
        ((q.double(), k, v, n), "float64"),
        ((q, k, v[:, :, :6], n), r"\(4, 2, 7, 32\).*\(4, 2, 6, 32\)"),
        ((q[..., :16], k, v, n), r"\[N, G, S, 16\]"),
        ((q, k[0, 0, 0], k[0, 0, 0], n), r"\[N, G, S, 32\]"),
        ((q[:, :3], k, v, n), "divides H = 3"),
        ((q, k[:, :0], v[:, :0], n), "divides H = 4"),
        ((q, k[:2], v[:2], n[:2]), "of R = 4"),
        ((q, k.half(), v, n), "dtype of the queries"),
        ((q, k, v.mT.contiguous().mT, n), "stride 1"),
        ((q, k, v, n.long()), r"int32 \[4\]"),
        ((q, k, v, n[:3]), r"int32 \[4\]"),
        ((q, k, v, n.to("meta")), "all on cpu"),
    ]:
        with pytest.raises(ValueError, match=said):
            decode_attention(*wrong)
    with pytest.raises(ValueError, match=r"prefix.*that divides R = 4"):
        shared_prefix_attention(q, k[:3], v[:3], n[:3], k, v, n)
    with pytest.raises(ValueError, match="one G"):
        shared_prefix_attention(q, k[:2, :1], v[:2, :1], n[:2], k, v, n)
    with pytest.raises(ValueError, match=r"'sdpa'.*auto"):
        decode_attention(q, k, v, n, backend="sdpa")
    monkeypatch.setattr("kernels.backend.has_triton", lambda: True)
    wide = queries(4, 2, 256, rng)
    wide_cache = cache(4, 2, 7, 256, [7] * 4, rng)
    with pytest.raises(ValueError, match=r"256 by triton.*torch"):
        decode_attention(wide, *wide_cache, backend="triton")
    close(decode_attention(wide, *wide_cache), decode_reference(wide, *wide_cache))
    monkeypatch.setattr("kernels.backend.has_triton", lambda: False)
    with pytest.raises(ValueError, match="take 'torch'"):
        decode_attention(q, k, v, n, backend="triton")


gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("check", KERNEL_CHECKS, ids=lambda check: check.__name__)
    def test_triton_decode(self, check, rng):
        check("triton", rng, "cuda")

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_torch_decode(self, check, rng):
        check("torch", rng, "cuda")

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("candidates", [1, 16, 64, 200])
    def test_shapes_of_models(self, candidates, dtype, rng):
        """Full caches of a 300M model and of grouped heads, and equal bits on a second run."""
        for groups in (8, 2):
            q = queries(candidates, 8, 128, rng, dtype, "cuda")
            prefix = cache(1, groups, 3841, 128, [3800], rng, dtype, "cuda")
            lengths = [r % 257 for r in range(candidates)]
            own = cache(candidates, groups, 256, 128, lengths, rng, dtype, "cuda")
            got = shared_prefix_attention(q, *prefix, *own, backend="triton")
            close(got, decode_reference(q, *own, *prefix), dtype)
            for _ in range(3):
                assert torch.equal(shared_prefix_attention(q, *prefix, *own, backend="triton"), got)

    @pytest.mark.parametrize("backend", ["triton", "torch"])
    def test_one_graph_serves_every_length(self, backend, rng):
        q = queries(6, 4, 64, rng, device="cuda")
        prefix = cache(2, 2, 300, 64, [300, 300], rng, device="cuda")
        own = cache(6, 2, 200, 64, [200] * 6, rng, device="cuda")
        shared_prefix_attention(q, *prefix, *own, backend=backend)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = shared_prefix_attention(q, *prefix, *own, backend=backend)
        for step in (0, 1, 64, 150):
            prefix[2].copy_(torch.tensor([step, 300 - step]))
            own[2].copy_(torch.arange(6) + step)
            graph.replay()
            close(got, decode_reference(q, *own, *prefix))


if __name__ == "__main__":
    from interpreter import main

    main(KERNEL_CHECKS, "triton")
