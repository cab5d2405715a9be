"""Code search: every backend against float64, and ties."""

from unittest.mock import patch

import pytest
import torch
from torch.nn import functional as F

from kernels.vq_lookup import (
    TABLE_ENTRIES,
    first_lowest,
    lookup_op,
    vq_lookup,
    vq_lookup_reference,
)

# N points, K codes, D width. Widths of either kernel (narrow to 8, wide above), one chunk and many,
# powers of two and not; N and K at, below and over a tile of 64; one image of many stretches.
SHAPES = [
    (0, 5, 4), (1, 1, 1), (5, 3, 4), (64, 64, 8), (65, 65, 8), (70, 333, 7), (256, 130, 3),
    (1, 700, 12), (33, 64, 16), (65, 129, 64), (100, 200, 100), (64, 127, 96), (40, 100, 256),
    (9, 70, 300), (4000, 150, 2),
]  # fmt: skip


def whole(shape, rng):
    """Small integers: every sum is exact in fp32 in any order, and equal distances abound."""
    n, k, width = shape
    return (
        torch.randint(-2, 3, (n, width), generator=rng).float(),
        torch.randint(-2, 3, (k, width), generator=rng).float(),
    )


def check_equal(backend, rng, device="cpu"):
    for shape in SHAPES:
        points, codes = (x.to(device) for x in whole(shape, rng))
        want = vq_lookup_reference(points, codes)
        assert torch.equal(vq_lookup(points, codes, backend=backend), want), shape


def check_duplicates(backend, rng, device="cpu"):
    """Each code stands three times, in other tiles and other stretches; the first is chosen."""
    for width in (8, 20):
        codes = torch.randn(150, width, generator=rng).to(device)
        points = codes[torch.randperm(150, generator=rng)[:90].to(device)]
        thrice = codes.repeat(3, 1)
        found = vq_lookup(points, thrice, backend=backend)
        assert torch.equal(thrice[found], points) and int(found.max()) < 150


def check_rounding(backend, rng, device="cpu", shape=(200, 300)):
    """Random and nearly tied codes, plain and normalised: none is closer but for rounding."""
    n, k = shape
    for width in (4, 8, 12, 64, 100, 256):
        points = torch.randn(n, width, generator=rng).to(device)
        codes = torch.randn(k // 2, width, generator=rng).to(device)
        codes = torch.cat([codes, codes * (1 + 2**-22)])  # pairs a few units in the last place off
        for scaled in (False, True):
            p, c = (F.normalize(x, dim=-1) if scaled else x for x in (points, codes))
            chosen = c[vq_lookup(p, c, backend=backend)].double()
            got = (p.double() - chosen).square().sum(1)
            best = torch.cat([torch.cdist(x[None], c.double()).amin(1) for x in p.double()]) ** 2
            # fp32 rounds the terms of |c|² - 2 p·c, not the distance. Random signs of D roundings
            # stay far below their worst sum: 1e-6 of |p|² + |c|² is 17 times 2^-24.
            size = p.double().square().sum(1) + chosen.square().sum(1)
            assert bool((got - best <= 1e-6 * size).all()), (width, scaled)


def check_forms(backend, rng, device="cpu"):
    """Strides, low precision, gradients, autocast and broken points."""
    points, codes = (x.to(device) for x in whole((70, 130, 12), rng))
    want = vq_lookup_reference(points, codes)
    strided = points.T.contiguous().T, codes.repeat_interleave(2, 0)[::2]
    assert torch.equal(vq_lookup(*strided, backend=backend), want)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(vq_lookup(points.to(dtype), codes.to(dtype), backend=backend), want)
    with torch.autocast(device, torch.bfloat16):
        fine = codes + 2**-12 * torch.arange(130, device=device)[:, None]  # bf16 sees none of it
        found = vq_lookup(fine.clone().requires_grad_(), fine.requires_grad_(), backend=backend)
    assert torch.equal(found, vq_lookup_reference(fine, fine)) and not found.requires_grad
    points[3], points[5, 1] = float("nan"), float("nan")
    broken = vq_lookup(points, codes, backend=backend)
    assert broken[[3, 5]].tolist() == [0, 0]
    keep = ~points.isnan().any(1)
    assert torch.equal(broken[keep], want[keep])


def check_alone(backend, rng, device="cpu"):
    """What a point gets depends on the point: not on N, which sets how the codes are cut."""
    for width in (8, 64):
        points = torch.randn(300, width, generator=rng).to(device)
        codes = torch.randn(200, width, generator=rng).to(device)
        together = vq_lookup(points, codes, backend=backend)
        again = torch.cat([vq_lookup(p, codes, backend=backend) for p in points[:130].split(65)])
        assert torch.equal(together[:130], again)


def check_operator(backend, rng, device="cpu"):
    """Schema, shapes without data, and compilation in one graph."""
    points, codes = (x.to(device) for x in whole((20, 77, 8), rng))
    torch.library.opcheck(lookup_op, (points, codes, backend))
    compiled = torch.compile(
        lambda p, c: vq_lookup(p * 2, c, backend=backend) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(points, codes), vq_lookup_reference(points * 2, codes) + 1)


def check_one_stretch(backend, rng, device="cpu"):
    """The same where the codes are not cut and one program walks over all tiles: few codes are."""
    from kernels import vq_lookup_triton

    with patch.object(vq_lookup_triton, "PROGRAMS", 0):
        check_equal(backend, rng, device)
        check_duplicates(backend, rng, device)


CHECKS = [
    check_equal, check_duplicates, check_rounding, check_forms, check_alone, check_operator,
]  # fmt: skip
KERNEL_CHECKS = [*CHECKS, check_one_stretch]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_torch_search(check, rng):
    check("torch", rng)


@pytest.mark.parametrize("check", KERNEL_CHECKS, ids=lambda check: check.__name__)
def test_interpreted_triton_search(check, interpreted):
    assert interpreted(__file__)[check.__name__] == ""


def test_the_first_of_equal_scores_is_found_as_argmin_finds_it(rng):
    for codes in (1, 100, 128, 512):
        scores = torch.randint(-3, 3, (50, codes), generator=rng).float()
        scores[3, codes // 2] = scores[4, -1] = float("nan")
        scores[5], scores[6], scores[7] = float("nan"), float("inf"), -float("inf")
        assert torch.equal(first_lowest(scores), scores.argmin(1))


def test_tables_of_any_size_give_the_same_codes(rng, monkeypatch):
    points = torch.randn(500, 8, generator=rng)
    codes = F.normalize(torch.randn(256, 8, generator=rng), dim=-1)
    whole_table = torch.addmm(codes.square().sum(1), points, codes.T, alpha=-2).argmin(1)
    for entries in (1, 256 * 7, 1 << 24):
        monkeypatch.setitem(TABLE_ENTRIES, "cpu", entries)
        assert torch.equal(vq_lookup(points, codes), whole_table)


def test_bad_arguments_are_named(monkeypatch):
    points = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"\(2, 3\) in codes \(4, 5\)"):
        vq_lookup(points, torch.zeros(4, 5))
    with pytest.raises(ValueError, match="K at least 1"):
        vq_lookup(points, torch.zeros(0, 3))
    with pytest.raises(ValueError, match=r"'cuda'.*auto"):
        vq_lookup(points, points, backend="cuda")
    monkeypatch.setattr("kernels.backend.has_triton", lambda: False)
    with pytest.raises(ValueError, match="take 'torch'"):
        vq_lookup(points, points, backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("check", KERNEL_CHECKS, ids=lambda check: check.__name__)
def test_triton_search_on_a_gpu(check, rng):
    check("triton", rng, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_torch_search_on_a_gpu(check, rng):
    check("torch", rng, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("codes", "width"), [(8192, 64), (16384, 8), (1024, 256)])
def test_codebooks_of_known_tokenizers_on_a_gpu(codes, width, rng):
    for n in (256, 4096):
        points, table = (
            torch.randn(count, width, generator=rng).cuda() for count in (n, codes)
        )  # fmt: skip
        for p, c in [(points, table), (F.normalize(points, dim=-1), F.normalize(table, dim=-1))]:
            first = vq_lookup(p, c, backend="triton")
            assert all(torch.equal(first, vq_lookup(p, c, backend="triton")) for _ in range(5))
            distances = torch.cdist(p.double(), c.double()).square()
            short = distances.gather(1, first[:, None])[:, 0] - distances.amin(1)
            size = p.double().square().sum(1) + c[first].double().square().sum(1)
            assert bool((short <= 1e-6 * size).all())  # as in check_rounding


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("width", [8, 256])
def test_offsets_past_32_bits_on_a_gpu(width):
    count = (1 << 31) // width + 100
    if torch.cuda.mem_get_info()[0] < 24 << 30:  # codes and their squares and, if narrow, transpose
        pytest.skip("needs 24 GiB of free GPU memory")
    codes = torch.zeros(count, width, device="cuda")
    codes[-1] = 1.0
    points = torch.stack([torch.zeros(width), torch.ones(width)]).cuda()
    assert vq_lookup(points, codes, backend="triton").tolist() == [0, count - 1]


if __name__ == "__main__":
    from interpreter import main

    main(KERNEL_CHECKS, "triton")
