"""Where a run's numbers go besides metrics.jsonl, its trace, and validation by kind."""

import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lvm.config import Run
from lvm.dashboards import numbers
from lvm.recipes import recipe
from lvm.train import train
from tokenizer.cli import InputError
from visual_sentences.manifest import Manifest


@pytest.fixture
def run(data, tmp_path) -> Run:
    tiny = recipe("tiny")
    return replace(
        tiny,
        model=replace(tiny.model, layers=1, width=32, ffn=48), precision="fp32", device="cpu",
        steps=6, save_every=3, log_every=1, eval_every=3, eval_rows=16,
        data=str(data), out=str(tmp_path / "run"),
    )  # fmt: skip


def lines(run: Run, split: str) -> list[dict]:
    text = (Path(run.out) / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["split"] == split]


def test_numbers_are_named_by_their_path():
    line = {"step": 3, "split": "val", "nll": 2, "by_kind": {"pair": {"nll": 1.5}}, "why": "x"}
    assert list(numbers(line, "val")) == [("val/nll", 2.0), ("val/by_kind/pair/nll", 1.5)]


def test_tensorboard_shows_the_numbers_of_the_record(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(replace(run, tensorboard=True, steps=4))
    train(replace(run, tensorboard=True))
    events = EventAccumulator(str(Path(run.out) / "tensorboard")).Reload()
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    wanted = {line["step"]: pytest.approx(line["loss"]) for line in lines(run, "train")}
    assert shown == wanted and len(shown) == 6
    assert len(events.Scalars("val/by_kind/image/nll")) == len(lines(run, "val"))


def test_wandb_gets_the_same_and_one_run_a_folder(run, monkeypatch):
    seen: dict = {"inits": [], "logs": []}

    class Opened:
        def log(self, values, *, step):
            seen["logs"].append((step, values))

    def init(**given):
        seen["inits"].append(given)
        return Opened()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(replace(run, wandb="lvm", steps=4))
    train(replace(run, wandb="lvm"))
    first, second = seen["inits"]
    assert first["id"] == second["id"] and first["resume"] == "allow" and first["mode"] == "offline"
    logged = [step for step, values in seen["logs"] if "train/loss" in values]
    assert logged == [1, 2, 3, 4, 5, 6]


def test_a_dashboard_that_is_not_installed_is_named_before_a_run_begins(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"--wandb lvm.*pip install wandb"):
        train(replace(run, wandb="lvm"))


def test_a_trace_holds_the_updates_it_was_asked_for(run):
    train(replace(run, trace_from=2, trace_updates=2))
    (path,) = (Path(run.out) / "trace").iterdir()
    assert path.name == "updates-2-3.json"
    names = [event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]]
    assert names.count("Optimizer.step#AdamW.step") == 2
    train(replace(run, trace_from=2, trace_updates=2, steps=7))  # has passed them
    assert [p.name for p in (Path(run.out) / "trace").iterdir()] == [path.name]


def test_validation_by_kind_adds_up_to_the_whole(run, make_data, tmp_path):
    folder = make_data(tmp_path / "kinds")
    manifest = Manifest.load(folder)
    a, b = manifest.sources
    replace(manifest, sources=(a, replace(b, kind="pair"))).save(folder)
    train(replace(run, data=str(folder)))
    for line in lines(run, "val"):
        assert set(line["by_kind"]) == {"image", "pair"}
        # Each source has as many rows and labels as the other, so the mean is the mean of both.
        both = [values["nll"] for values in line["by_kind"].values()]
        assert sum(both) / 2 == pytest.approx(line["nll"], rel=1e-6)
        assert both[0] != both[1]


def test_a_deterministic_run_asks_torch_for_it_and_learns_the_same(run):
    train(run)
    again = replace(run, out=run.out + "-again", deterministic=True)
    try:
        train(again)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert [x["loss"] for x in lines(again, "train")] == [x["loss"] for x in lines(run, "train")]
