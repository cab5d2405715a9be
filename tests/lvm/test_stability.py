"""Updates that are left out, and the watchdog of a run that hangs."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lvm import optim
from lvm.checkpoint import Trainer, latest, load_model_state
from lvm.config import Run
from lvm.recipes import recipe
from lvm.stability import RECENT, Watchdog, judge, remember
from lvm.train import train
from tokenizer.cli import CommandError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(data, tmp_path) -> Run:
    tiny = recipe("tiny")
    return replace(
        tiny,
        model=replace(tiny.model, layers=1, width=32, ffn=48),
        optim=replace(tiny.optim, warmup=2, decay_steps=60),
        precision="fp32", device="cpu", steps=24, save_every=12, log_every=1,
        data=str(data), out=str(tmp_path / "run"),
    )  # fmt: skip


def lines(run: Run, split: str) -> list[dict]:
    text = (Path(run.out) / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["split"] == split]


def test_norms_are_judged_by_the_median_of_the_last():
    recent = (1.0,) * 10 + (3.0,) * 10  # median 2
    assert judge(19.0, recent, limit=10.0) == ""
    assert "10.5 times the median" in judge(21.0, recent, limit=10.0)
    assert "not finite" in judge(math.nan, (), limit=10.0)
    assert "not finite" in judge(math.inf, recent, limit=10.0)
    assert judge(1e9, recent[: RECENT // 4 - 1], limit=10.0) == ""  # too few to say
    assert judge(math.nan, recent, limit=0.0) == ""
    assert remember(7.0, tuple(range(RECENT))) == (*range(1, RECENT), 7.0)


def harmed(monkeypatch, *, at: set[int], factor: float) -> None:
    """Multiply the gradients of some updates, counted over all starts of a test."""
    clip, count = optim.clip, [0]

    def clip_harmed(parameters, limit):
        count[0] += 1
        if count[0] in at:
            for parameter in parameters:
                parameter.grad.mul_(factor)
        return clip(parameters, limit)

    monkeypatch.setattr(optim, "clip", clip_harmed)


@pytest.mark.parametrize("factor", [math.nan, 1e3])
def test_a_spike_is_left_out_and_the_weights_stay(run, monkeypatch, factor):
    guarded, plain = replace(run, spike_limit=10.0), replace(run, out=run.out + "-19")
    train(replace(plain, steps=19, spike_limit=10.0))
    harmed(monkeypatch, at={20}, factor=factor)
    train(replace(guarded, steps=20))
    (skip,) = lines(guarded, "skip")
    assert (skip["step"], skip["samples"]) == (20, [152, 159])
    assert "not finite" in skip["why"] if math.isnan(factor) else "times the median" in skip["why"]
    before, after = (load_model_state(Path(r.out)) for r in (plain, guarded))
    assert all(torch.equal(before[name], after[name]) for name in before)
    standing = Trainer.load(latest(Path(guarded.out)))
    assert (standing.step, standing.samples, standing.skipped) == (20, 160, 1)
    assert len(standing.norms) == 19
    train(guarded)
    assert [line["step"] for line in lines(guarded, "train")] == [*range(1, 20), *range(21, 25)]
    assert lines(guarded, "train")[-1]["skipped"] == 1


def test_a_run_with_a_guard_and_nothing_to_guard_learns_the_same(run):
    guarded = replace(run, out=run.out + "-guarded", spike_limit=10.0)
    train(run)
    train(guarded)
    one, two = (load_model_state(Path(r.out)) for r in (run, guarded))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_ends_after_too_many_in_a_row(run, monkeypatch):
    harmed(monkeypatch, at=set(range(14, 100)), factor=math.nan)
    with pytest.raises(CommandError, match=r"4 updates in a row.*17 \(samples 128 to 135\)"):
        train(replace(run, spike_limit=10.0, max_skips=3))
    assert latest(Path(run.out)).name == "step-00000012"


HANG = """
import json, sys, threading
from lvm.config import Run
from lvm.train import Training, train
def wait_for_ever(self, stream):
    threading.Event().wait()
Training.update = wait_for_ever
train(Run.from_json(json.load(open(sys.argv[1]))))
"""


def test_a_run_that_hangs_ends_and_leaves_its_stacks(run, tmp_path):
    config = tmp_path / "run.json"
    config.write_text(json.dumps(replace(run, hang_seconds=2.0).to_json()))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", HANG, str(config)], env=env, capture_output=True)
    assert ended.returncode == 1
    assert "wait_for_ever" in (Path(run.out) / "stacks-0.txt").read_text()
    assert json.loads((Path(run.out) / "heartbeat.json").read_text())["step"] == 0


def test_a_run_that_does_not_hang_leaves_no_stacks(tmp_path):
    with Watchdog(tmp_path, rank=0, seconds=60.0) as dog:
        dog.beat(4)
        dog.beat(5)
    assert {path.name for path in tmp_path.iterdir()} == {"heartbeat.json"}
    assert json.loads((tmp_path / "heartbeat.json").read_text())["step"] == 4


def test_the_shares_of_time_add_up(run):
    train(replace(run, steps=3))
    for line in lines(run, "train"):
        shares = [line[f"time_{name}"] for name in ("data", "model", "optimiser", "rest")]
        assert sum(shares) == pytest.approx(1.0) and all(share >= 0 for share in shares)
        assert line["time_model"] > 0
