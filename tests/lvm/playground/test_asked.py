"""What a page may ask for, value by value."""

import json
import re
from dataclasses import replace

import pytest

from lvm.generate import Sampling
from lvm.playground.asked import LIMITS, PROMPT_ID, Asked
from tokenizer.cli import InputError

GOOD = {"kind": "pairs", "images": ["0" * 64] * 3, "settings": {}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "films"}, 'kind .films.: wanted "pairs" or "frames"'),
        ({"images": "abc"}, "wanted a list of ids"),
        ({"images": ["../../etc/passwd"] * 3}, "wanted a list of ids"),
        ({"images": ["0" * 64]}, "1 pictures make no analogy; wanted at least one whole pair"),
        ({"images": ["0" * 64] * 4}, "4 pictures make no analogy"),
        ({"images": [], "kind": "frames"}, "no frames; wanted at least one"),
        ({"settings": []}, "settings: wanted an object"),
        ({"settings": {"new": 2}}, "a query has one answer"),
        ({"settings": {"candidates": 17}}, "candidates 17: wanted a whole number from 1 to 16"),
        ({"settings": {"candidates": 1.5}}, "candidates 1.5: wanted a whole number"),
        ({"settings": {"temperature": -1}}, "temperature -1: wanted a number from 0 to 2"),
        ({"settings": {"temperature": float("nan")}}, "temperature nan: wanted a number"),
        ({"settings": {"temperature": True}}, "temperature True: wanted a number"),
        ({"settings": {"seed": "x"}}, "seed 'x': wanted a whole number from 0 to 2147483647"),
        ({"settings": {"topk": 1}}, "unknown settings topk; there are candidates"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(change, words):
    with pytest.raises(InputError, match=words):
        Asked.parse({**GOOD, **change})


def test_settings_that_are_left_out_are_the_defaults_of_sampling_but_for_the_candidates():
    assert Asked.parse(GOOD).sampling() == Sampling(candidates=4)


def test_both_ends_of_every_setting_are_taken_and_the_next_step_beyond_is_not():
    for key, limit in LIMITS.items():
        frames = {**GOOD, "kind": "frames"}
        for value in (limit.low, limit.high):
            assert Asked.parse({**frames, "settings": {key: value}}).settings[key] == value
        for value in (limit.low - limit.step, limit.high + limit.step):
            with pytest.raises(InputError, match=re.escape(f"{key} {value!r}: wanted")):
                Asked.parse({**frames, "settings": {key: value}})
        whole = getattr(Asked.parse(frames).sampling(), key)
        assert isinstance(whole, int if limit.whole else float), key


def test_equal_prompts_have_equal_ids_and_others_do_not():
    asked = Asked.parse(GOOD)
    spelt = Asked.parse({**GOOD, "settings": {"temperature": 1, "seed": 0.0}})
    assert PROMPT_ID.fullmatch(asked.id("m"))
    assert asked.id("m") == spelt.id("m")
    others = [
        asked.id("n"),
        Asked.parse({**GOOD, "settings": {"seed": 1}}).id("m"),
        Asked.parse({**GOOD, "kind": "frames"}).id("m"),
        replace(asked, images=("1" * 64, *asked.images[1:])).id("m"),
    ]
    assert len({asked.id("m"), *others}) == 5


def test_a_record_is_read_back_as_what_was_asked():
    asked = Asked.parse({**GOOD, "settings": {"seed": 7}})
    assert Asked.parse(json.loads(asked.record("m"))) == asked
