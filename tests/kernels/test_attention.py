"""Every attention backend against attention written out in float64."""

from typing import get_args

import pytest
import torch

from kernels.attention import Backend, Mask, attention, attention_reference, densify, resolve

# float32 arithmetic on sums of up to 300 terms of order one: 300 · 2^-24 is 2e-5.
ATOL = 2e-5


def inputs(rng, *, heads=4, groups=4, queries=33, keys=33, dim=24):
    def draw(n, t):
        return torch.randn(2, n, t, dim, generator=rng)

    return draw(heads, queries), draw(groups, keys), draw(groups, keys)


def masks(length, rng):
    causal = torch.arange(length).expand(2, length)
    cut = torch.where(causal >= 20, 20, 0)
    dense = torch.rand(2, length, length, generator=rng) < 0.3
    return {
        "causal": Mask(causal=True),
        "full": Mask.full(),
        "packed": Mask.interval(cut, causal + 1),
        "prefix": Mask.interval(torch.zeros_like(cut), (causal + 1).clamp(min=11)),
        "dense": Mask(dense=dense | torch.eye(length, dtype=torch.bool)),
    }


@pytest.mark.parametrize("backend", get_args(Backend))
@pytest.mark.parametrize("name", ["causal", "full", "packed", "prefix", "dense"])
@pytest.mark.parametrize(("heads", "groups", "dim"), [(4, 4, 32), (4, 2, 24), (3, 1, 100)])
def test_backend_equals_the_reference(backend, name, heads, groups, dim, rng):
    q, k, v = inputs(rng, heads=heads, groups=groups, dim=dim)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    mask = masks(33, rng)[name]
    want = attention_reference(q, k, v, mask)
    got = attention(q, k, v, resolve(mask, 33, backend=backend), backend=backend)
    torch.testing.assert_close(got, want, atol=ATOL, rtol=0)
    weight = torch.randn(want.shape, generator=rng)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), (q, k, v)),
        torch.autograd.grad((want * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=4 * ATOL, rtol=0)  # three products deep, not one


def test_a_row_that_reads_nothing_gives_zeros(rng):
    q, k, v = inputs(rng)
    lo = torch.arange(33).expand(2, 33).int()
    hi = torch.where(lo % 3 == 0, lo, lo + 1)
    got = attention(q, k, v, Mask.interval(lo, hi))
    assert torch.equal(got[:, :, ::3], torch.zeros_like(got[:, :, ::3]))
    torch.testing.assert_close(
        got, attention_reference(q, k, v, Mask.interval(lo, hi)), atol=ATOL, rtol=0
    )


def test_queries_may_be_fewer_than_keys(rng):
    q, k, v = inputs(rng, queries=3, keys=40)
    hi = torch.tensor([38, 39, 40]).expand(2, 3)
    mask = Mask.interval(torch.zeros_like(hi), hi)
    torch.testing.assert_close(
        attention(q, k, v, mask), attention_reference(q, k, v, mask), atol=ATOL, rtol=0
    )


def test_the_dense_form_is_made_once_and_draws_the_intervals():
    mask = Mask.interval(torch.tensor([[0, 0, 2]]), torch.tensor([[1, 2, 3]]))
    resolved = resolve(mask, 3)
    assert resolved.dense.int().tolist() == [[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]
    assert densify(resolved, 3) is resolved.dense
    assert resolve(Mask(causal=True), 3).dense is None


def test_an_unknown_backend_is_named(rng):
    q, k, v = inputs(rng)
    with pytest.raises(ValueError, match=r"'cuda'.*auto"):
        attention(q, k, v, Mask.full(), backend="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", get_args(Backend))
@pytest.mark.parametrize("name", ["causal", "full", "packed", "prefix", "dense"])
def test_backend_equals_the_reference_on_a_gpu(backend, name, rng):
    q, k, v = (x.cuda().bfloat16() for x in inputs(rng, dim=64))
    mask = masks(33, rng)[name]
    tensors = {f: getattr(mask, f) for f in ("lo", "hi", "dense")}
    moved = Mask(
        causal=mask.causal, **{f: t.cuda() if t is not None else None for f, t in tensors.items()}
    )
    want = attention_reference(q, k, v, moved)
    got = attention(q, k, v, resolve(moved, 33, backend=backend), backend=backend)
    # bf16 keeps 8 bits: weights and outputs of order one are each rounded by up to 2^-8.
    torch.testing.assert_close(got, want, atol=2e-2, rtol=0)
