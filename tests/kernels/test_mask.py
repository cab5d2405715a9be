"""The tables of an interval mask by brute force, and what may be called exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.mask import EXACT, STRETCH, Mask, bounds, densify, is_exact, padded


def causal_documents(starts, length):
    """Intervals [1, length] of causal documents that start at `starts`."""
    index = torch.arange(length)
    first = torch.zeros(length, dtype=torch.long)
    first[torch.tensor(starts)] = 1
    lo = torch.where(first.bool(), index, 0).cummax(0).values
    return lo[None].int(), (index + 1)[None].int()


@st.composite
def intervals(draw):
    """Any intervals inside the keys, empty ones and falling ends among them."""
    queries, keys = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    a, b = (torch.randint(0, keys + 1, (2, queries), generator=rng) for _ in range(2))
    lo, hi = a.minimum(b), a.maximum(b)
    if draw(st.booleans()):
        lo, hi = lo.sort(1).values, hi.sort(1).values
    return lo.int(), hi.int(), keys


def check_tables(lo, hi, keys):
    reads = densify(Mask.interval(lo, hi), keys)
    by_query, by_key = bounds(lo, hi, keys)
    for row in range(len(lo)):
        for at in range(by_query.shape[2]):
            rows = reads[row, at * STRETCH : (at + 1) * STRETCH]
            start, whole, stop_whole, stop = by_query[row, :, at].tolist()
            outside = torch.ones(keys, dtype=torch.bool)
            outside[start : max(start, stop)] = False
            assert not rows[:, outside].any(), "a pair is never visited"
            assert rows[:, whole : max(whole, stop_whole)].all(), "a pair needs a mask"
        for at in range(by_key.shape[2]):
            columns = reads[row, :, at * STRETCH : (at + 1) * STRETCH]
            start, whole, stop_whole, stop = by_key[row, :, at].tolist()
            outside = torch.ones(lo.shape[1], dtype=torch.bool)
            outside[start : max(start, stop)] = False
            assert not columns[outside].any(), "a pair is never visited"
            assert columns[whole : max(whole, stop_whole)].all(), "a pair needs a mask"


@settings(max_examples=200, deadline=None)
@given(intervals())
def test_tables_visit_every_pair_and_leave_no_mask_out(drawn):
    check_tables(*drawn)


def test_tables_of_packed_documents_are_tight():
    lo, hi = causal_documents([0, 64, 70], 130)
    check_tables(lo, hi, 130)
    by_query, by_key = bounds(lo, hi, 130)
    #          starts at     whole from    whole to      visited to
    assert by_query[0].T.tolist() == [
        [0, 0, 1, 32],
        [0, 0, 33, 64],
        [64, 70, 65, 96],
        [70, 70, 97, 128],
        [70, 70, 129, 130],
    ]
    assert by_key[0].T.tolist() == [
        [0, 32, 64, 64],
        [32, 130, 130, 64],
        [64, 130, 130, 130],
        [96, 128, 130, 130],
        [128, 130, 130, 130],
    ]


def test_rows_that_read_nothing_make_no_whole_block():
    lo = torch.zeros(1, 64, dtype=torch.int32)
    hi = torch.full((1, 64), 64, dtype=torch.int32)
    hi[0, 40] = 0
    by_query, by_key = bounds(lo, hi, 64)
    assert by_query[0, :, 0].tolist() == [0, 0, 64, 64]
    start, whole, stop_whole, stop = by_query[0, :, 1].tolist()
    assert (start, stop) == (0, 64) and whole >= stop_whole
    assert by_key[0, :, 0].tolist() == [0, 0, 32, 64]
    nothing = torch.zeros(1, 64, dtype=torch.int32)
    for table in bounds(nothing, nothing, 64):
        assert (table[:, 0] >= table[:, 3]).all()


@pytest.mark.parametrize("length", [128, 300, 512])
def test_exact_masks_are_told_from_others(length):
    index = torch.arange(length, dtype=torch.int32)[None]
    zero = torch.zeros_like(index)
    starts = index // 256 * 256
    exact = {
        "causal": (zero, index + 1),
        "documents": (starts, index + 1),
        "prefix": (starts, (index + 1).maximum(starts + 37).clamp(max=length)),
        "images": (zero, (starts + 256).clamp(max=length)),
        "full": (zero, zero + length),
    }
    others = {
        "start between": ((index >= 60) * 60, index + 1),
        "start at 64": ((index >= 64) * 64, index + 1),
        "no causal row": (zero, index),
        "images of 64": (zero, (index // 64 * 64 + 64).clamp(max=length)),
    }
    for name, (lo, hi) in exact.items():
        assert bool(is_exact(lo, hi)), name
    for name, (lo, hi) in others.items():
        assert not bool(is_exact(lo.int(), hi.int())), name
    both = torch.cat([starts, (index >= 60).int() * 60]), torch.cat([index + 1, index + 1])
    assert not bool(is_exact(*both)), "every row has to be"


def test_padded_is_the_next_multiple():
    assert [padded(n) for n in (0, 1, EXACT, EXACT + 1)] == [0, EXACT, EXACT, 2 * EXACT]


def test_the_dense_form_draws_the_intervals():
    mask = Mask.interval(torch.tensor([[0, 0, 2]]), torch.tensor([[1, 2, 3]]))
    assert densify(mask, 3).int().tolist() == [[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]
    assert densify(Mask(causal=True), 3) is None and densify(Mask.full(), 3) is None
    kinds = [Mask(causal=True), Mask.full(), mask, Mask(dense=torch.ones(1, 1, 1).bool())]
    assert [m.kind for m in kinds] == ["causal", "full", "interval", "dense"]
