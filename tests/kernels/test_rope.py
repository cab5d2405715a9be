"""Rotary positions with norms of heads: float64, the model's own form, Hugging Face's, the kernel.

Triton's interpreter runs in a process of its own, which is this file as a program.
"""

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels.rope import rope, rope_norm_backward_op, rope_op, rope_reference, rotate

EPS = 1e-6
# One rounding of an element is 2^-9 (bf16), 2^-12 (fp16) of it at most; the torch form rounds the
# norm too. fp32: cos and sin are given, rsqrt is exact to 2 units.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

# B, H, G, T, C: heads of one tile, of part of one and of more than one, shared keys, channels that
# are a power of two and not, more tokens than a program's span, none at all.
SHAPES = [
    (1, 1, 1, 1, 2), (2, 4, 4, 9, 16), (2, 4, 2, 5, 32), (1, 5, 1, 3, 20), (1, 20, 17, 3, 12),
    (1, 2, 1, 17, 64), (1, 2, 2, 0, 8),
]  # fmt: skip


def error(got, want):
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def heads_of(shape, rng, *, dtype=torch.float32, device="cpu"):
    """Return leaves whose views are q, k as the linear layers leave them: memory [B, T, heads, C].

    And those views. One head is far from the others in size.
    """
    b, h, g, t, c = shape
    leaves = []
    for n in (h, g):
        x = torch.randn(b, t, n, c, generator=rng)
        x[:, :, 0] *= 20
        leaves.append(x.to(device, dtype).requires_grad_())
    return leaves, [leaf.transpose(1, 2) for leaf in leaves]


def angles_of(shape, rng, *, device="cpu", batch=None):
    """Return cos and sin, fp32 [B, 1, T, C/2], of angles far past a turn, others in each row."""
    b, _, _, t, c = shape
    angles = 100 * torch.randn(batch or b, 1, t, c // 2, generator=rng)
    return [f(angles).to(device) for f in (torch.cos, torch.sin)]


def weights_of(shape, rng, *, dtype=torch.float32, device="cpu"):
    pair = 1 + 0.5 * torch.randn(2, shape[4], generator=rng)
    return [w.to(device, dtype).requires_grad_() for w in pair]


def check_parity(backend, rng, device="cpu", shapes=SHAPES):
    """Values and gradients against float64, with and without norms, all types; order of memory."""
    for dtype, limit in TOLERANCE.items():
        # 16-bit types differ in loads and stores alone, which two shapes cover.
        for shape in shapes if dtype == torch.float32 else shapes[1:3]:
            for normed in (False, True):
                leaves, (q, k) = heads_of(shape, rng, dtype=dtype, device=device)
                cos, sin = angles_of(shape, rng, device=device)
                weights = weights_of(shape, rng, dtype=dtype, device=device) if normed else []
                chosen = dict(zip(("q_weight", "k_weight"), weights, strict=False))
                got = rope(q, k, cos, sin, **chosen, eps=EPS, backend=backend)
                forms = [torch.randn(y.shape, generator=rng).to(device, dtype) for y in got]
                grads = torch.autograd.grad(got, [*leaves, *weights], forms)
                exact = [t.detach().double().requires_grad_() for t in (*leaves, *weights)]
                want = [
                    rope_reference(x.transpose(1, 2), cos, sin, weight=w, eps=EPS)
                    for x, w in zip(exact[:2], exact[2:] or (None, None), strict=True)
                ]
                reference = torch.autograd.grad(want, exact, [f.double() for f in forms])
                for a, b in zip([*got, *grads], [*want, *reference], strict=True):
                    assert a.dtype == dtype and a.shape == b.shape, (shape, dtype, normed)
                    assert error(a, b) <= limit, (shape, dtype, normed)
                if backend == "triton":
                    assert all(y.transpose(1, 2).is_contiguous() for y in got)


def check_forms(backend, rng, device="cpu"):
    """Any order of memory, angles that all rows share, one unused result, no gradients."""
    shape = (2, 4, 2, 10, 16)
    leaves, (q, k) = heads_of(shape, rng, device=device)
    cos, sin = angles_of(shape, rng, device=device, batch=1)
    weights = weights_of(shape, rng, device=device)
    for chosen in ({}, {"q_weight": weights[0], "k_weight": weights[1]}):
        want = rope(q, k, cos, sin, **chosen, backend=backend)
        each = [x.expand(2, -1, -1, -1).contiguous() for x in (cos, sin)]
        for form in (torch.clone, lambda x: x.mT.contiguous().mT, torch.Tensor.contiguous):
            got = rope(form(q), form(k), *each, **chosen, backend=backend)
            # torch's loops over vectors and over single elements differ in the last place.
            assert all(error(a, b) < 1e-6 for a, b in zip(got, want, strict=True))
        dy = torch.randn(2, 4, 10, 16, generator=rng).to(device)
        (plain,) = torch.autograd.grad(want[0], leaves[0], dy, retain_graph=True)
        (other,) = torch.autograd.grad(want[0], leaves[0], dy.mT.contiguous().mT)
        assert error(plain, other) < 1e-6
        with torch.no_grad():
            assert not rope(q, k, cos, sin, **chosen, backend=backend)[0].requires_grad


def check_rotation(backend, rng, device="cpu"):
    """What rotary positions are for: lengths stay, and q · k depends on the distance alone."""
    q, k = (torch.randn(1, 1, 1, 32, generator=rng).to(device) for _ in range(2))

    def at(x, position):
        angles = position * 10.0 ** -torch.arange(16, device=device)[None, None, None]
        return rope(x, x, angles.cos(), angles.sin(), backend=backend)[1]

    scores = [float((at(q, p + 3) * at(k, p)).sum()) for p in (0.0, 5.0, 11.0)]
    # fp32 angles of about 10 are off by 1e-6, and so are lengths and scores.
    assert max(scores) - min(scores) < 1e-4 * float(q.norm() * k.norm())
    assert abs(float(at(q, 7.0).norm() / q.norm()) - 1) < 1e-5
    assert torch.equal(at(q, 0.0), q)


def check_contexts(backend, rng, device="cpu"):
    """The same numbers through torch.compile and activation checkpointing."""
    shape = (1, 4, 2, 20, 16)
    leaves, _ = heads_of(shape, rng, device=device)
    cos, sin = angles_of(shape, rng, device=device)
    weights = weights_of(shape, rng, device=device)

    def run(q, k, q_weight, k_weight):
        q, k = (2 * x.transpose(1, 2) for x in (q, k))
        first = rope(q, k, cos, sin, q_weight=q_weight, k_weight=k_weight, backend=backend)
        q, k = rope(*first, cos, sin, backend=backend)
        return (q * k.repeat_interleave(2, 1)).sin()

    want = run(*leaves, *weights)
    expected = torch.autograd.grad(want.sum(), [*leaves, *weights])
    for form in (
        torch.compile(run, fullgraph=True, backend="aot_eager"),
        lambda *x: checkpoint(run, *x, use_reentrant=False),
    ):
        got = form(*leaves, *weights)
        grads = torch.autograd.grad(got.sum(), [*leaves, *weights])
        # aot_eager may split F.rms_norm into its parts. Products of heads of size 20 go through a
        # sine, which turns 1e-7 of 20 into 1e-5.
        for a, b in zip([got, *grads], [want, *expected], strict=True):
            assert error(a, b) < 1e-5


def check_kept(backend, rng, device="cpu"):
    """Without norms nothing but the angles is kept, with them raw q and k besides."""
    shape = (1, 4, 2, 20, 16)
    leaves, (q, k) = heads_of(shape, rng, dtype=torch.bfloat16, device=device)
    cos, sin = angles_of(shape, rng, device=device)
    weights = weights_of(shape, rng, dtype=torch.bfloat16, device=device)
    for chosen, more in (
        ({}, []),
        ({"q_weight": weights[0], "k_weight": weights[1]}, [*leaves, *weights]),
    ):
        kept = set()

        def pack(t, kept=kept):
            kept.add(t.untyped_storage().data_ptr())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            rope(q, k, cos, sin, **chosen, backend="triton")
        assert kept == {t.untyped_storage().data_ptr() for t in (cos, sin, *more)}


def check_operator(backend, rng, device="cpu"):
    """Schemas, shapes and strides without data, autograd registration; the same bits twice."""
    shape = (1, 4, 2, 20, 16)
    _, (q, k) = heads_of(shape, rng, device=device)
    cos, sin = angles_of(shape, rng, device=device)
    weights = weights_of(shape, rng, device=device)
    torch.library.opcheck(rope_op, (q, k, cos, sin, None, None, EPS, False))
    torch.library.opcheck(rope_op, (q, k, cos, sin, *weights, EPS, False))
    q, k = q.detach(), k.detach()
    arguments = (q, k, q, k, cos, sin, *(w.detach() for w in weights), EPS)
    torch.library.opcheck(rope_norm_backward_op, arguments)
    once, twice = (rope_norm_backward_op(*arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    from kernels import rope_triton

    with patch.object(rope_triton, "PROGRAMS", 2):  # as where there are more tokens than programs
        fewer = rope_norm_backward_op(*arguments)
    assert all(error(a, b) < 1e-6 for a, b in zip(fewer, once, strict=True))


CHECKS = [check_parity, check_forms, check_rotation, check_contexts]
KERNEL_CHECKS = [*CHECKS, check_kept, check_operator]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_torch_rope(check, rng):
    check("torch", rng)


@pytest.mark.parametrize("check", KERNEL_CHECKS, ids=lambda check: check.__name__)
def test_interpreted_triton_rope(check, interpreted):
    assert interpreted(__file__)[check.__name__] == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_is_the_form_of_the_model_bit_for_bit(rng, dtype):
    from lvm.model import rotary

    shape = (2, 4, 2, 30, 16)
    leaves, (q, k) = heads_of(shape, rng, dtype=dtype)
    angles = rotary(torch.randint(0, 4096, (2, 30), generator=rng), dim=16, theta=1e4)
    for got, x, leaf in zip(rope(q, k, *angles), (q, k), leaves, strict=True):
        want = rotate(x, *angles)
        assert torch.equal(got, want) and got.stride() == want.stride()
        form = torch.randn(want.shape, generator=rng).to(dtype)
        grads = [torch.autograd.grad(y, leaf, form)[0] for y in (got, want)]
        assert torch.equal(*grads)


def test_torch_agrees_with_qwen3(rng):
    """Norms and angles of heads as Hugging Face computes them in Qwen3, in fp32."""
    qwen3 = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    shape = (2, 4, 2, 30, 16)
    _, (q, k) = heads_of(shape, rng)
    weights = weights_of(shape, rng)
    norms = [qwen3.Qwen3RMSNorm(16, eps=EPS) for _ in weights]
    for norm, weight in zip(norms, weights, strict=True):
        norm.weight.data.copy_(weight)
    config = SimpleNamespace(
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, head_dim=16,
        max_position_embeddings=4096, hidden_size=64, num_attention_heads=4,
    )  # fmt: skip
    pos = torch.randint(0, 4096, (2, 30), generator=rng)
    angles = qwen3.Qwen3RotaryEmbedding(config)(q, pos)
    cos, sin = (x[:, None, :, :8] for x in angles)
    got = rope(q, k, cos, sin, q_weight=weights[0], k_weight=weights[1], eps=EPS)
    want = qwen3.apply_rotary_pos_emb(norms[0](q), norms[1](k), *angles)
    # The same fp32 operations, but for the order of products and sums.
    assert max(error(a, b) for a, b in zip(got, want, strict=True)) < 1e-6
    plain = qwen3.apply_rotary_pos_emb(q, k, *angles)
    assert max(error(a, b) for a, b in zip(rope(q, k, cos, sin), plain, strict=True)) < 1e-6


def test_norms_are_those_of_the_layer_bit_for_bit(rng):
    shape = (2, 4, 2, 30, 16)
    _, (q, k) = heads_of(shape, rng, dtype=torch.bfloat16)
    cos, sin = angles_of(shape, rng)
    norms = [nn.RMSNorm(16, eps=EPS, dtype=torch.bfloat16) for _ in range(2)]
    for norm in norms:
        nn.init.normal_(norm.weight, generator=rng)
    got = rope(q, k, cos, sin, q_weight=norms[0].weight, k_weight=norms[1].weight, eps=EPS)
    want = rope(norms[0](q), norms[1](k), cos, sin)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_bad_arguments_are_named(rng):
    shape = (2, 4, 2, 10, 16)
    _, (q, k) = heads_of(shape, rng)
    cos, sin = angles_of(shape, rng)
    with pytest.raises(ValueError, match=r"k \(2, 2, 9, 16\)"):
        rope(q, k[:, :, :9], cos, sin)
    with pytest.raises(ValueError, match="C even"):
        rope(q[..., :3], k[..., :3], cos, sin)
    with pytest.raises(ValueError, match="4 and 3 dimensions"):
        rope(q, k[0], cos, sin)
    with pytest.raises(ValueError, match=r"angles \(2, 1, 10, 7\)"):
        rope(q, k, cos[..., :7], sin)
    with pytest.raises(ValueError, match="both weights"):
        rope(q, k, cos, sin, k_weight=torch.ones(16))
    with pytest.raises(ValueError, match=r"\[16\]"):
        rope(q, k, cos, sin, q_weight=torch.ones(8), k_weight=torch.ones(16))
    pytest.importorskip("triton")
    wide = torch.zeros(1, 1, 1, 258)
    with pytest.raises(ValueError, match="258 channels"):
        rope(wide, wide, wide[..., :129], wide[..., :129], backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("check", KERNEL_CHECKS, ids=lambda check: check.__name__)
def test_triton_rope_on_a_gpu(check, rng):
    check("triton", rng, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_heads_of_the_models_on_a_gpu(rng):
    heads = [(8, 8, 128), (16, 16, 128), (32, 8, 128), (32, 32, 100), (16, 16, 256)]
    check_parity("triton", rng, "cuda", [(1, h, g, 4096, c) for h, g, c in heads])


if __name__ == "__main__":
    from interpreter import main

    main(KERNEL_CHECKS, "triton")
