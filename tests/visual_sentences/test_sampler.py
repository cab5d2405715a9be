"""The order of training data: a bijection, exact over any ranks, with the shares asked for."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer.cli import InputError
from visual_sentences.mixture import Mixture, Share
from visual_sentences.sampler import permute
from visual_sentences.seeds import seeded

SHARES = [
    Share(name="large", rows=101),
    Share(name="small", rows=7, repeat=2.5),
    Share(name="weighted", rows=40, weight=0.25),
    Share(name="empty", rows=0),
]


NAMES = "abcdef"
COUNT = st.integers(0, 60)


@st.composite
def mixtures(draw: st.DrawFn) -> list[Share]:
    """Sources by weight, by repeat, by root and by neither; weights leave room for the others."""
    shares = [Share(name="first", rows=draw(st.integers(1, 60)), repeat=draw(repeats))]
    for name in draw(st.permutations(NAMES))[: draw(st.integers(0, 6))]:
        if draw(st.booleans()):  # six of them add up to 0.96 at most
            weight = draw(st.integers(1, 16)) / 100
            shares.append(Share(name=name, rows=draw(COUNT), weight=weight))
        else:
            shares.append(Share(name=name, rows=draw(COUNT), repeat=draw(repeats)))
    return draw(st.permutations(shares))


repeats = st.one_of(
    st.none(),
    st.just("sqrt"),
    st.integers(1, 5).map(float),
    st.floats(0.05, 5.0, allow_subnormal=False),
)
seeds = st.integers(0, 2**63)
fixed = settings(max_examples=60, deadline=None, derandomize=True)  # the same examples every time


@fixed
@given(shares=mixtures(), seed=seeds, epochs=st.integers(1, 5))
def test_rows_of_any_mixture_are_drawn_floor_or_ceiling_times(
    shares: list[Share], seed: int, epochs: int
) -> None:
    mixture = Mixture(shares, seed=seed)
    uses = Counter(draws(mixture, np.arange(epochs * mixture.slots)))
    counts = mixture.counts()
    assert sum(uses.values()) == epochs * sum(counts.values()) == epochs * mixture.slots
    for number, share in enumerate(shares):
        found = {uses[number, row] for row in range(share.rows)}
        if share.rows:
            mean = Fraction(epochs * counts[share.name], share.rows)
            assert found <= {math.floor(mean), math.ceil(mean)}
        else:
            assert counts[share.name] == 0


@fixed
@given(shares=mixtures(), seed=seeds)
def test_an_epoch_of_any_mixture_has_the_shares_within_a_slot(
    shares: list[Share], seed: int
) -> None:
    """Largest remainder: less than a slot off, of an epoch that is itself rounded to slots."""
    counts = Mixture(shares, seed=seed).counts()
    slots, used = sum(counts.values()), [share for share in shares if share.rows]
    assert all(counts[share.name] >= 1 for share in used)
    weights = {share.name: share.weight for share in used if share.weight is not None}
    free = [share for share in used if share.weight is None]
    largest = max(share.rows for share in free)
    rows = {
        s.name: s.rows * (math.sqrt(largest / s.rows) if s.repeat == "sqrt" else s.repeat or 1.0)
        for s in free
    }
    rest = 1 - sum(weights.values())
    exact = weights | {name: rest * value / sum(rows.values()) for name, value in rows.items()}
    for name, share in exact.items():
        # Less than a whole for the source, at most a half for the epoch; a hundredth for floats.
        assert abs(counts[name] - share * slots) < 1.51


@fixed
@given(rows=st.integers(1, 40), times=st.integers(1, 4), seed=seeds, epoch=st.integers(0, 9))
def test_a_whole_repeat_holds_in_every_epoch_for_itself(
    rows: int, times: int, seed: int, epoch: int
) -> None:
    shares = [Share(name="a", rows=rows, repeat=float(times)), Share(name="b", rows=17)]
    mixture = Mixture(shares, seed=seed)
    uses = Counter(draws(mixture, epoch * mixture.slots + np.arange(mixture.slots)))
    assert {uses[0, row] for row in range(rows)} == {times}
    assert {uses[1, row] for row in range(17)} == {1}


@fixed
@given(shares=mixtures(), seed=seeds, start=st.integers(0, 2**40), count=st.integers(1, 50))
def test_a_sample_is_the_same_whoever_asks_for_it(
    shares: list[Share], seed: int, start: int, count: int
) -> None:
    """In a block, backwards and alone: the ground of every elastic resume."""
    mixture, samples = Mixture(shares, seed=seed), start + np.arange(count)
    block = draws(mixture, samples)
    assert draws(Mixture(shares, seed=seed), samples[::-1])[::-1] == block
    assert [draws(mixture, samples[i : i + 1])[0] for i in range(count)] == block


@fixed
@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_a_shuffle_of_any_size_is_a_bijection(n: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1000, 1024, 1025, 65537])
def test_a_shuffle_is_a_bijection(n: int) -> None:
    shuffled = permute(np.arange(n), n, seeded(7, n))
    assert np.array_equal(np.sort(shuffled), np.arange(n))


def test_a_shuffle_reaches_past_any_array() -> None:
    n = 2**40 + 7
    places = np.arange(n - 1000, n)
    shuffled = permute(places, n, seeded(1))
    assert len(set(shuffled.tolist())) == 1000
    assert shuffled.min() >= 0 and shuffled.max() < n


def test_a_shuffle_looks_random() -> None:
    shuffled = permute(np.arange(100_000), 100_000, seeded(3)).astype(float)
    lag = np.corrcoef(shuffled[:-1], shuffled[1:])[0, 1]
    assert abs(lag) < 0.02  # a true permutation of this length: 0.003 standard deviation
    other = permute(np.arange(100_000), 100_000, seeded(4)).astype(float)
    assert abs(np.corrcoef(shuffled, other)[0, 1]) < 0.02


def test_shuffles_of_different_sizes_and_keys_can_be_asked_for_together() -> None:
    sizes = np.array([10, 1000, 3, 77])
    keys = np.array([seeded(i) for i in range(4)], np.uint64)
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
