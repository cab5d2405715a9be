"""Cross-entropy without logits: every backend against float64, and how much memory it takes."""

import math
from collections.abc import Callable
from dataclasses import fields
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.cross_entropy import (
    CrossEntropy,
    cross_entropy_op,
    first_highest,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    rows_of_chunk,
)

IGNORE = -100
# Largest relative error (norm of the difference over norm of the reference) against float64. fp32:
# sums of 8320 terms and of matmuls, 100 roundings of 6e-8. Half types: logits and gradients are
# rounded to them before the next matmul, 2^-11 and 2^-8 each, some of it averaged away.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

# N positions, D width, V rows of the head, live columns (0: all), chunk (0: own choice). One chunk
# and several, whole and not; V below, at and over a block of 64 and of 2048; padded tables.
SHAPES = [
    (70, 16, 64, 0, 32), (64, 16, 64, 0, 16), (33, 24, 640, 515, 0), (21, 16, 640, 640, 8),
    (5, 8, 7, 0, 2), (9, 16, 2050, 2049, 4), (12, 16, 8320, 8195, 8), (3, 8, 8292, 0, 0),
    (1, 8, 65, 1, 1),
]  # fmt: skip


def make(shape, rng, *, dtype=torch.float32, device="cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Return x and weight, which want a gradient, and labels: label 0, the last, and none."""
    n, width, table, columns, _ = shape
    x = torch.randn(n, width, generator=rng).to(device, dtype).requires_grad_()
    weight = torch.randn(table, width, generator=rng) * 3 / width**0.5
    labels = torch.randint(0, columns or table, (n,), generator=rng)
    labels[::3] = 0
    labels[1::4] = (columns or table) - 1
    labels[2::5] = IGNORE
    return x, weight.to(device, dtype).requires_grad_(), labels.to(device)


def values(sums: CrossEntropy) -> list[Tensor]:
    return [getattr(sums, field.name) for field in fields(sums)]


def error(found: Tensor, wanted: Tensor) -> float:
    """Return the norm of the difference over that of the reference, or alone where that is 0."""
    difference = (found.detach().double() - wanted.detach().double()).norm()
    return float(difference / (wanted.detach().double().norm() or 1.0))


def gradients(call: Callable[..., CrossEntropy], x: Tensor, weight: Tensor, labels: Tensor):
    """Return the sums and both gradients at an incoming gradient of 0.37."""
    sums = call(x, weight, labels)
    return sums, torch.autograd.grad(0.37 * sums.loss, (x, weight))


def compare(backend, x, weight, labels, *, chunk=None, **options):
    """Hold sums, counts and gradients against the reference; return all of them."""
    wanted, wanted_grads = gradients(
        partial(linear_cross_entropy_reference, **options), x, weight, labels
    )
    found, grads = gradients(
        partial(linear_cross_entropy, backend=backend, chunk=chunk, **options), x, weight, labels
    )
    limit = TOLERANCE[x.dtype]
    for name in ("loss", "nll", "soft"):
        value = getattr(found, name)
        assert value.dtype == torch.float32 and value.shape == ()
        assert error(value, getattr(wanted, name)) <= limit, name
    assert int(found.count) == int(wanted.count)
    for grad, exact, like in zip(grads, wanted_grads, (x, weight), strict=True):
        assert grad.dtype == like.dtype and error(grad, exact) <= limit
    return found, wanted, grads


def check_fp32(backend, rng, device="cpu"):
    for shape in SHAPES:
        x, weight, labels = make(shape, rng, device=device)
        options = {"columns": shape[3] or None, "chunk": shape[4] or None}
        for z_loss in (0.0, 0.05):
            found, wanted, grads = compare(backend, x, weight, labels, z_loss=z_loss, **options)
            assert int(found.correct) == int(wanted.correct)  # no ties in random fp32
            assert not found.nll.requires_grad and found.loss.requires_grad
            assert bool((grads[0][labels == IGNORE] == 0).all())
            assert bool((grads[1][shape[3] or len(weight) :] == 0).all())


def check_half(backend, rng, device="cpu"):
    for dtype in (torch.bfloat16, torch.float16):
        for shape in ((70, 16, 64, 0, 32), (33, 24, 640, 515, 16), (12, 16, 8320, 8195, 0)):
            x, weight, labels = make(shape, rng, dtype=dtype, device=device)
            options = {"columns": shape[3] or None, "chunk": shape[4] or None}
            compare(backend, x, weight, labels, z_loss=0.05, **options)


def check_soft(backend, rng, device="cpu"):
    """Soft targets of several widths, types and masses, against float64 and torch's own KL."""
    for shape, dtype in (
        ((33, 24, 640, 515, 16), torch.float32),
        ((20, 16, 64, 0, 0), torch.bfloat16),
    ):
        n, _, table, columns, chunk = shape
        x, weight, labels = make(shape, rng, dtype=dtype, device=device)
        live = columns or table
        for width, kind, t in ((live, torch.float32, 1.0), (table, torch.bfloat16, 2.0)):
            soft = (2 * torch.randn(n, width, generator=rng)).softmax(1).to(device, kind)
            soft[3] = 0  # a row without a teacher
            soft[4] *= 3  # and one whose targets are no distribution
            options = {"columns": columns or None, "temperature": t, "chunk": chunk or None}
            for weights in ({}, {"hard_weight": 0.0, "soft_weight": t * t}, {"soft_weight": 0.3}):
                compare(backend, x, weight, labels, soft=soft, z_loss=0.01, **options, **weights)

    counts = labels != IGNORE
    soft = torch.randn(n, table, generator=rng).softmax(1).to(device)
    logits = (x.double() @ weight.double().T)[counts]
    for t in (1.0, 2.0):
        found = linear_cross_entropy(
            x.float(), weight.float(), labels, soft=soft, temperature=t, backend=backend
        )
        target = soft.double()[counts]
        kl = F.kl_div((logits / t).log_softmax(1), target, reduction="sum")
        entropy = -(target * target.log()).sum()
        assert float(found.soft) == pytest.approx(float((kl + entropy).detach()), rel=1e-5)


def check_extremes(backend, rng, device="cpu"):
    """A logit of ±1e4, equal logits, no position at all, no label at all, a label that is wrong."""
    x = torch.eye(4, device=device).requires_grad_()
    weight = torch.randn(70, 4, generator=rng).to(device)
    weight[5, 0], weight[6, 1], weight[:, 2], weight[[7, 9], 3] = 1e4, -1e4, 0.0, 50.0
    labels = torch.tensor([5, 6, 0, 9], device=device)
    soft = torch.rand(4, 70, generator=rng).softmax(1).to(device)
    found, wanted, _ = compare(backend, x, weight.requires_grad_(), labels, soft=soft, z_loss=1e-6)
    assert math.isfinite(float(found.loss.detach())) and float(found.nll) > 9e3
    # 5 is the largest; 6 the smallest; 0 the first of 70 equals; 9 the second of two equals.
    assert int(found.correct) == int(wanted.correct) == 2
    for label, right in ((7, 3), (8, 2)):
        labels[3] = label
        assert int(linear_cross_entropy(x, weight, labels, backend=backend).correct) == right

    for rows, mark in ((0, 0), (4, IGNORE)):
        labels = torch.full((rows,), mark, device=device)
        sums, grads = gradients(
            partial(linear_cross_entropy, backend=backend, z_loss=1.0), x[:rows], weight, labels
        )
        assert [float(value.detach()) for value in values(sums)] == [0.0] * 5
        assert grads[0].shape == (rows, 4) and grads[1].shape == (70, 4)
        assert not grads[0].any() and not grads[1].any()

    for wrong in (64, 69, -1):
        labels = torch.tensor([0, wrong, 1, 2], device=device)
        if backend == "triton":
            assert linear_cross_entropy(x, weight, labels, columns=64, backend=backend).nll.isnan()
        elif device == "cpu":
            with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
                linear_cross_entropy(x, weight, labels, columns=64, backend=backend)


def check_chunks(backend, rng, device="cpu"):
    """How rows are cut moves nothing beyond rounding, and dx, which no sum crosses, not at all."""
    x, weight, labels = make((37, 16, 130, 129, 0), rng, device=device)
    results = [
        gradients(
            partial(linear_cross_entropy, chunk=chunk, columns=129, z_loss=0.1, backend=backend),
            x, weight, labels,
        )
        for chunk in (37, 64, 1, 5, 36, None)
    ]  # fmt: skip
    (sums, (dx, dw)), *others = results
    for other, (other_dx, other_dw) in others:
        assert int(other.correct) == int(sums.correct)
        # A product of one row is another BLAS routine, with another order of its 16 terms.
        assert error(other.loss, sums.loss) <= 1e-6 and error(other_dx, dx) <= 1e-6
        assert error(other_dw, dw) <= 1e-6
    again = gradients(
        partial(linear_cross_entropy, chunk=5, columns=129, z_loss=0.1, backend=backend),
        x, weight, labels,
    )  # fmt: skip
    assert torch.equal(again[0].loss, others[2][0].loss)
    assert all(torch.equal(a, b) for a, b in zip(again[1], others[2][1], strict=True))


def check_differences(backend, rng, device="cpu"):
    """The gradient along a direction is the slope of the float64 value, by central differences."""
    x, weight, labels = make((19, 8, 70, 66, 0), rng, device=device)
    soft = torch.randn(19, 70, generator=rng).softmax(1).to(device)
    options = {"columns": 66, "z_loss": 0.1, "soft": soft, "soft_weight": 0.5, "temperature": 2.0}
    call = partial(linear_cross_entropy, chunk=8, backend=backend, **options)
    grads = torch.autograd.grad(call(x, weight, labels).loss, (x, weight))
    steps = [torch.randn(t.shape, generator=rng).to(device) for t in (x, weight)]
    slope = sum(float((g * s).sum()) for g, s in zip(grads, steps, strict=True))

    def value(eps: float) -> float:
        moved = (t.detach().double() + eps * s for t, s in zip((x, weight), steps, strict=True))
        return float(linear_cross_entropy_reference(*moved, labels, **options).loss)

    # The curvature leaves 1e-6 of the slope at this step, fp32 gradients 1e-6.
    assert slope == pytest.approx((value(1e-4) - value(-1e-4)) / 2e-4, rel=1e-5)


def check_wanted(backend, rng, device="cpu"):
    """Each gradient alone, and neither: what is not wanted is not formed."""
    x, weight, labels = make((30, 16, 70, 0, 0), rng, device=device)
    call = partial(linear_cross_entropy, backend=backend, z_loss=0.1, chunk=16)
    whole, both = gradients(call, x, weight, labels)
    alone = torch.autograd.grad(0.37 * call(x, weight.detach(), labels).loss, x)
    assert torch.equal(alone[0], both[0])
    alone = torch.autograd.grad(0.37 * call(x.detach(), weight, labels).loss, weight)
    assert torch.equal(alone[0], both[1])
    with torch.no_grad():
        sums = call(x, weight, labels)
    for value, other in zip(values(sums), values(whole), strict=True):
        assert not value.requires_grad and torch.equal(value, other)


def check_views(backend, rng, device="cpu"):
    """Inputs that are not contiguous, and gradients of the value twice."""
    x, weight, labels = make((30, 16, 70, 0, 0), rng, device=device)
    call = partial(linear_cross_entropy, backend=backend, chunk=16)
    _, (dx, dw) = gradients(call, x, weight, labels)
    wide = torch.cat([x, x], 1).detach()[:, :16].requires_grad_()
    turned = weight.detach().T.contiguous().T.requires_grad_()
    apart = labels.repeat_interleave(2)[::2]
    _, grads = gradients(call, wide, turned, apart)
    for one, other in zip((dx, dw), grads, strict=True):  # another BLAS routine
        assert error(other, one) <= 1e-6
    loss = call(x, weight, labels).loss
    twice = [torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*twice)


def check_autocast(backend, rng, device="cpu"):
    """As nn.Linear in autocast's type, softmax in fp32; gradients in the type of the inputs."""
    shape = (40, 16, 130, 0, 16)
    x, weight, labels = make(shape, rng, device=device)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(device, dtype):
            found, grads = gradients(
                partial(linear_cross_entropy, backend=backend, chunk=16), x, weight, labels
            )
            logits = F.linear(x, weight)
            assert logits.dtype == dtype
            eager = F.cross_entropy(logits.float(), labels, reduction="sum")
        assert float(found.nll) == pytest.approx(float(eager.detach()), rel=1e-5)  # equal logits
        exact, wanted = gradients(linear_cross_entropy_reference, x, weight, labels)
        assert found.loss.dtype == torch.float32
        assert error(found.loss, exact.loss) <= TOLERANCE[dtype]
        for grad, other in zip(grads, wanted, strict=True):
            assert grad.dtype == torch.float32 and error(grad, other) <= TOLERANCE[dtype]


def check_fp16_sums(backend, rng, device="cpu"):
    """A sum beyond fp16 (65,504) in the head's gradient, brought back by the incoming 1/N."""
    n = 60
    x = torch.full((n, 16), 2000.0, device=device, dtype=torch.float16).requires_grad_()
    weight = torch.zeros(64, 16, device=device, dtype=torch.float16).requires_grad_()
    loss = linear_cross_entropy(
        x, weight, torch.zeros(n, dtype=torch.int64, device=device), backend=backend
    ).loss
    (loss / n).backward()
    assert float(weight.grad[0, 0]) == pytest.approx(-2000 * 63 / 64, rel=1e-3)  # fp16 rounds


def check_checkpoint(backend, rng, device="cpu"):
    """Recomputed in the backward pass, both ways: the same gradients."""
    x, weight, labels = make((30, 16, 70, 0, 0), rng, device=device)

    def term(x, weight):
        return linear_cross_entropy(x * 2, weight, labels, backend=backend, chunk=16).loss

    wanted = torch.autograd.grad(term(x, weight), (x, weight))
    for reentrant in (False, True):
        x.grad = weight.grad = None
        checkpoint(term, x, weight, use_reentrant=reentrant).backward()
        assert torch.equal(x.grad, wanted[0]) and torch.equal(weight.grad, wanted[1])


def check_operator(backend, rng, device="cpu"):
    """Schema, shapes without data, autograd and compilation in one graph."""
    x, weight, labels = make((20, 16, 70, 65, 0), rng, device=device)
    soft = torch.rand(20, 70, generator=rng).to(device)
    for targets, want_x, want_weight in ((soft, True, True), (None, False, True)):
        arguments = (
            x.detach().requires_grad_(want_x), weight, labels, targets, 65, 8, IGNORE, 0.1, 1.0,
            0.5, 2.0, torch.float32, backend, want_x, want_weight,
        )  # fmt: skip
        torch.library.opcheck(cross_entropy_op, arguments)

    def term(x, weight):
        sums = linear_cross_entropy(
            x * 2, weight, labels, columns=65, soft=soft, z_loss=0.1, backend=backend
        )
        return sums.loss / sums.count, sums.correct

    wanted, correct = term(x, weight)
    compiled, also = torch.compile(term, fullgraph=True, backend="aot_eager")(x, weight)
    assert torch.equal(compiled, wanted) and torch.equal(also, correct)
    for one, other in zip(
        torch.autograd.grad(wanted, (x, weight)),
        torch.autograd.grad(compiled, (x, weight)),
        strict=True,
    ):
        assert torch.equal(one, other)
    with torch.no_grad():
        assert torch.equal(
            torch.compile(term, fullgraph=True, backend="aot_eager")(x, weight)[0], wanted
        )


CHECKS = [
    check_fp32, check_half, check_soft, check_extremes, check_chunks, check_differences,
    check_wanted, check_views, check_autocast, check_fp16_sums, check_checkpoint, check_operator,
]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_torch_cross_entropy(check, rng):
    check("torch", rng)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_interpreted_triton_cross_entropy(check, interpreted):
    assert interpreted(__file__)[check.__name__] == ""


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the most memory that the CPU allocator has given out at once during a call."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def test_memory_does_not_grow_with_the_number_of_logits(rng):
    width, table, chunk = 8, 1024, 64

    def step(n: int, eager: bool, grad: bool = True) -> int:
        x, weight, labels = make((n, width, table, 0, 0), rng)

        def call():
            if eager:
                F.cross_entropy(F.linear(x, weight), labels, reduction="sum").backward()
            elif grad:
                linear_cross_entropy(x, weight, labels, chunk=chunk).loss.backward()
            else:
                with torch.no_grad():
                    linear_cross_entropy(x, weight, labels, chunk=chunk)

        call()  # what is allocated once is not counted
        x.grad = weight.grad = None
        return peak_bytes(call)

    logits = 4 * table  # bytes a position
    few, many = 512, 2048
    grown = (step(many, eager=True) - step(few, eager=True)) / (many - few)
    assert grown >= 2 * logits  # the counter sees eager's logits and their gradient
    grown = (step(many, eager=False) - step(few, eager=False)) / (many - few)
    # dx, its scaled copy, and a few numbers a position
    assert grown <= 4 * (2 * width + 32) < logits / 20
    # Table and probabilities of one chunk; what autograd saves of W's size; no gradient buffers.
    assert step(many, eager=False) <= 3 * chunk * logits + 4 * 4 * table * width + many * 300
    assert step(many, eager=False, grad=False) <= 3 * chunk * logits + many * 100


def test_a_gpu_and_a_cpu_cut_rows_by_their_memory():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [rows_of_chunk(v, cuda) for v in (640, 8320, 32_000, 1 << 40)] == [65_536, 8192, 2048, 1]
    assert [rows_of_chunk(v, cpu) for v in (64, 640, 8320, 128_000)] == [512, 512, 512, 32]


def test_the_first_of_equal_scores_is_found_as_argmax_finds_it(rng):
    for columns in (1, 100, 128, 512):
        scores = torch.randint(-3, 3, (50, columns), generator=rng).float()
        scores[5], scores[6] = float("inf"), -float("inf")
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(first_highest(scores.to(dtype)), scores.argmax(1))


@pytest.mark.slow
def test_compiled_by_inductor(rng):
    x, weight, labels = make((20, 16, 70, 65, 0), rng)

    def term(x, weight):
        return linear_cross_entropy(x * 2, weight, labels, columns=65, z_loss=0.1).loss / 7

    wanted = torch.autograd.grad(term(x, weight), (x, weight))
    found = torch.autograd.grad(torch.compile(term, fullgraph=True)(x, weight), (x, weight))
    for one, other in zip(wanted, found, strict=True):  # the same products; a fused scaling
        assert error(other, one) <= 1e-6


def test_there_is_no_second_derivative(rng):
    x, weight, labels = make((4, 8, 10, 0, 0), rng)
    loss = linear_cross_entropy(x, weight, labels).loss
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    assert not dx.requires_grad
    with pytest.raises(RuntimeError, match="out="):
        torch.autograd.grad(
            linear_cross_entropy(x, weight, labels).loss * x.sum(), x, create_graph=True
        )


def test_bad_arguments_are_named(monkeypatch):
    x, weight, labels = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"x \(2, 3\), weight \(5, 4\)"):
        linear_cross_entropy(x, torch.zeros(5, 4), labels)
    with pytest.raises(ValueError, match=r"labels \(1,\)"):
        linear_cross_entropy(x, weight, labels[:1])
    for columns in (0, 6):
        with pytest.raises(ValueError, match=f"{columns} columns of a table of 5"):
            linear_cross_entropy(x, weight, labels, columns=columns)
    with pytest.raises(ValueError, match=r"\(2, 4\): wanted \[2, 5 or more\]"):
        linear_cross_entropy(x, weight, labels, soft=torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"float32 and weight in torch\.bfloat16"):
        linear_cross_entropy(x, weight.bfloat16(), labels)
    with pytest.raises(ValueError, match=r"labels in torch\.int32 at temperature 1"):
        linear_cross_entropy(x, weight, labels.int())
    with pytest.raises(ValueError, match="temperature 0"):
        linear_cross_entropy(x, weight, labels, temperature=0.0)
    with pytest.raises(ValueError, match=r"'cuda'.*auto"):
        linear_cross_entropy(x, weight, labels, backend="cuda")
    monkeypatch.setattr("kernels.backend.has_triton", lambda: False)
    with pytest.raises(ValueError, match="take 'torch'"):
        linear_cross_entropy(x, weight, labels, backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_cross_entropy_on_a_gpu(check, backend, rng):
    check(backend, rng, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_whole_micro_batch_on_a_gpu(rng):
    """LVM-1B's head: several chunks, bit by bit the same twice, and the memory of one table."""
    x, weight, labels = make(
        (20_000, 2048, 8320, 8195, 0), rng, dtype=torch.bfloat16, device="cuda"
    )
    call = partial(linear_cross_entropy, columns=8195, z_loss=1e-4)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sums, grads = gradients(call, x, weight, labels)
    # table, dx twice, fp32 dW twice and its bf16 copy
    table, dx, dw = 8192 * 8320 * 2, 20_000 * 2048 * 2, 8320 * 2048 * 4
    assert torch.cuda.max_memory_allocated() - before <= table + 2 * dx + 3 * dw + (16 << 20)
    again, same = gradients(call, x, weight, labels)
    assert torch.equal(sums.loss, again.loss)
    assert all(torch.equal(a, b) for a, b in zip(grads, same, strict=True))
    exact, wanted = gradients(
        partial(linear_cross_entropy_reference, columns=8195, z_loss=1e-4), x, weight, labels
    )
    assert error(sums.loss, exact.loss) <= 1e-3
    for grad, other in zip(grads, wanted, strict=True):
        assert error(grad, other) <= TOLERANCE[torch.bfloat16]


if __name__ == "__main__":
    from interpreter import main

    main(CHECKS, "triton")
