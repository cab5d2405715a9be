import gc
import json
import math
import os
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lvm import train as module
from lvm.checkpoint import Trainer, latest, load_model_state
from lvm.config import Reads, Run
from lvm.learner import Learner, backward, refuse_leaks
from lvm.model import build
from lvm.parallel import recompute_block
from lvm.recipes import recipe
from lvm.train import Training, main, train
from tokenizer.cli import CommandError, InputError, guarded
from tokenizer.world import World
from visual_sentences.loader import Loader
from visual_sentences.pack import pack

ROOT = Path(__file__).parents[2]
ONE = World(device=torch.device("cpu"))

STUCK = """
import json, signal, sys
from lvm.config import Run
from lvm.train import Training, train
update = Training.update
def stuck(self, stream):
    if self.trainer.step == 7:
        signal.pause()
    update(self, stream)
Training.update = stuck
train(Run.from_json(json.load(open(sys.argv[1]))))
"""
"""A training that makes 7 updates and then waits to be killed."""


@pytest.fixture(autouse=True)
def one_thread():
    """Sums depend on the number of threads; with one, two processes can be equal bit by bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(data, tmp_path) -> Run:
    """Ten fp32 updates of a model of two layers, whose schedule does not depend on `steps`."""
    tiny = recipe("tiny")
    return replace(
        tiny,
        model=replace(tiny.model, layers=2, width=32, ffn=48),
        optim=replace(tiny.optim, warmup=2, decay_steps=12),
        precision="fp32",
        device="cpu",
        steps=10,
        save_every=5,
        log_every=1,
        data=str(data),
        out=str(tmp_path / "run"),
    )


def beside(run: Run, name: str, **values) -> Run:
    return replace(run, out=str(Path(run.out).with_name(name)), **values)


def lines(run: Run, split: str = "train") -> list[dict]:
    text = (Path(run.out) / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["split"] == split]


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in lines(run)]


def same_weights(a: Run, b: Run) -> bool:
    one, two = load_model_state(Path(a.out)), load_model_state(Path(b.out))
    return all(torch.equal(one[name], two[name]) for name in one)


def first_batch(run: Run):
    loader = Loader(run.data, batch_rows=run.batch_rows, seed=run.seed)
    return pack(next(iter(loader)), layout=run.layout, vocab=loader.manifest.vocab)


def learner_of(run: Run) -> Learner:
    return Learner(build(replace(run.model, vocab_size=128), seed=run.seed), z_loss=run.z_loss)


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_one_sgd_step_is_the_same_for_any_micro_batch(run, z_loss):
    batch, weights = first_batch(run), []
    for micro in (8, 1, 2):
        cut = replace(run, micro_rows=micro, z_loss=z_loss)
        learner = learner_of(cut)
        sums = backward(learner, batch, run=cut, world=ONE)
        assert sums[3] == (batch.labels >= 0).sum()
        torch.optim.SGD(learner.parameters(), lr=1.0).step()
        weights.append(list(learner.parameters()))
    for other in weights[1:]:  # fp32 gradients of size 0.1, summed in another order
        for one, two in zip(weights[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=0.0, atol=1e-6)


def test_losses_are_the_same_for_any_micro_batch(run):
    one, eight = replace(run, micro_rows=8), beside(run, "eight", micro_rows=1)
    train(one)
    train(eight)
    assert len(losses(one)) == 10  # fp32 AdamW: sums in another order, amplified by ten updates
    assert losses(eight) == pytest.approx(losses(one), rel=1e-5)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_what_is_computed_again_has_the_same_bits(run, mode):
    again = beside(run, mode, recompute=mode, steps=4)
    train(replace(run, steps=4))
    train(again)
    assert losses(again) == losses(run)
    assert same_weights(run, again)


def test_recomputation_keeps_less(run):
    """Bytes that a forward pass leaves for the backward pass; logits are never among them."""
    batch, kept = first_batch(run), {}
    for mode in ("none", "selective", "full"):
        learner = learner_of(run)
        for block in learner.model.layers:
            recompute_block(block, mode)
        saved = weakref.WeakSet()  # selective recomputation keeps its products by itself

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
                out = operator(*args, **(kwargs or {}))
                for x in tree_leaves(out):
                    if isinstance(x, torch.Tensor):
                        saved.add(x.untyped_storage())  # noqa: B023 - of this turn
                return out

        with Count():
            loss = learner(batch).loss
        gc.collect()
        kept[mode] = sum(storage.nbytes() for storage in saved)
        loss.backward()
    assert kept["full"] < 0.6 * kept["selective"] < 0.6 * 0.9 * kept["none"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "selective"])
def test_compiled_blocks_give_the_same_losses(run, mode):
    compiled = beside(run, "compiled", compile=True, recompute=mode)
    train(run)
    train(compiled)
    # Sums in another order, as between ranks.
    assert losses(compiled) == pytest.approx(losses(run), rel=1e-5)


def test_a_batch_is_learnt_by_heart_and_starts_at_chance(run, make_data, tmp_path):
    """Chance is ln of the table's width. Logits of spread 0.02·√32 = 0.11 add 0.006, and their mean
    over 200 labels moves by 0.11/√200 = 0.008: 0.04 is four times that and more."""
    data = make_data(tmp_path / "four", train=2, val=2)
    fast = replace(run, data=str(data), steps=60, batch_rows=4, precision="bf16")
    train(replace(fast, optim=replace(run.optim, lr=2e-2, decay_steps=0, warmup=5)))
    found = losses(fast)
    assert found[0] == pytest.approx(math.log(128), abs=0.04)
    assert found[-1] < 1.0


def test_muon_learns(run):
    muon = replace(run, optim=replace(run.optim, name="muon", lr=1e-2), steps=20)
    train(muon)
    assert losses(muon)[-1] < losses(muon)[0] - 0.3


def test_a_run_killed_and_resumed_ends_bit_by_bit_like_an_undisturbed_one(run, tmp_path):
    whole, killed = replace(run, steps=12), beside(run, "killed", steps=12)
    train(whole)
    config = tmp_path / "killed.json"
    config.write_text(json.dumps(killed.to_json()))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", STUCK, str(config)],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        metrics, saved = Path(killed.out) / "metrics.jsonl", Path(killed.out) / "latest"
        while child.poll() is None and not (
            metrics.exists() and len(losses(killed)) == 7 and saved.exists()
        ):
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, child.stderr.read()
    assert latest(Path(killed.out)).name == "step-00000005"
    train(killed)
    assert [line["step"] for line in lines(killed)] == list(range(1, 13))
    assert losses(killed) == losses(whole)
    assert same_weights(whole, killed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_update_saves_and_exits_with_0(run, monkeypatch, capsys, number):
    update = Training.update

    def signalled(self, stream):
        if self.trainer.step == 3:
            os.kill(os.getpid(), number)
        update(self, stream)

    before = signal.getsignal(number)
    monkeypatch.setattr(Training, "update", signalled)
    assert train(run) == 0
    assert "told to stop; the same command goes on: 4 updates" in capsys.readouterr().out
    assert latest(Path(run.out)).name == "step-00000004"
    assert not (Path(run.out) / "DONE").exists()
    assert signal.getsignal(number) == before
    if number == signal.SIGTERM:
        monkeypatch.undo()
        undisturbed = beside(run, "undisturbed")
        train(undisturbed)
        train(run)
        assert losses(run) == losses(undisturbed)
        assert same_weights(run, undisturbed)


def test_a_finished_run_says_so_and_goes_on_when_asked_for_more(run, capsys):
    short = replace(run, steps=3)
    train(short)
    out = Path(run.out)
    assert (out / "DONE").is_file()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    assert train(short) == 0
    assert f"{out} is finished: 3 updates" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    train(replace(run, steps=4))
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4]


def test_a_run_bounded_by_time_stops_falls_to_the_final_rate_and_says_its_steps(run, capsys):
    optim = replace(run.optim, decay_steps=0, final=0.1)
    timed = replace(run, seconds=0.5, steps=1_000_000, optim=optim, save_every=1_000_000)
    train(timed)
    trainer = Trainer.load(latest(Path(run.out)))
    assert trainer.elapsed >= 0.5
    assert 0 < trainer.step < timed.steps
    assert (
        f"done: {trainer.step:,} updates (of 1,000,000 updates or 0:00" in capsys.readouterr().out
    )
    # half a cosine over 2 % of the time falls by 1e-3, over these few of a million updates by 1e-9
    assert lines(timed)[-1]["lr"] < 0.999 * timed.optim.lr
    train(timed)
    assert "is finished" in capsys.readouterr().out


def test_the_run_folder_says_what_was_run(run, data):
    train(replace(run, steps=2, eval_every=2, eval_rows=16, micro_rows=64))
    out = Path(run.out)
    resolved = Run.from_json(json.loads((out / "config.json").read_text()))
    assert (resolved.micro_rows, resolved.model.vocab_size) == (8, 128)
    reads = Reads.load(out)
    assert (reads.codes, reads.row_len, reads.tokenizer) == (61, 32, "t" * 64)
    (start,) = json.loads((out / "environment.json").read_text())
    assert start["packages"]["torch"] == torch.__version__
    first, last = lines(run)
    assert (first["samples"], first["tokens"], last["samples"]) == (8, 256, 16)
    assert last["perplexity"] == pytest.approx(math.exp(last["nll"]))
    (held_out,) = lines(run, "val")
    assert held_out["step"] == 2
    assert 0 < held_out["nll"] < 2 * math.log(128)
    phase = Trainer.load(latest(out)).phases[0]
    assert (phase.first, phase.mixture) == (0, {"a": 24, "b": 24})


def test_validation_changes_nothing_that_is_learnt(run):
    seen, unseen = replace(run, steps=4, eval_every=1), beside(run, "unseen", steps=4)
    train(seen)
    train(unseen)
    assert losses(seen) == losses(unseen)
    assert same_weights(seen, unseen)


def test_validation_is_on_the_same_rows_for_any_micro_batch(run):
    """11 of 16 rows, which no step but that of one divides; fp32 sums in another order."""
    eight, others = replace(run, steps=1, eval_every=1, eval_rows=11), []
    train(eight)
    for micro in (1, 2, 4):
        other = beside(eight, f"by{micro}", micro_rows=micro)
        train(other)
        others += lines(other, "val")
    (wanted,) = lines(eight, "val")
    assert [line["nll"] for line in others] == pytest.approx(3 * [wanted["nll"]], rel=1e-5)


def test_another_config_other_data_and_another_shape_are_refused_by_name(run, make_data, tmp_path):
    train(replace(run, steps=1))
    with pytest.raises(InputError, match=r"optim\.lr: 0\.003, now 0\.1"):
        train(replace(run, optim=replace(run.optim, lr=0.1)))
    with pytest.raises(InputError, match=r"model\.width: 32, now 64"):
        train(replace(run, model=replace(run.model, width=64)))
    other = make_data(tmp_path / "other", tokenizer="u" * 64)
    with pytest.raises(InputError, match="was trained on data with manifest"):
        train(replace(run, data=str(other)))
    os.unlink(Path(run.out) / "config.json")  # then the checkpoint itself is compared
    with pytest.raises(InputError, match=r"is \(128, 32\), wanted \(128, 64\)"):
        train(replace(run, model=replace(run.model, width=64)))


def test_what_does_not_fit_the_data_or_the_ranks_is_refused(run):
    with pytest.raises(InputError, match="--data and --out missing"):
        train(replace(run, data="", out=""))
    with pytest.raises(InputError, match=r"too small .* needs 64"):
        train(replace(run, model=replace(run.model, vocab_size=63)))
    with pytest.raises(InputError, match="use 6 or 9 rows"):
        train(replace(run, micro_rows=3))
    with pytest.raises(InputError, match="--eval-rows 0 is not a number of rows"):
        train(replace(run, eval_every=1, eval_rows=0))
    with pytest.raises(InputError, match=r"no manifest\.json"):
        train(replace(run, data=run.out))
    assert not Path(run.out).exists()


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(run, monkeypatch):
    update = Training.update

    def poisoned(self, stream):
        if self.trainer.step == 6:
            next(iter(self.parameters)).data.fill_(math.inf)
        update(self, stream)

    monkeypatch.setattr(Training, "update", poisoned)
    with pytest.raises(CommandError, match=r"update 7 \(samples 48 to 55\) is not finite"):
        train(replace(run, log_every=100))
    assert latest(Path(run.out)).name == "step-00000005"


def test_a_mask_that_shows_the_label_is_found(run, monkeypatch):
    batch = first_batch(run)
    refuse_leaks(batch)
    with pytest.raises(CommandError, match="may read their own label"):
        refuse_leaks(replace(batch, block=torch.zeros_like(batch.block)))


def command(*args: str) -> int:
    try:
        return guarded(lambda: main(args), prog="train")
    except SystemExit as done:
        return int(done.code or 0)


def test_the_command_line(run, capsys, monkeypatch):
    monkeypatch.setattr(module, "train", lambda parsed: parsed.steps)
    assert command("tiny", "--steps", "0", "--optim.lr", "1") == 0
    assert command("--help") == 0
    assert "lvm_3b" in capsys.readouterr().out
    assert command() == 2
    assert command("--steps", "3") == 2
    assert "the recipe's name is wanted" in capsys.readouterr().err
    assert command("tinny", "--out", "x") == 2
    assert "did you mean tiny" in capsys.readouterr().err
    assert command("tiny", "--stepps", "3") == 2
    assert "--steps" in capsys.readouterr().err
    monkeypatch.undo()
    assert command("tiny", "--data", run.data) == 2
    assert "--out missing" in capsys.readouterr().err
