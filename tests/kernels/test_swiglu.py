"""SwiGLU and the linear layer that keeps no product: parity, what is kept, what is recomputed.

Triton's interpreter runs in a process of its own, which is this file as a program.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kernels.swiglu import (
    swiglu,
    swiglu_backward_op,
    swiglu_linear,
    swiglu_linear_op,
    swiglu_op,
    swiglu_reference,
)

# One rounding of an element is 2^-9 (bf16), 2^-12 (fp16) of it at most; the torch form rounds three
# times, and a matmul its result. fp32: exp is exact to 2 units, sums of 130 terms stay below 1e-6.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SHAPES = [(1,), (3, 130), (2, 5, 96), (70, 64), (2, 0, 8)]  # below and over a block, and empty


def error(got, want):
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def leaves_of(shape, rng, *, dtype=torch.float32, device="cpu", scale=3.0):
    """Return leaves gate and up; gates reach where the sigmoid is 0 or 1 in every type."""
    pair = scale * torch.randn(2, *shape, generator=rng)
    return [t.to(device, dtype).requires_grad_() for t in pair]


def weight_of(outputs, inputs, rng, *, dtype=torch.float32, device="cpu"):
    weight = torch.randn(outputs, inputs, generator=rng) / inputs**0.5
    return weight.to(device, dtype).requires_grad_()


def compare(got, want, leaves, exact, dtype, rng, what):
    form = torch.randn(got.shape, generator=rng).to(got.device, dtype)
    grads = torch.autograd.grad(got, leaves, form)
    reference = torch.autograd.grad(want, exact, form.double())
    for a, b in zip([got, *grads], [want, *reference], strict=True):
        assert a.dtype == dtype and a.shape == b.shape and error(a, b) <= TOLERANCE[dtype], what


def check_parity(backend, rng, device="cpu", shapes=SHAPES):
    """Values and gradients of both forms against float64, all types."""
    for shape in shapes:
        for dtype in TOLERANCE:
            leaves = leaves_of(shape, rng, dtype=dtype, device=device)
            exact = [t.detach().double().requires_grad_() for t in leaves]
            got, want = swiglu(*leaves, backend=backend), swiglu_reference(*exact)
            compare(got, want, leaves, exact, dtype, rng, (shape, dtype))
            weight = weight_of(24, shape[-1], rng, dtype=dtype, device=device)
            leaves.append(weight)
            exact.append(weight.detach().double().requires_grad_())
            got = swiglu_linear(*leaves, backend=backend)
            want = swiglu_reference(*exact[:2]) @ exact[2].T
            compare(got, want, leaves, exact, dtype, rng, (shape, dtype, "linear"))


def check_forms(backend, rng, device="cpu"):
    """Halves of one tensor, strided gradients, gates far out, autocast, no gradients."""
    packed = torch.randn(6, 96, generator=rng).to(device)
    gate, up = (t.contiguous().requires_grad_() for t in packed.chunk(2, -1))
    want = swiglu(gate, up, backend=backend)
    # torch's loops over vectors and over single elements differ in the last place.
    assert error(swiglu(*packed.chunk(2, -1), backend=backend), want) < 1e-6
    columns = torch.randn(48, 6, generator=rng).to(device).T
    strided = torch.autograd.grad(want, (gate, up), columns, retain_graph=True)
    expected = torch.autograd.grad(want, (gate, up), columns.contiguous())
    assert all(error(a, b) < 1e-6 for a, b in zip(strided, expected, strict=True))
    far = torch.tensor([-200.0, -90.0, 0.0, 90.0, 200.0], device=device, requires_grad=True)
    y = swiglu(far, torch.ones_like(far), backend=backend)
    (dfar,) = torch.autograd.grad(y.sum(), far)
    assert y.tolist() == [0, 0, 0, 90, 200] and dfar.tolist() == [0, 0, 0.5, 1, 1]
    weight = weight_of(8, 48, rng, device=device)
    low = [t.detach().bfloat16() for t in (gate, up)]
    with torch.autocast(device, torch.bfloat16):
        y = swiglu_linear(*low, weight, backend=backend)
    (dweight,) = torch.autograd.grad(y.float().sum(), weight)
    assert y.dtype == torch.bfloat16 and dweight.dtype == torch.float32
    assert error(y, swiglu_reference(*low) @ weight.double().T) < TOLERANCE[torch.bfloat16]
    leaves = (gate, up, weight)
    plain = swiglu_linear(*leaves, backend=backend)
    expected = torch.autograd.grad(plain.sum(), leaves)
    with torch.autocast(device, torch.bfloat16):
        y = swiglu_linear(*leaves, backend=backend)
        grads = torch.autograd.grad(y.sum(), leaves)
    if backend == "triton":  # computes in the type of gate; torch's own matmul in that of autocast
        assert torch.equal(y, plain)
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    with torch.no_grad():
        assert not swiglu_linear(gate, up, weight, backend=backend).requires_grad


def check_contexts(backend, rng, device="cpu"):
    """The same numbers through torch.compile and activation checkpointing."""
    leaves = [*leaves_of((20, 64), rng, device=device), weight_of(16, 64, rng, device=device)]

    def run(gate, up, weight):
        return swiglu_linear(gate * 2, up, weight, backend=backend).sin() + swiglu(
            gate, up, backend=backend
        ).sum(-1, keepdim=True)

    want = run(*leaves)
    expected = torch.autograd.grad(want.sum(), leaves)
    for form in (
        torch.compile(run, fullgraph=True, backend="aot_eager"),
        lambda *x: checkpoint(run, *x, use_reentrant=False),
    ):
        got = form(*leaves)
        grads = torch.autograd.grad(got.sum(), leaves)
        # aot_eager may sum in another order: 1e-6, not bits.
        for a, b in zip([got, *grads], [want, *expected], strict=True):
            assert error(a, b) < 1e-6


def kept_bytes(run, leaves):
    """Return bytes of what autograd keeps, leaves apart, and how many times a leaf is kept."""
    own = {t.untyped_storage().data_ptr() for t in leaves}
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run(*leaves)
    return sum(n for place, n in kept.items() if place not in own), y


def check_kept(backend, rng, device="cpu"):
    """No byte but gate, up and the weight is kept until the backward pass."""
    gate, up = leaves_of((32, 64), rng, dtype=torch.bfloat16, device=device)
    weight = weight_of(16, 64, rng, dtype=torch.bfloat16, device=device)

    def plain(gate, up, weight):
        return F.linear(F.silu(gate) * up, weight)

    def ours(gate, up, weight):
        return swiglu_linear(gate, up, weight, backend=backend)

    leaves = (gate, up, weight)
    assert kept_bytes(ours, leaves)[0] == 0
    assert kept_bytes(plain, leaves)[0] == 2 * 32 * 64 * 2  # silu(gate) and the product
    compiled = {
        form: kept_bytes(torch.compile(form, backend="aot_eager_decomp_partition"), leaves)[0]
        for form in (plain, ours)
    }
    assert compiled == {plain: 32 * 64 * 2, ours: 0}  # the product; the reason for `swiglu_linear`


class Matmuls(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return operator(*args, **(kwargs or {}))


def check_operator(backend, rng, device="cpu"):
    """Schemas, shapes without data and autograd registration."""
    gate, up = leaves_of((5, 24), rng, device=device)
    weight = weight_of(16, 24, rng, device=device)
    torch.library.opcheck(swiglu_op, (gate, up))
    torch.library.opcheck(swiglu_linear_op, (gate, up, weight))
    for recompute in (False, True):
        arguments = (*(t.detach() for t in (gate, gate, up)), recompute)
        torch.library.opcheck(swiglu_backward_op, arguments)


CHECKS = [check_parity, check_forms, check_contexts, check_kept]
KERNEL_CHECKS = [*CHECKS, check_operator]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_torch_swiglu(check, rng):
    check("torch", rng)


@pytest.mark.parametrize("check", KERNEL_CHECKS, ids=lambda check: check.__name__)
def test_interpreted_triton_swiglu(check, interpreted):
    assert interpreted(__file__)[check.__name__] == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_torch_is_the_layer_of_the_model_bit_for_bit(rng, dtype, autocast):
    leaves = leaves_of((3, 10, 64), rng, dtype=dtype)
    down = torch.nn.Linear(64, 32, bias=False, dtype=dtype)
    form = torch.randn(3, 10, 32, generator=rng)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        want = down(F.silu(leaves[0]) * leaves[1])
        got = swiglu_linear(*leaves, down.weight)
        assert torch.equal(swiglu(*leaves), F.silu(leaves[0]) * leaves[1])
    assert torch.equal(got, want) and got.dtype == want.dtype
    grads, expected = (
        torch.autograd.grad(y, [*leaves, down.weight], form.to(y.dtype)) for y in (got, want)
    )
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_torch_multiplies_no_matrix_again(rng, compiled):
    """Not even where a later layer reads the result, which the partitioner could make again."""

    def run(gate, up, weight):
        return F.rms_norm(gate + swiglu_linear(gate, up, weight), (64,)).sin()

    leaves = [*leaves_of((3, 10, 64), rng), weight_of(64, 64, rng)]
    partitioned = torch.compile(run, fullgraph=True, backend="aot_eager_decomp_partition")
    y = (partitioned if compiled else run)(*leaves)
    with Matmuls() as matmuls:
        y.sum().backward()
    assert matmuls.count == 2  # of dW and of the product's gradient


def test_torch_agrees_with_llama(rng):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    mlp = llama.LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=64))
    x = torch.randn(5, 32, generator=rng)
    got = swiglu_linear(mlp.gate_proj(x), mlp.up_proj(x), mlp.down_proj.weight)
    assert torch.equal(got, mlp(x))


def test_bad_arguments_are_named():
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"gate \(2, 8\).*up \(2, 4\)"):
        swiglu(x, x[:, :4])
    with pytest.raises(ValueError, match="one type"):
        swiglu(x, x.bfloat16())
    with pytest.raises(ValueError, match=r"\(2, 8\) with weight \(8, 4\)"):
        swiglu_linear(x, x, torch.zeros(8, 4))
    with pytest.raises(ValueError, match="backend 'cuda'"):
        swiglu(x, x, backend="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("check", KERNEL_CHECKS, ids=lambda check: check.__name__)
def test_triton_swiglu_on_a_gpu(check, rng):
    check("triton", rng, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_hidden_widths_of_the_models_on_a_gpu(rng):
    check_parity("triton", rng, "cuda", [(2048, width) for width in (2688, 5504, 11008)])


if __name__ == "__main__":
    from interpreter import main

    main(KERNEL_CHECKS, "triton")
