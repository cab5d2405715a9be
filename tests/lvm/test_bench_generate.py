"""The sampling benchmark: its rivals draw what they say, and it runs."""

import json

import pytest
import torch

from lvm import bench_generate
from lvm.bench_generate import Case, cache_bytes, case_rows, in_transformers, rivals, subject
from lvm.decoding.windows import Work
from lvm.generate import Sampling
from lvm.recipes import recipe

SMALL = Case("small", "tiny", 32, 4, 4)


def test_cases_name_recipes_and_are_told_apart():
    for cases in bench_generate.CASES.values():
        assert len({case.name for case in cases}) == len(cases)
        assert all(recipe(case.recipe) for case in cases)


def test_rivals_are_the_same_model_and_draw_one_image():
    model, reads = subject(SMALL, "cpu")
    theirs = in_transformers(model, reads)
    codes = torch.randint(32, (3, 4), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([torch.tensor([32]), codes.flatten()])[None]
    with torch.no_grad():
        # fp32, the same sums in another order
        torch.testing.assert_close(theirs(ids).logits, model(ids), atol=1e-5, rtol=0)
    found = rivals(theirs, reads, codes, candidates=3, device="cpu")
    assert len(found) == 3
    drawn = {}
    for name, draws in found.items():
        torch.manual_seed(0)
        drawn[name] = draws()
        assert drawn[name].shape == (3, 13 + 4)
        assert torch.equal(drawn[name][:, :13], ids.expand(3, -1))
    # Equal numbers, equal logits up to rounding: whatever the cache.
    assert torch.equal(drawn["dynamic"], drawn["static"])
    assert torch.equal(drawn["dynamic"], drawn["shared prefill"])


def test_the_bytes_of_their_cache_are_those_it_has():
    transformers = pytest.importorskip("transformers", reason="the oracle; in the extra dev")
    model, reads = subject(SMALL, "cpu")
    theirs = in_transformers(model, reads)
    cache = transformers.DynamicCache(config=theirs.config)
    with torch.no_grad():
        theirs(torch.zeros(5, 16).long(), past_key_values=cache)
    held = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
    assert cache_bytes(model.config, rows=5, places=16) == held


def test_a_case_has_a_row_for_each_number_of_candidates():
    one, two = case_rows(SMALL, "cpu", repeats=1, counts=(1, 2))
    assert (one["candidates"], two["candidates"]) == (1, 2)
    for row in (one, two):
        assert not [key for key in row if str(key).endswith("error")], row
        assert float(str(row["ours tokens/s"])) > 0 and float(str(row["ratio"])) > 0
    assert "ours first ms" in one and "ours first ms" not in two
    model, reads = subject(SMALL, "cpu")
    work = Work(model, reads, [torch.zeros(3, 4).long()], Sampling(candidates=2))
    assert two["ours cache MB"] == round(work.decoder.cache_bytes / 1e6, 1)


def test_a_rival_that_fails_is_named_and_the_others_are_timed(monkeypatch, capsys):
    def broken(*args, **kwargs):
        def fail():
            raise RuntimeError("no such cache")

        return {**rivals(*args, **kwargs), "static": fail}

    monkeypatch.setattr(bench_generate, "rivals", broken)
    monkeypatch.setattr(bench_generate, "CASES", {"cpu": [SMALL]})
    monkeypatch.setattr(bench_generate, "start_row", lambda repeats: {"import torch ms": 1})
    monkeypatch.setattr("sys.argv", ["bench", "--repeats", "1", "--candidates", "2"])
    bench_generate.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert rows[0]["static error"] == "RuntimeError: no such cache"
    assert rows[0]["ratio"] > 0 and rows[-1] == {"import torch ms": 1}


@pytest.mark.slow
def test_processes_are_timed():
    row = bench_generate.start_row(1)
    assert len(row) == 3 and all(float(str(ms)) > 0 for ms in row.values())
