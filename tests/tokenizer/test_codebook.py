"""The codebook in training: k-means start, moving averages, restart of codes out of use."""

import pytest
import torch
from torch.nn import functional as F

from tokenizer.codebook import Codebook, CodebookStats, kmeans, nearest, perplexity
from tokenizer.world import World


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clusters(*, k: int, width: int = 4, each: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (centres [k, width], points [k·each, width]) that lie close to their centres."""
    centres = 10 * torch.randn(k, width, generator=draws())
    points = centres.repeat_interleave(each, 0)
    return centres, points + 0.01 * torch.randn(points.shape, generator=draws(1))


def test_kmeans_finds_separate_clusters() -> None:
    centres, points = clusters(k=4)
    codebook = Codebook(16, 4, normalize=False)  # more codes than clusters: each gets some
    found = kmeans(points, codebook, generator=draws())
    distances = torch.cdist(centres, found).amin(1)
    assert distances.max() < 0.02  # the spread of a cluster
    assert torch.equal(found, kmeans(points, codebook, generator=draws()))


def test_kmeans_does_with_fewer_points_than_codes() -> None:
    points = torch.randn(5, 4, generator=draws())
    found = kmeans(points, Codebook(16, 4, normalize=False), generator=draws())
    assert found.shape == (16, 4) and torch.cdist(points, found).amin(1).max() < 1e-6


def test_normalized_kmeans_returns_unit_vectors() -> None:
    codebook = Codebook(8, 4, normalize=True)
    points = codebook.scaled(torch.randn(100, 4, generator=draws()))
    norms = kmeans(points, codebook, generator=draws()).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(8))


def test_start_counts_what_a_batch_will_choose() -> None:
    _, points = clusters(k=4)
    stats = CodebookStats(Codebook(16, 4, normalize=False))
    stats.start(points, batch=20, generator=draws())
    assert float(stats.counts.sum()) == pytest.approx(20)
    before = stats.codebook.embedding.weight.clone()
    stats.move()
    torch.testing.assert_close(stats.codebook.embedding.weight, before)


def test_moving_average_equals_that_of_vector_quantize_pytorch() -> None:
    from vector_quantize_pytorch import VectorQuantize

    points = torch.randn(256, 4, generator=draws())
    codebook = Codebook(8, 4, normalize=False)
    with torch.no_grad():
        codebook.embedding.weight.copy_(points[:8])
    oracle = VectorQuantize(
        dim=4, codebook_size=8, decay=0.9, eps=0.0, threshold_ema_dead_code=0
    ).train()
    oracle._codebook.embed.copy_(codebook.embedding.weight.detach()[None])
    oracle._codebook.embed_avg.copy_(codebook.embedding.weight.detach()[None])
    oracle._codebook.cluster_size.fill_(1.0)
    stats = CodebookStats(codebook, decay=0.9)
    stats.counts.fill_(1.0)
    stats.sums.copy_(codebook.embedding.weight.detach())
    for _ in range(3):
        stats.observe(points, nearest(points, codebook.vectors()), World())
        stats.move()
        oracle(points[None])
    # Ten additions of fp32 numbers of order 10 in another order.
    torch.testing.assert_close(codebook.vectors(), oracle._codebook.embed[0], atol=1e-5, rtol=1e-5)


def test_code_that_nothing_chooses_stays_until_it_is_restarted() -> None:
    points = F.normalize(torch.randn(200, 4, generator=draws()), dim=-1)
    codebook = Codebook(8, 4, normalize=True)
    stats = CodebookStats(codebook, decay=0.5)
    stats.start(points, batch=200, generator=draws())
    far = 7
    kept = codebook.vectors()[far].clone()
    others = torch.tensor([i for i in range(8) if i != far])
    for _ in range(12):
        codes = others[nearest(points, codebook.vectors()[others])]
        stats.observe(points, codes, World())
        stats.move()
    torch.testing.assert_close(codebook.vectors()[far], kept)
    assert stats.restart(points, generator=draws()) == 1
    fresh = codebook.vectors()[far]
    assert torch.cdist(fresh[None], points).min() < 1e-6  # it is now one of the latents
    stats.observe(points, nearest(points, codebook.vectors()), World())
    assert stats.counts[far] > 0.4  # and is chosen, by that latent at least: 0.5 × 1
    assert stats.restart(points, generator=draws()) in (0, 1)


def test_restart_revives_a_collapsed_codebook() -> None:
    points = torch.randn(512, 4, generator=draws())
    codebook = Codebook(64, 4, normalize=False)  # fresh: all vectors near 0
    with torch.no_grad():
        codebook.embedding.weight[1:] = 100.0  # and all but one out of reach
    stats = CodebookStats(codebook, decay=0.9)
    used = []
    for step in range(30):
        codes = nearest(points, codebook.vectors())
        used.append(len(codes.unique()))
        stats.observe(points, codes, World())
        stats.move()
        stats.restart(points, generator=draws(step))
    assert used[0] == 1 and used[-1] > 55


@pytest.mark.parametrize(
    ("counts", "expected"), [([5, 5, 5, 5], 4.0), ([9, 0, 0], 1.0), ([1, 1, 0, 0], 2.0)]
)
def test_perplexity_counts_equally_used_codes(counts: list[int], expected: float) -> None:
    assert perplexity(torch.tensor(counts)) == pytest.approx(expected)
