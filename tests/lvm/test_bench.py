"""The training benchmark: its rows can be learnt, its curves are compared, both runs are one."""

import sys

import torch

from lvm import bench
from lvm.recipes import recipe
from visual_sentences.batch import IGNORE


def test_rows_count_up_within_a_document_and_labels_do_not_leave_it():
    ids, labels = bench.progressions(3, 64, seed=1)
    assert ids.shape == labels.shape == (3, 64) and int(ids.max()) < bench.ALPHABET
    ends = torch.arange(64) % 16 == 15
    assert bool((labels[:, ends] == IGNORE).all())
    assert torch.equal(labels[:, :-1][:, ~ends[:-1]], ids[:, 1:][:, ~ends[:-1]])
    steps = (
        (ids[:, 1:] - ids[:, :-1]).remainder(bench.ALPHABET)[:, ~ends[:-1]].unflatten(1, (4, 15))
    )
    usual = steps.mode(2, keepdim=True).values
    assert bool((usual >= 1).all() and (usual <= 8).all())
    assert float((steps == usual).float().mean()) > 0.6  # a drawn code breaks two steps
    again = bench.progressions(3, 64, seed=1)[0]
    assert torch.equal(ids, again) and not torch.equal(ids, bench.progressions(3, 64, seed=2)[0])


def test_one_backend_twice_gives_one_curve(monkeypatch, capsys):
    whole = bench.curve

    def short(config, backend, **rest):
        return whole(config, backend, **{**rest, "rows": 1, "length": 64, "steps": 20})

    monkeypatch.setattr(bench, "curve", short)
    monkeypatch.setattr(sys, "argv", ["bench"])
    bench.main()
    out = capsys.readouterr().out
    assert "largest relative difference 0.00e+00" in out and '"bench": "training"' in out


def test_curves_that_differ_are_told_apart(monkeypatch):
    curves = iter([([4.0, 2.0] * 20, 10.0), ([4.0, 1.6] * 20, 30.0)])
    monkeypatch.setattr(bench, "curve", lambda *a, **k: next(curves))
    *rows, last = bench.training_table("cpu")
    assert [row["tokens/s"] for row in rows] == [10, 30]
    assert last["largest relative difference"] == "2.50e-01" and last["at update"] == 1
    assert last["of the last loss"] == "7.14e-02"  # means of the last updates: 3.0 and 2.8


def test_the_loss_falls():
    config = recipe("tiny").model
    config = type(config)(
        **{**{f: getattr(config, f) for f in config.__slots__}, "vocab_size": 256}
    )
    losses, speed = bench.curve(config, "sdpa", device="cpu", rows=2, length=128, steps=30)
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.5 and speed > 0
