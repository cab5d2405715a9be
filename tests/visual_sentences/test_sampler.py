"""The order of training data: a bijection, exact over any ranks, with the shares asked for."""

from collections import Counter

import numpy as np
import pytest

from tokenizer.cli import InputError
from visual_sentences.mixture import Mixture, Share
from visual_sentences.sampler import key_of, permute

SHARES = [
    Share(name="large", rows=101),
    Share(name="small", rows=7, repeat=2.5),
    Share(name="weighted", rows=40, weight=0.25),
    Share(name="empty", rows=0),
]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1000, 1024, 1025, 65537])
def test_a_shuffle_is_a_bijection(n: int) -> None:
    shuffled = permute(np.arange(n), n, key_of(7, n))
    assert np.array_equal(np.sort(shuffled), np.arange(n))


def test_a_shuffle_reaches_past_any_array() -> None:
    n = 2**40 + 7
    places = np.arange(n - 1000, n)
    shuffled = permute(places, n, key_of(1))
    assert len(set(shuffled.tolist())) == 1000
    assert shuffled.min() >= 0 and shuffled.max() < n


def test_a_shuffle_looks_random() -> None:
    shuffled = permute(np.arange(100_000), 100_000, key_of(3)).astype(float)
    lag = np.corrcoef(shuffled[:-1], shuffled[1:])[0, 1]
    assert abs(lag) < 0.02  # a true permutation of this length: 0.003 standard deviation
    other = permute(np.arange(100_000), 100_000, key_of(4)).astype(float)
    assert abs(np.corrcoef(shuffled, other)[0, 1]) < 0.02


def test_shuffles_of_different_sizes_and_keys_can_be_asked_for_together() -> None:
    sizes = np.array([10, 1000, 3, 77])
    keys = np.array([key_of(i) for i in range(4)], np.uint64)
    places = np.array([4, 500, 2, 76])
    together = permute(places, sizes, keys)
    alone = [permute(places[i : i + 1], int(sizes[i]), keys[i : i + 1])[0] for i in range(4)]
    assert together.tolist() == alone


def draws(mixture: Mixture, samples: np.ndarray) -> list[tuple[int, int]]:
    source, row = mixture.rows(samples)
    return list(zip(source.tolist(), row.tolist(), strict=True))


def test_any_number_of_ranks_goes_on_where_others_stopped() -> None:
    """4 ranks, then 2, then 3, over the edge of virtual epochs: the order of one rank."""
    mixture, batch = Mixture(SHARES, seed=5), 12
    assert 300 > mixture.slots > 36, "the walk below must cross an epoch edge inside a phase"
    wanted = draws(mixture, np.arange(batch * 40))
    found: list[tuple[int, int]] = []
    for world, steps in ((4, 14), (2, 13), (3, 13)):
        resumed = Mixture(SHARES, seed=5)  # nothing but the number of samples goes over
        for _ in range(steps):
            used, local = len(found), batch // world
            for rank in range(world):
                found += draws(resumed, used + rank * local + np.arange(local))
    assert found == wanted


def test_one_sample_costs_no_walk_through_those_before() -> None:
    mixture = Mixture(SHARES, seed=5)
    many = draws(mixture, np.arange(5000))
    assert [draws(mixture, np.array([i]))[0] for i in (0, 4999, 1234)] == [
        many[i] for i in (0, 4999, 1234)
    ]
    far = 10**15
    assert draws(mixture, np.array([far])) == draws(Mixture(SHARES, seed=5), np.array([far]))


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 32])
def test_rows_of_a_source_are_used_equally_often(epochs: int) -> None:
    """Floor or ceiling of the mean, after any number of virtual epochs."""
    mixture = Mixture(SHARES, seed=1)
    uses = Counter(draws(mixture, np.arange(epochs * mixture.slots)))
    for number, share in enumerate(SHARES):
        counts = [uses[number, row] for row in range(share.rows)]
        total = epochs * mixture.counts()[share.name]
        assert sum(counts) == total
        if share.rows:
            assert set(counts) <= {total // share.rows, -(-total // share.rows)}


def test_a_virtual_epoch_holds_the_shares() -> None:
    counts = Mixture(SHARES, seed=0).counts()
    # 101 + 2.5 × 7 = 118.5 rows are three quarters of 158, so the weighted source has 39.5; of the
    # two halves left over, the first in order is rounded up.
    assert counts == {"large": 101, "small": 18, "weighted": 39, "empty": 0}
    assert sum(counts.values()) == 158


def test_weights_alone_are_normalised() -> None:
    shares = [Share(name="a", rows=90, weight=2), Share(name="b", rows=10, weight=6)]
    assert Mixture(shares, seed=0).counts() == {"a": 25, "b": 75}


def test_sqrt_shares_by_the_root_of_the_rows() -> None:
    shares = [
        Share(name="large", rows=10_000, repeat="sqrt"),
        Share(name="small", rows=100, repeat="sqrt"),
    ]
    assert Mixture(shares, seed=0).counts() == {"large": 10_000, "small": 1000}


def test_a_rare_source_is_not_rounded_away() -> None:
    shares = [Share(name="common", rows=10), Share(name="rare", rows=50, weight=0.001)]
    counts = Mixture(shares, seed=0).counts()
    assert counts["rare"] >= 1
    assert counts["rare"] / sum(counts.values()) == pytest.approx(0.001, rel=0.1)  # of rounding


def test_another_seed_and_epoch_give_another_order() -> None:
    mixture = Mixture([Share(name="a", rows=1000)], seed=0)
    first, second = draws(mixture, np.arange(1000)), draws(mixture, np.arange(1000, 2000))
    assert first != second
    assert sorted(first) == sorted(second)
    assert draws(Mixture([Share(name="a", rows=1000)], seed=1), np.arange(1000)) != first


def test_a_source_added_behind_keeps_the_rows_of_the_others() -> None:
    """Rows are shuffled by the source's name, so its own order does not depend on the mixture."""
    alone = Mixture([Share(name="a", rows=50)], seed=0)
    both = Mixture([Share(name="b", rows=50), Share(name="a", rows=50)], seed=0)
    first = sorted(row for _, row in draws(alone, np.arange(50)))
    assert first == sorted(row for s, row in draws(both, np.arange(100)) if s == 1)


def test_weights_that_leave_nothing_are_refused() -> None:
    shares = [Share(name="a", rows=5, weight=1.0), Share(name="b", rows=5)]
    with pytest.raises(InputError, match="leaves nothing for b"):
        Mixture(shares, seed=0)
