"""How codes are chosen: frequencies against distributions by hand."""

import math

import pytest
import torch

from lvm.decoding.sampling import Sampling, pick, uniform
from tokenizer.cli import InputError


def frequencies(logits, **options) -> torch.Tensor:
    """Draw with evenly spaced numbers: the frequencies are the distribution itself."""
    draws = 20_000
    u = ((torch.arange(draws) + 0.5) / draws)[:, None]
    picked = pick(logits.expand(draws, -1), u, Sampling(**options))
    return torch.bincount(picked.flatten(), minlength=logits.shape[-1]) / draws


def test_the_distribution_is_that_of_temperature_and_cuts():
    p = torch.tensor([0.05, 0.4, 0.0, 0.25, 0.3])
    logits = p.log()
    cases = [
        ({}, p),
        ({"temperature": 0.5}, p**2),
        ({"top_k": 2}, torch.tensor([0, 0.4, 0, 0, 0.3])),
        ({"top_k": 99}, p),
        ({"top_p": 0.7}, torch.tensor([0, 0.4, 0, 0, 0.3])),
        ({"top_p": 0.71}, torch.tensor([0, 0.4, 0, 0.25, 0.3])),
        ({"top_p": 1e-6}, torch.tensor([0, 1.0, 0, 0, 0])),
        # Top-p works on what top-k left: 0.4 of 0.7 is 0.57.
        ({"top_k": 2, "top_p": 0.5}, torch.tensor([0, 1.0, 0, 0, 0])),
        ({"temperature": 0.0}, torch.tensor([0, 1.0, 0, 0, 0])),
        ({"min_p": 0.7}, torch.tensor([0, 0.4, 0, 0, 0.3])),
        ({"min_p": 1.0}, torch.tensor([0, 1.0, 0, 0, 0])),
        # Of the distribution at this temperature: 0.25² is less than 0.5 · 0.4², 0.3² is more.
        ({"min_p": 0.5, "temperature": 0.5}, torch.tensor([0, 0.4, 0, 0, 0.3]) ** 2),
        ({"min_p": 0.1, "top_k": 4, "top_p": 0.9}, torch.tensor([0, 0.4, 0, 0.25, 0.3])),
    ]
    for options, weights in cases:
        found = frequencies(logits, **options)
        # Each code's share of 20,000 evenly spaced numbers is off by at most one at each end.
        torch.testing.assert_close(found, weights / weights.sum(), atol=2e-4, rtol=0)


def test_the_ends_of_the_unit_interval_pick_codes_that_can_be():
    logits = torch.tensor([[-math.inf, 1.0, 2.0, -math.inf]])
    ends = uniform(1, 1, 0).new_tensor([[0.0], [1 - 2**-20]])
    picked = pick(logits.expand(2, -1), ends, Sampling())
    assert picked.flatten().tolist() == [1, 2]
    assert float(uniform(200, 5000, 0).max()) <= 1 - 2**-20


def test_numbers_of_a_row_do_not_depend_on_how_many_rows_or_steps_there_are():
    many = uniform(3, 50, 4)
    assert torch.equal(uniform(2, 20, 4), many[:2, :20])
    assert not torch.equal(many[0], many[1])
    assert not torch.equal(uniform(3, 50, 5), many)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"new": 0}, "at least 1"),
        ({"candidates": 0}, "at least 1"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.5}, "min_p 1.5"),
        ({"guidance": -1.0}, "guidance -1.0"),
        ({"guidance": math.nan}, "guidance nan"),
        ({"bare": -1}, "bare -1"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        Sampling(**options)
