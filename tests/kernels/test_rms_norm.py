"""RMSNorm with a residual: float64, nn.RMSNorm, LLaMA's; what is kept; the kernel.

Triton's interpreter runs in a process of its own, which is this file as a program.
"""

from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels.rms_norm import (
    MAX_WIDTH,
    rms_norm,
    rms_norm_backward_op,
    rms_norm_op,
    rms_norm_reference,
)

EPS = 1e-6
# One rounding of an element is 2^-9 (bf16), 2^-12 (fp16) of it at most; the residual form rounds
# the sum too. fp32: rsqrt is exact to 2 units and sums of D terms stay below 1e-6.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

# Widths below, at and over a power of two, rows below and above a program's span and none at all.
# (At width 1 the gradient is a difference of equals.)
SHAPES = [(1, 8), (3, 64), (2, 5, 96), (19, 130), (1, 40, 256), (2, 0, 16)]


def error(got, want):
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def inputs(shape, rng, *, dtype=torch.float32, device="cpu", residual=True):
    """Return leaves x, weight and the residual or None. One row is far from the others in size."""
    x = torch.randn(shape, generator=rng)
    if x.numel() and x.ndim > 1:
        x.view(-1, shape[-1])[0] *= 30
    weight = 1 + 0.5 * torch.randn(shape[-1], generator=rng)
    added = torch.randn(shape, generator=rng) if residual else None
    leaves = [
        None if t is None else t.to(device, dtype).requires_grad_() for t in (x, weight, added)
    ]
    return tuple(leaves)


def gradients(outputs, leaves, rng):
    """Return what a random linear form of all outputs gives each leaf, and the form's weights."""
    forms = [torch.randn(o.shape, generator=rng).to(o.device, o.dtype) for o in outputs]
    return torch.autograd.grad(outputs, leaves, forms), forms


def outputs_of(result):
    return result if isinstance(result, tuple) else (result,)


def check_parity(backend, rng, device="cpu", shapes=SHAPES):
    """Values and all gradients against float64, with and without a residual, all types."""
    for dtype, limit in TOLERANCE.items():
        for shape in shapes:
            for residual in (False, True):
                x, weight, added = inputs(shape, rng, dtype=dtype, device=device, residual=residual)
                leaves = [t for t in (x, weight, added) if t is not None]
                got = outputs_of(rms_norm(x, weight, eps=EPS, residual=added, backend=backend))
                assert all(o.dtype == dtype and o.shape == x.shape for o in got)
                grads, forms = gradients(got, leaves, rng)
                exact = [t.detach().double().requires_grad_() for t in leaves]
                want = rms_norm_reference(
                    *exact[:2], eps=EPS, residual=exact[2] if residual else None
                )[: len(got)]
                reference = torch.autograd.grad(want, exact, [f.double() for f in forms])
                for a, b in zip([*got, *grads], [*want, *reference], strict=True):
                    assert a.dtype == dtype and error(a, b) <= limit, (shape, dtype, residual)


def check_forms(backend, rng, device="cpu"):
    """Strided inputs and gradients, a sum that nobody uses, an eps that matters, no gradients."""
    x, weight, added = inputs((6, 48), rng, device=device)
    strided = [t.detach().repeat_interleave(2, -1)[..., ::2] for t in (x, weight)]
    want = rms_norm(x, weight, eps=EPS, backend=backend)
    # torch's loops over vectors and over single elements differ in the last place.
    assert error(rms_norm(*strided, eps=EPS, backend=backend), want) < 1e-6
    columns = torch.randn(48, 6, generator=rng).to(device).T
    (dx,) = torch.autograd.grad(want, x, columns, retain_graph=True)
    assert error(dx, torch.autograd.grad(want, x, columns.contiguous())[0]) < 1e-6
    y, total = rms_norm(x, weight, eps=EPS, residual=added, backend=backend)
    dx, dadded = torch.autograd.grad(y.sum(), (x, added), retain_graph=True)
    assert torch.equal(dx, dadded)
    both = torch.autograd.grad((y.sum(), total.sum()), x)[0]
    assert error(both - dx, torch.ones_like(dx)) < 1e-5  # the sum's own gradient is 1
    low = [t.detach().bfloat16() for t in (x, weight, added)]
    y, total = rms_norm(*low[:2], eps=EPS, residual=low[2], backend=backend)
    assert torch.equal(total, low[0] + low[2])  # rounded, and normalised as it was rounded:
    assert torch.equal(y, rms_norm(total, low[1], eps=EPS, backend=backend))
    small = torch.full((1, 8), 1e-3, device=device)
    value = rms_norm(small, torch.ones(8, device=device), eps=1e-6, backend=backend)
    assert error(value, torch.full_like(small, 0.5**0.5)) < 1e-5
    with torch.no_grad():
        assert not rms_norm(x, weight, eps=EPS, backend=backend).requires_grad


def check_contexts(backend, rng, device="cpu"):
    """The same bits through torch.compile and activation checkpointing."""
    x, weight, added = inputs((20, 64), rng, device=device)

    def run(x, weight, added):
        y, total = rms_norm(x * 2, weight, eps=EPS, residual=added, backend=backend)
        return y.sin() + total

    want = run(x, weight, added)
    expected = torch.autograd.grad(want.sum(), (x, weight, added))
    for form in (
        torch.compile(run, fullgraph=True, backend="aot_eager"),
        lambda *leaves: checkpoint(run, *leaves, use_reentrant=False),
    ):
        got = form(x, weight, added)
        grads = torch.autograd.grad(got.sum(), (x, weight, added))
        # aot_eager may split F.rms_norm into its parts: 1e-6, not bits, for that backend.
        for a, b in zip([got, *grads], [want, *expected], strict=True):
            assert error(a, b) < 1e-6


def check_kept(backend, rng, device="cpu"):
    """The kernel keeps the sum and 4 bytes a row; the sum is the tensor that was returned."""
    x, weight, added = inputs((20, 64), rng, dtype=torch.bfloat16, device=device)
    kept = {}

    def pack(t):
        kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        _, total = rms_norm(x, weight, eps=EPS, residual=added, backend="triton")
    assert sorted(kept.values()) == sorted([20 * 64 * 2, 64 * 2, 20 * 4])
    assert total.data_ptr() in kept


def check_operator(backend, rng, device="cpu"):
    """Schema, shapes without data and autograd registration; the same bits twice."""
    for residual in (False, True):
        x, weight, added = inputs((5, 24), rng, device=device, residual=residual)
        torch.library.opcheck(rms_norm_op, (x, weight, added, EPS))
        total, r = x.detach(), torch.ones(5, device=device)
        arguments = (total, total if residual else None, total, weight.detach(), r)
        torch.library.opcheck(rms_norm_backward_op, arguments)
    x, weight, _ = inputs((100, 24), rng, device=device)
    dy = torch.randn(100, 24, generator=rng).to(device)
    y = rms_norm(x, weight, eps=EPS, backend="triton")
    once, twice = (torch.autograd.grad(y, (x, weight), dy, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    from kernels import rms_norm_triton

    with patch.object(rms_norm_triton, "PROGRAMS", 3):  # as where there are more rows than programs
        fewer = torch.autograd.grad(y, (x, weight), dy)
    assert all(error(a, b) < 1e-6 for a, b in zip(fewer, once, strict=True))


CHECKS = [check_parity, check_forms, check_contexts]
KERNEL_CHECKS = [*CHECKS, check_kept, check_operator]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_torch_norm(check, rng):
    check("torch", rng)


@pytest.mark.parametrize("check", KERNEL_CHECKS, ids=lambda check: check.__name__)
def test_interpreted_triton_norm(check, interpreted):
    assert interpreted(__file__)[check.__name__] == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_is_the_layer_of_the_model_bit_for_bit(rng, dtype):
    x, weight, added = inputs((3, 10, 64), rng, dtype=dtype)
    norm = nn.RMSNorm(64, eps=EPS).to(dtype)
    norm.weight.data.copy_(weight)
    total = x + added
    want = norm(total)
    got = rms_norm(x, weight, eps=EPS, residual=added)
    assert torch.equal(got[0], want) and torch.equal(got[1], total)
    assert torch.equal(rms_norm(total, weight, eps=EPS), want)
    grads, forms = gradients(got, (x, weight, added), rng)
    expected = torch.autograd.grad((want, total), (x, norm.weight, added), forms)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_torch_agrees_with_llama(rng):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x, weight, _ = inputs((3, 10, 64), rng)
    norm = llama.LlamaRMSNorm(64, eps=EPS)
    norm.weight.data.copy_(weight)
    # The same fp32 operations, but for the order of two products and of the sum.
    assert error(rms_norm(x, weight, eps=EPS), norm(x)) < 1e-6


def test_bad_arguments_are_named(rng, monkeypatch):
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"\(2, 8\) with weight \(4,\)"):
        rms_norm(x, torch.ones(4), eps=EPS)
    with pytest.raises(ValueError, match=r"and \(1, 8\) residual"):
        rms_norm(x, torch.ones(8), eps=EPS, residual=x[:1])
    with pytest.raises(ValueError, match="backend 'cuda'"):
        rms_norm(x, torch.ones(8), eps=EPS, backend="cuda")
    wide = torch.zeros(1, MAX_WIDTH + 1)
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="take 'torch'"):
        rms_norm(wide, wide[0], eps=EPS, backend="triton")
    monkeypatch.setattr("kernels.rms_norm.has_triton", lambda: False)
    with pytest.raises(ValueError, match="does not import here"):
        rms_norm(x, torch.ones(8), eps=EPS, backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("check", KERNEL_CHECKS, ids=lambda check: check.__name__)
def test_triton_norm_on_a_gpu(check, rng):
    check("triton", rng, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_widths_of_the_models_on_a_gpu(rng):
    shapes = [(4096, width) for width in (1024, 2048, 3200, 4096, 8192)]
    check_parity("triton", rng, "cuda", shapes)


if __name__ == "__main__":
    from interpreter import main

    main(KERNEL_CHECKS, "triton")
