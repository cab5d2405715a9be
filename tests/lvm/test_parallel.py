"""Two real gloo ranks with FSDP2 against one process: one start of two processes for all of it."""

import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lvm.checkpoint import Trainer, _Unpickler, latest, load_model_state
from lvm.config import Run
from lvm.model import build, on_meta
from lvm.parallel import check_shards, compute, initialise, parallelize
from lvm.recipes import recipe
from lvm.train import train
from tokenizer.cli import InputError
from tokenizer.world import World, world

HERE = Path(__file__).parent


def small(data: Path, out: Path, **values) -> Run:
    run = recipe("tiny")
    model = replace(run.model, layers=2, width=32, ffn=48, qk_norm=True)
    optim = replace(run.optim, warmup=2, decay_steps=10)
    base = replace(run, model=model, optim=optim, precision="fp32", device="cpu", log_every=1)
    return replace(base, data=str(data), out=str(out), steps=10, save_every=5, **values)


def losses(out: Path) -> list[float]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if line["split"] == "train"]


def stored(out: Path) -> dict[str, tuple]:
    """Return the shape and type of every tensor of a run's newest checkpoint."""
    folder = latest(out)
    assert folder is not None
    with open(folder / ".metadata", "rb") as file:
        entries = _Unpickler(file).load().state_dict_metadata
    return {name: (tuple(e.size), e.properties.dtype) for name, e in entries.items()}


def on_ranks(runs: list[Run], folder: Path, *, world: int = 2, **env: str) -> None:
    listing = folder / "runs.json"
    listing.write_text(json.dumps([run.to_json() for run in runs]))
    with ExitStack() as stack:  # all open at once, so that the ports differ
        free = [stack.enter_context(socket.socket()) for _ in runs]
        for opened in free:
            opened.bind(("127.0.0.1", 0))
        ports = " ".join(str(opened.getsockname()[1]) for opened in free)
    shared = {
        **os.environ,
        "PYTHONPATH": str(HERE.parents[1]),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "PORTS": ports,
        **env,
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / "ranks.py"), str(listing)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=120)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:
            rank.kill()


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> Path:
    """One process to 10; two ranks to 10; one process to 5, then two ranks to 10; muon alike."""
    folder = tmp_path_factory.mktemp("ranks")
    one = small(data, folder / "one")
    muon = replace(small(data, folder / "muon-one"), optim=replace(one.optim, name="muon"))
    train(one)
    train(muon)
    train(replace(one, out=str(folder / "mixed"), steps=5))
    first = replace(one, out=str(folder / "sgd-two.pt"), model=replace(one.model, vocab_size=128))
    on_ranks(
        [
            first,
            replace(one, out=str(folder / "two"), eval_every=5),
            replace(one, out=str(folder / "mixed")),
            replace(muon, out=str(folder / "muon-two")),
            replace(muon, out=str(folder / "muon-again"), steps=5),
            replace(muon, out=str(folder / "muon-again")),
        ],
        folder,
    )
    sgd_step = runpy.run_path(str(HERE / "ranks.py"))["sgd_step"]
    sgd_step(replace(first, micro_rows=8), folder / "sgd-one.pt")
    return folder


def test_one_sgd_step_on_two_ranks_gives_the_weights_of_one_process(runs):
    one, two = (torch.load(runs / f"sgd-{n}.pt", weights_only=True) for n in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:  # fp32 gradients of size 0.1, summed in another order
        torch.testing.assert_close(two[name], one[name], rtol=0.0, atol=1e-6)


def test_losses_on_two_ranks_are_those_of_one_process(runs):
    """fp32 AdamW over 10 updates: sums in another order, amplified by 10 updates, stay ≤ 1e-5."""
    assert losses(runs / "two") == pytest.approx(losses(runs / "one"), rel=1e-5)
    assert losses(runs / "one")[-1] < losses(runs / "one")[0]


def test_a_checkpoint_of_two_ranks_holds_what_one_of_one_process_does(runs):
    """Also right after a validation, which gathers weights that no backward pass lets go."""
    one, two = (stored(runs / name) for name in ("one", "two"))
    assert one == two and len(one) > 30


def test_one_process_is_continued_on_two_ranks(runs):
    assert losses(runs / "mixed") == pytest.approx(losses(runs / "one"), rel=1e-5)
    starts = json.loads((runs / "mixed" / "environment.json").read_text())
    assert [(start["world"], start["step"]) for start in starts] == [(1, 0), (2, 5)]


def test_two_ranks_are_continued_on_one_process(runs, tmp_path):
    out = tmp_path / "back"
    shutil.copytree(runs / "two", out)
    (out / "latest").write_text("step-00000005\n")
    run = Run.from_json(json.loads((out / "config.json").read_text()))
    train(replace(run, out=str(out)))
    assert losses(out) == pytest.approx(losses(runs / "one"), rel=1e-5)
    assert Trainer.load(latest(out)).samples == 80


def test_weights_of_two_ranks_are_read_whole(runs):
    one, two = load_model_state(runs / "one"), load_model_state(runs / "two")
    assert {n: p.shape for n, p in one.items()} == {n: p.shape for n, p in two.items()}
    for name in one:  # 1e-7 apart but where a gradient near 0 changes sign, which AdamW magnifies
        assert (two[name] - one[name]).norm() <= 1e-4 * one[name].norm()


def test_muon_on_two_ranks_follows_one_process(runs):
    """The optimiser adds no bit (test_muon); it rounds gradients, which are sums in another order,
    to bf16: 3.6e-5 was seen over 10 updates."""
    assert losses(runs / "muon-two") == pytest.approx(losses(runs / "muon-one"), abs=2e-4)


def test_muon_on_two_ranks_goes_on_bit_by_bit(runs):
    """Sharded momenta come back as they were: losses and weights are those of one start."""
    whole, again = runs / "muon-two", runs / "muon-again"
    assert losses(again) == losses(whole)
    one, two = load_model_state(whole), load_model_state(again)
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.slow
def test_two_copies_of_two_shards_give_the_losses_of_one_process(runs, data, tmp_path):
    """HSDP, with micro-batches, so that copies sum what several passes have added up."""
    one = small(data, tmp_path / "hybrid", shards=2, micro_rows=1)
    first = replace(one, out=str(tmp_path / "sgd.pt"), model=replace(one.model, vocab_size=128))
    muon = replace(one, out=str(tmp_path / "muon"), optim=replace(one.optim, name="muon"))
    on_ranks([first, one, muon], tmp_path, world=4)
    assert losses(tmp_path / "hybrid") == pytest.approx(losses(runs / "one"), rel=1e-5)
    # Gradients rounded to bf16: as on two ranks.
    assert losses(tmp_path / "muon") == pytest.approx(losses(runs / "muon-one"), abs=2e-4)
    one_step, four = (
        torch.load(path, weights_only=True) for path in (runs / "sgd-one.pt", tmp_path / "sgd.pt")
    )
    for name in one_step:  # fp32 gradients of size 0.1, summed in another order
        torch.testing.assert_close(four[name], one_step[name], rtol=0.0, atol=1e-6)


@pytest.mark.slow
def test_four_ranks_two_and_three_go_on_with_the_same_samples(data, tmp_path):
    """A run's ids do not depend on who computes them: 4 ranks to 4, 2 to 7, 3 to 10."""
    whole = replace(small(data, tmp_path / "whole", micro_rows=1), batch_rows=12, save_every=1)
    train(whole)
    moved = replace(whole, out=str(tmp_path / "moved"))
    for ranks, steps in ((4, 4), (2, 7), (3, 10)):
        sgd = replace(
            whole, out=str(tmp_path / "sgd.pt"), model=replace(whole.model, vocab_size=128)
        )
        on_ranks([sgd, replace(moved, steps=steps)], tmp_path, world=ranks)
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    ends = [Trainer.load(latest(tmp_path / name)) for name in ("whole", "moved")]
    assert ends[0].samples == ends[1].samples == 120
    worlds = json.loads((tmp_path / "moved" / "environment.json").read_text())
    assert [start["world"] for start in worlds] == [4, 2, 3]


@pytest.mark.slow
def test_recomputation_and_a_guard_on_two_ranks_change_no_loss(runs, data, tmp_path):
    both = [replace(small(data, tmp_path / mode), recompute=mode) for mode in ("selective", "full")]
    first = replace(
        both[0], out=str(tmp_path / "sgd.pt"), model=replace(both[0].model, vocab_size=128)
    )
    guarded = replace(small(data, tmp_path / "guarded"), spike_limit=10.0)
    on_ranks([first, *both, guarded], tmp_path)
    for mode in ("selective", "full", "guarded"):
        assert losses(tmp_path / mode) == losses(runs / "two")


def test_shards_that_do_not_divide_the_ranks_are_refused():
    assert [check_shards(n, world=8) for n in (0, 1, 2, 8)] == [8, 1, 2, 8]
    with pytest.raises(
        InputError, match=r"--shards 3 does not divide 8 ranks; one of \[1, 2, 4, 8"
    ):
        check_shards(3, world=8)


@pytest.mark.slow
def test_four_ranks_give_the_losses_of_one_process(runs, data, tmp_path):
    one = small(data, tmp_path / "four")
    shape = replace(one.model, vocab_size=128)
    first = replace(one, out=str(tmp_path / "sgd-four.pt"), model=shape)
    on_ranks([first, one], tmp_path, world=4)
    assert losses(tmp_path / "four") == pytest.approx(losses(runs / "one"), rel=1e-5)
    one_step, four = (
        torch.load(path, weights_only=True)
        for path in (runs / "sgd-one.pt", tmp_path / "sgd-four.pt")
    )
    for name in one_step:  # fp32 gradients of size 0.1, summed in another order
        torch.testing.assert_close(four[name], one_step[name], rtol=0.0, atol=1e-6)


def test_one_process_needs_no_group_and_several_need_their_variables(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with world("cpu") as here:
        assert (here.rank, here.size, here.add(2, 3.5), here.share("x")) == (0, 1, [2, 3.5], "x")
        assert not torch.distributed.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match="MASTER_ADDR"), world("cpu"):
        pass


def test_bf16_leaves_weights_in_fp32():
    here = World(device=torch.device("cpu"))
    layer = torch.nn.Linear(4, 4)
    with compute(here, precision="bf16"):
        assert layer(torch.ones(1, 4)).dtype == torch.bfloat16
    with compute(here, precision="fp32"):
        assert layer(torch.ones(1, 4)).dtype == torch.float32
    assert layer.weight.dtype == torch.float32


@pytest.mark.slow
def test_our_attention_under_fsdp_learns_what_sdpa_learns_on_one_process(data, tmp_path):
    """Two gloo ranks with kernels that triton interprets; three updates through the real loop."""
    pytest.importorskip("triton")
    one = replace(small(data, tmp_path / "one"), steps=3)
    train(one)
    two = replace(one, out=str(tmp_path / "two"), attention="triton")
    first = replace(one, out=str(tmp_path / "sgd.pt"), model=replace(one.model, vocab_size=128))
    cache = {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    on_ranks([first, two], tmp_path, **cache)
    # fp32 kernels in another order of sums: 3e-7 a layer, through AdamW's division by small roots.
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_attention_that_cannot_run_here_is_refused_before_anything_is_written(data, tmp_path):
    with pytest.raises(InputError, match=r"--attention triton.*wanted cuda"):
        train(replace(small(data, tmp_path / "run"), attention="triton"))
    assert not (tmp_path / "run").exists()


def test_a_model_made_without_memory_gets_the_weights_of_one_made_with():
    run = recipe("tiny")
    config = replace(run.model, vocab_size=128)
    model = on_meta(config)
    root = torch.nn.ModuleDict({"model": model})
    here = World(device=torch.device("cpu"))
    parallelize(root, model.layers, here, precision="fp32")
    initialise(model, 7)
    wanted = build(config, seed=7).state_dict()
    assert model.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
