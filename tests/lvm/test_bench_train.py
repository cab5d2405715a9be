"""The training benchmark: its cases run, and count what they say."""

import json

import pytest
import torch

from kernels.mask import densify, is_exact
from lvm import bench_train
from lvm.bench_train import Case, batch_of, cases, measure
from lvm.mask import attention_mask, leaks
from lvm.recipes import recipe
from tokenizer.world import World

ONE = World(device=torch.device("cpu"))


@pytest.mark.parametrize("packed", [False, True])
def test_batches_are_packed_as_they_say_and_leak_nothing(packed):
    run = recipe("lvm_300m")
    batch = batch_of(run, 2, 1024, packed=packed, device=ONE.device)
    assert int(batch.doc.max()) == (3 if packed else 0)
    mask = attention_mask(batch.doc, batch.block, exact=batch.exact)
    assert mask.exact and bool(is_exact(mask.lo, mask.hi))
    reads = densify(mask, 1024)
    assert int(leaks(reads, batch.ids, batch.labels, batch.doc, ignore=-100)) == 0


def test_every_case_names_a_recipe_and_is_told_apart():
    for device in ("cpu", "cuda"):
        names = [case.name for case in cases(device)]
        assert len(set(names)) == len(names)
        assert all(recipe(case.recipe) for case in cases(device))


@pytest.mark.parametrize(
    "case", [Case("tiny", compiled=False), Case("tiny", compiled=False, packed=False, rival=True)]
)
def test_a_case_runs_and_its_figures_agree(case):
    row = measure(case, ONE, repeats=1, length=64)
    assert "error" not in row, row
    assert row["tokens/s"] == pytest.approx(2 * 64 / (row["ms"] / 1e3), rel=0.1)  # rounded ms


def test_a_case_that_fails_is_a_row_and_the_others_go_on(monkeypatch, capsys):
    broken = Case("tiny", attention="triton", compiled=False)
    monkeypatch.setattr(bench_train, "cases", lambda device: [broken, Case("tiny", compiled=False)])
    monkeypatch.setattr("sys.argv", ["bench", "--repeats", "1"])
    bench_train.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert "wanted cuda" in rows[0]["error"] and rows[1]["tokens/s"] > 0
