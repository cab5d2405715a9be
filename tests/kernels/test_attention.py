"""Every attention backend against attention written out in float64; our kernels interpreted.

`python tests/kernels/test_attention.py` with TRITON_INTERPRET=1 is the process that interprets.
"""

import os
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from kernels.attention import (
    attention,
    attention_op,
    attention_reference,
    choose,
    measured,
    resolve,
)
from kernels.mask import Mask, densify, is_exact

# Relative error (norm of the difference over norm of the reference) that a type allows; what was
# measured is 2e-7, 3e-4 and 3e-3. bf16 keeps 8 bits: inputs of products are rounded by up to 2^-9.
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def draw(rng, *, heads=2, groups=2, queries=100, keys=None, dim=32, dtype=torch.float32, rows=2):
    """q, k, v as a model makes them: heads joined in memory, turned into views."""

    def one(n, t):
        x = torch.randn(rows, t, n, dim, generator=rng).to(dtype)
        return x.transpose(1, 2)

    keys = queries if keys is None else keys
    return one(heads, queries), one(groups, keys), one(groups, keys)


def masks(length, device="cpu"):
    """Every kind of mask; rows differ where the form lets them."""
    index = torch.arange(length, dtype=torch.int32, device=device).expand(2, length)
    zero = torch.zeros_like(index)
    cut, late = (index >= 70).int() * 70, (index >= 63).int() * 63
    packed = torch.stack([cut[0], late[0]])
    aligned = index // 128 * 128
    middle = (aligned + 40).clamp(max=length)
    prefix = torch.tensor([[37], [64]], dtype=torch.int32, device=device).clamp(max=length)
    ones = torch.rand(2, length, length, generator=torch.Generator().manual_seed(1)) < 0.3
    return {
        "causal": Mask(causal=True),
        "full": Mask.full(),
        "packed": Mask.interval(packed, index + 1),
        "single positions": Mask.interval(index, index + 1),
        "prefix": Mask.interval(zero, (index + 1).maximum(prefix)),
        "packed prefix": Mask.interval(cut, (index + 1).maximum((cut + 20).clamp(max=length))),
        "images": Mask.interval(zero, (index // 48 * 48 + 48).clamp(max=length)),
        "images of documents": Mask.interval(cut, (index // 48 * 48 + 48).clamp(max=length)),
        "exact": Mask.interval(aligned, index + 1, exact=True),
        "exact prefix": Mask.interval(aligned, (index + 1).maximum(middle), exact=True),
        "some read nothing": Mask.interval(cut, torch.where(index % 5 == 0, cut, index + 1)),
        "dense": Mask(dense=ones.to(device) | torch.eye(length, dtype=torch.bool, device=device)),
    }


INTERVALS = [name for name in masks(4) if name != "dense"]


def error(got, want):
    """The relative error of a tensor.

    Where one key is read alone the gradients of q and k are zero, the difference of terms of order
    one that cancel: there the error is over entries of a tenth.
    """
    assert got.isfinite().all()
    size = want.double().norm().clamp(min=0.1 * want.numel() ** 0.5)
    return float((got.double() - want.double()).norm() / size)


def gradients(q, k, v, mask, backend, do):
    """The output and the gradients of q, k and v, for the gradient `do` of the output."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    function = attention_reference if backend == "reference" else attention
    o = function(q, k, v, mask, **({} if backend == "reference" else {"backend": backend}))
    return o.detach(), *torch.autograd.grad(o, (q, k, v), do)


def compare(q, k, v, mask, backend="triton", bound=None):
    """Hold outputs and gradients of a backend to the reference; returns the errors."""
    do = torch.randn(q.shape, generator=torch.Generator().manual_seed(5)).to(q.dtype).to(q.device)
    want = gradients(*(x.double() for x in (q, k, v)), mask, "reference", do.double())
    got = gradients(q, k, v, mask, backend, do)
    errors = [error(a, b) for a, b in zip(got, want, strict=True)]
    assert max(errors) <= (bound or BOUND[q.dtype]), errors
    return errors


@contextmanager
def tiles(bm, bn, *, tma=False):
    """Interpret with blocks of bm queries and bn keys, through tensor maps or pointers."""
    from kernels import attention_triton as module

    one = module.Config(bm, bn, 4, 1)
    with (
        patch.object(module, "INTERPRETED", module.Configs(one, one, one)),
        patch.object(module, "uses_tma", lambda capability, *tensors: tma),
    ):
        yield


def check_every_mask(rng):
    for queries, (bm, bn), tma in ((150, (64, 32), False), (150, (32, 64), True)):
        q, k, v = draw(rng, queries=queries, dim=16, heads=2, groups=1)
        for name in INTERVALS:
            with tiles(bm, bn, tma=tma):
                compare(q, k, v, masks(queries)[name])


def check_lengths(rng):
    for length in (1, 31, 32, 33, 64, 65, 128, 129):
        for name in ("causal", "packed", "exact prefix"):
            with tiles(32, 32):
                compare(*draw(rng, queries=length, dim=16), masks(length)[name])


def check_head_dimensions_and_groups(rng):
    shapes = ((32, 2, 2), (64, 4, 2), (80, 4, 1), (96, 2, 2), (100, 2, 1), (128, 2, 1), (24, 3, 1))
    for dim, heads, groups in shapes:
        for tma in (False, True):
            q, k, v = draw(rng, queries=70, dim=dim, heads=heads, groups=groups, rows=2)
            with tiles(64, 32, tma=tma):
                compare(q, k, v, masks(70)["packed prefix"])


def check_shipped_tiles(rng):
    """Blocks of the sizes that GPUs run, in an order of steps that only they have."""
    from kernels import attention_triton as module

    for configs in (module.HOPPER, module.HOPPER_NARROW, module.AMPERE, module.SINGLE):
        with patch.object(module, "INTERPRETED", configs):
            for name in ("packed", "exact prefix", "causal"):
                compare(*draw(rng, queries=300, dim=16, heads=1, groups=1), masks(300)[name])


def check_queries_and_keys_may_differ_in_number(rng):
    for queries, keys in ((3, 140), (140, 3), (64, 96)):
        with tiles(32, 32):
            compare(*draw(rng, queries=queries, keys=keys), Mask.full())
    # a prompt that goes on behind a cache: query i stands at 77 + i
    q, k, v = draw(rng, queries=40, keys=117)
    hi = torch.arange(78, 118, dtype=torch.int32).expand(2, 40)
    with tiles(32, 32):
        compare(q, k, v, Mask.interval(torch.zeros_like(hi), hi))


def check_fp16(rng):
    for name in ("packed", "images", "some read nothing"):
        compare(*draw(rng, dim=64, dtype=torch.float16), masks(100)[name])


def check_bf16(rng):
    """To the bound, and no worse than torch's own kernel in bf16."""
    for name, dim in (("packed", 128), ("prefix", 64), ("causal", 32)):
        q, k, v = draw(rng, queries=140, dim=dim, dtype=torch.bfloat16)
        mask = masks(140)[name]
        ours = compare(q, k, v, mask)
        theirs = compare(q, k, v, mask, backend="sdpa")
        # Its backward runs in fp32 on a CPU (see `sdpa`), so the outputs alone are told apart;
        # `test_bf16_is_as_exact_as_sdpa_on_a_gpu` compares gradients too.
        assert ours[0] <= 1.5 * theirs[0]


def check_scale(rng):
    q, k, v = draw(rng)
    for scale in (0.03, 1.0):
        want = attention_reference(q.double(), k.double(), v.double(), Mask.full(), scale=scale)
        got = attention(q, k, v, Mask.full(), scale=scale, backend="triton")
        assert error(got, want) <= BOUND[torch.float32]


@settings(max_examples=200, deadline=None, derandomize=os.environ.get("CI") == "true")
@given(data=st.data())
def random_intervals(data):
    queries, keys = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 80))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    ends = torch.randint(0, keys + 1, (2, 1, queries), generator=rng).int()
    lo, hi = ends.amin(0), ends.amax(0)
    if data.draw(st.booleans()):  # as a packed row has them: neither end falls
        lo, hi = lo.sort(1).values, hi.sort(1).values
    bm, bn = data.draw(st.sampled_from([(32, 32), (64, 32), (32, 64)]))
    with tiles(bm, bn, tma=data.draw(st.booleans())):
        q, k, v = draw(rng, queries=queries, keys=keys, heads=1, groups=1, dim=16, rows=1)
        compare(q, k, v, Mask.interval(lo, hi))


def check_random_intervals(rng):
    random_intervals()


def check_rows_without_keys(rng):
    """Zeros out, zeros back, whatever stands in them."""
    q, k, v = draw(rng)
    mask = masks(100)["some read nothing"]
    got = gradients(q, k, v, mask, "triton", torch.randn(q.shape, generator=rng))
    assert torch.equal(got[0][:, :, ::5], torch.zeros_like(got[0][:, :, ::5]))
    assert torch.equal(got[1][:, :, ::5], torch.zeros_like(got[1][:, :, ::5]))
    nothing = torch.zeros(2, 100, dtype=torch.int32)
    for x in gradients(q, k, v, Mask.interval(nothing, nothing), "triton", q):
        assert torch.equal(x, torch.zeros_like(x))


def check_extreme_scores(rng):
    """Scores of ±1000 neither overflow nor lose the largest."""
    q, k, v = draw(rng, dim=32)
    # A score of 1000 in fp32 is exact to 1000 · 2^-24 = 6e-5, and its exponential relatively so.
    compare(q * 40, k * 40, v, masks(100)["packed"], bound=1e-3)


def check_the_same_bits_again(rng):
    q, k, v = draw(rng, heads=4, groups=2)
    do = torch.randn(q.shape, generator=rng)
    first, second = (gradients(q, k, v, masks(100)["packed"], "triton", do) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def check_rows_and_documents_alone_give_the_same(rng):
    """Neither the other rows of a batch nor the other documents of a row change a number."""
    q, k, v = draw(rng, queries=96)
    index = torch.arange(96, dtype=torch.int32).expand(2, 96)
    packed = Mask.interval((index >= 64).int() * 64, index + 1)
    with tiles(32, 32):
        together = attention(q, k, v, packed, backend="triton")
        for row in range(2):
            for piece in (slice(0, 64), slice(64, 96)):
                alone = (x[row : row + 1, :, piece] for x in (q, k, v))
                one = attention(*alone, Mask(causal=True), backend="triton")
                assert torch.equal(one, together[row : row + 1, :, piece])


def check_exact_is_a_promise_that_changes_no_number(rng):
    q, k, v = draw(rng, queries=300)
    do = torch.randn(q.shape, generator=rng)
    for name in ("exact", "exact prefix"):
        mask = masks(300)[name]
        assert bool(is_exact(mask.lo, mask.hi))
        fast = gradients(q, k, v, mask, "triton", do)
        slow = gradients(q, k, v, replace(mask, exact=False), "triton", do)
        for a, b in zip(fast, slow, strict=True):
            assert error(a, b) <= 1e-6  # the same blocks in another order


def check_strides(rng):
    """Channels apart, heads side by side, cut from wider rows; a gradient without memory."""
    mask = masks(64)["packed"]
    q, k, v = draw(rng, queries=64)
    apart = tuple(x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    wide = torch.randn(2, 64, 3 * 64, generator=rng)
    cut = tuple(x.unflatten(2, (2, 32)).transpose(1, 2) for x in wide.split(64, 2))
    for tensors in (apart, cut, tuple(x.contiguous() for x in (q, k, v))):
        compare(*tensors, mask)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    attention(q, k, v, mask, backend="triton").sum().backward()  # a gradient of strides 0
    want = gradients(q, k, v, mask, "reference", torch.ones(q.shape))
    assert max(error(x.grad, w) for x, w in zip((q, k, v), want[1:], strict=True)) <= 1e-5


def check_finite_differences(rng):
    """The slope along a direction, from outputs alone."""
    q, k, v = draw(rng, queries=70, dim=16)
    mask, way = masks(70)["packed prefix"], [torch.randn(x.shape, generator=rng) for x in (q, k, v)]
    do = torch.randn(q.shape, generator=rng)
    eps = 1e-2

    def loss(sign):
        moved = (x + sign * eps * w for x, w in zip((q, k, v), way, strict=True))
        return float((attention(*moved, mask, backend="triton") * do).double().sum())

    grads = gradients(q, k, v, mask, "triton", do)[1:]
    slope = sum(float((g * w).double().sum()) for g, w in zip(grads, way, strict=True))
    # The third derivative times eps²/6 is left over.
    assert abs((loss(1) - loss(-1)) / (2 * eps) - slope) <= 1e-2 * abs(slope)


def check_operator(rng):
    """Schema, shapes without data, one compiled graph, recomputation, no gradient."""
    q, k, v = (x.requires_grad_() for x in draw(rng, queries=40, dim=16))
    full = resolve(masks(40)["packed"], queries=40, keys=40, device=q.device, backend="triton")
    tables = (full.lo, full.hi, full.by_query, full.by_key)
    torch.library.opcheck(attention_op, (q, k, v, *tables, False, False, 0.25))
    torch.library.opcheck(attention_op, (q, k, v, None, None, None, None, True, False, 0.25))
    do = torch.randn(q.shape, generator=rng)
    want = torch.autograd.grad(attention(q, k, v, full), (q, k, v), do)

    def body(q, k, v):
        return attention(q * 1.0, k, v, full)

    compiled = torch.compile(body, fullgraph=True, backend="aot_eager")
    again = torch.autograd.grad(compiled(q, k, v), (q, k, v), do)
    recomputed = torch.autograd.grad(checkpoint(body, q, k, v, use_reentrant=False), (q, k, v), do)
    for a, b, c in zip(want, again, recomputed, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    with torch.no_grad():
        assert torch.equal(attention(q, k, v, full), body(q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, k, v, full).dtype == torch.float32


def check_split_heads(rng):
    """What a rank of tensor parallelism computes: half of the heads, with their keys."""
    q, k, v = draw(rng, heads=4, groups=2)
    do, mask = torch.randn(q.shape, generator=rng), masks(100)["packed"]
    want = gradients(q, k, v, mask, "triton", do)
    for rank in range(2):
        part = tuple(x.chunk(2, 1)[rank] for x in (q, k, v))
        got = gradients(*part, mask, "triton", do.chunk(2, 1)[rank])
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b.chunk(2, 1)[rank])


def check_a_trunk(rng):
    """Loss and gradients of a whole small trunk equal those with SDPA, compiled or not."""
    from lvm.config import ModelConfig
    from lvm.mask import attention_mask
    from lvm.model import build

    config = ModelConfig(width=32, layers=2, heads=4, kv_heads=2, ffn=48, vocab_size=40)
    model = build(config, seed=0)
    ids = torch.randint(0, 40, (2, 128), generator=rng)
    doc = (torch.arange(128) >= 48).int().expand(2, 128)
    place = torch.arange(128, dtype=torch.int32).expand(2, 128)
    found = {}
    for backend in ("sdpa", "triton"):
        mask = attention_mask(doc, place, backend=backend)
        model.zero_grad()
        loss = torch.nn.functional.cross_entropy(
            model(ids, pos=place, mask=mask).flatten(0, 1), ids.roll(-1, 1).flatten()
        )
        loss.backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        found[backend] = loss.detach(), grads
    (a, x), (b, y) = found["sdpa"], found["triton"]
    assert abs(float(a - b)) <= 1e-6 and error(y, x) <= 1e-5
    block, mask = model.layers[0], attention_mask(doc, place, backend="triton")
    from lvm.model import rotary

    angles = rotary(place, dim=config.dim, theta=1e4)
    x = torch.randn(2, 128, 32, generator=rng)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert error(compiled(x, angles, mask), block(x, angles, mask)) <= 1e-6


def check_what_cannot_be_is_named(rng):
    with pytest.raises(ValueError, match=r"160 channels.*up to 128"):
        attention(*draw(rng, dim=160, queries=4), Mask.full(), backend="triton")
    for scale in (0.0, -1.0):
        with pytest.raises(ValueError, match="more than 0"):
            attention(*draw(rng, queries=4), Mask.full(), scale=scale, backend="triton")
    q, k, v = draw(rng, queries=4)
    for wrong in ((q, k, v.half()), (q.double(), k.double(), v.double())):
        with pytest.raises(ValueError, match=r"by triton: wanted one of .*float32"):
            attention(*wrong, Mask.full(), backend="triton")
    with pytest.raises(ValueError, match="islands"):
        attention(*draw(rng, queries=4), masks(4)["dense"], backend="triton")


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_interpreted_triton(check, interpreted):
    assert interpreted(__file__)[check.__name__] == ""


@pytest.mark.parametrize("name", list(masks(4)))
@pytest.mark.parametrize(("heads", "groups", "dim"), [(4, 4, 32), (4, 2, 24), (3, 1, 100)])
def test_sdpa_equals_the_reference(name, heads, groups, dim, rng):
    q, k, v = draw(rng, heads=heads, groups=groups, dim=dim, queries=140)
    compare(q, k, v, masks(140)[name], backend="sdpa")


@pytest.mark.parametrize("name", list(masks(4)))
@pytest.mark.parametrize("groups", [4, 2])
def test_flex_equals_the_reference(name, groups, rng):
    q, k, v = draw(rng, heads=4, groups=groups, queries=140)  # it has no backward on a CPU
    mask = masks(140)[name]
    got = attention(q, k, v, mask, backend="flex")
    assert error(got, attention_reference(q, k, v, mask)) <= BOUND[torch.float32]


def test_bf16_of_sdpa_stays_in_its_bound(rng):
    compare(*draw(rng, dtype=torch.bfloat16), masks(100)["packed"], backend="sdpa")


def test_a_mask_is_resolved_once_and_names_its_backend(rng):
    q, k, v = draw(rng)
    mask = masks(100)["packed"]
    resolved = resolve(mask, queries=100, keys=100, device=q.device)
    assert (resolved.backend, mask.backend) == ("sdpa", None)
    assert densify(resolved, 100) is resolved.dense
    with patch("kernels.attention.resolve", side_effect=AssertionError("resolved again")):
        attention(q, k, v, resolved)


def test_an_unknown_backend_is_named(rng):
    with pytest.raises(ValueError, match=r"'cuda'.*auto"):
        attention(*draw(rng), Mask.full(), backend="cuda")
    with pytest.raises(ValueError, match="wanted cuda"):
        attention(*draw(rng), Mask.full(), backend="triton")
    with (
        patch("kernels.attention.has_triton", return_value=False),
        pytest.raises(ValueError, match="does not import"),
    ):
        attention(*draw(rng), Mask.full(), backend="triton")


def test_auto_takes_what_was_measured(monkeypatch):
    table = {"causal": "flex", "interval": "triton"}
    monkeypatch.setattr("kernels.attention.measured", lambda arch: table if arch == "sm_90" else {})
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    cuda, kinds = torch.device("cuda"), masks(4)
    for triton, interval in ((True, "triton"), (False, "sdpa")):
        monkeypatch.setattr("kernels.attention.has_triton", lambda triton=triton: triton)
        found = [choose("auto", kinds[name], cuda) for name in ("causal", "full", "packed")]
        assert found == ["flex", "sdpa", interval]
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    assert choose("auto", kinds["packed"], cuda) == "sdpa"
    assert choose("auto", kinds["packed"], torch.device("cpu")) == "sdpa"


def test_the_table_of_backends_can_be_read():
    for kinds in (measured("sm_90"), measured("sm_80")):
        backends = {kind: kinds[kind] for kind in kinds if kind != "measured"}
        assert set(backends.values()) <= {"triton", "flex", "sdpa"}
        assert bool(backends) == ("measured" in kinds)  # a choice names who made it


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("backend", ["triton", "flex", "sdpa"])
@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize("name", list(masks(4)))
def test_backends_equal_the_reference_on_a_gpu(backend, dtype, name, rng):
    if backend == "triton" and name == "dense":
        pytest.skip("the kernels read intervals")
    for queries, dim, groups in ((300, 128, 2), (1000, 64, 1), (300, 100, 2), (129, 80, 1)):
        q, k, v = (
            x.cuda() for x in draw(rng, queries=queries, dim=dim, groups=groups, dtype=dtype)
        )
        compare(q, k, v, masks(queries, "cuda")[name], backend=backend)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("name", ["causal", "packed", "exact", "images"])
def test_bf16_is_as_exact_as_sdpa_on_a_gpu(name, rng):
    q, k, v = (x.cuda() for x in draw(rng, queries=4096, dim=128, dtype=torch.bfloat16, rows=2))
    mask = masks(4096, "cuda")[name]
    ours, theirs = (compare(q, k, v, mask, backend=b) for b in ("triton", "sdpa"))
    assert all(a <= 1.5 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


@pytest.mark.gpu
@GPU
def test_the_same_bits_again_on_a_gpu(rng):
    q, k, v = (x.cuda() for x in draw(rng, queries=4096, dim=128, heads=4, dtype=torch.bfloat16))
    do = torch.randn(q.shape, generator=rng).bfloat16().cuda()
    mask = masks(4096, "cuda")["packed"]
    first, *others = (gradients(q, k, v, mask, "triton", do) for _ in range(5))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


if __name__ == "__main__":
    from interpreter import main

    main(CHECKS)
