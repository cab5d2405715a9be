"""Training on two real gloo ranks: the numbers of one process, and kill -9 to the bit."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tokenizer
from tokenizer import train
from tokenizer.cli import InputError
from tokenizer.images import save_image
from tokenizer.world import World

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("ranks_tokenizer", HERE / "ranks_tokenizer.py")
ranks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ranks)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for i in range(26):
        coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
        save_image(folder / f"{i}.png", coarse.repeat(4, 0).repeat(4, 1))
    return folder


def start(runs: list[dict[str, Any]], folder: Path, *, world: int = 2) -> list[subprocess.Popen]:
    listing = folder / "runs.json"
    listing.write_text(json.dumps(runs))
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
    }
    return [
        subprocess.Popen(
            [sys.executable, str(HERE / "ranks_tokenizer.py"), str(listing)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def rows(out: Path) -> list[dict[str, float]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    timing = {"elapsed", "images_per_second"}
    return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]


def test_two_ranks_give_the_numbers_of_one_and_survive_a_kill(data: Path, tmp_path: Path) -> None:
    job = {"data": str(data)}
    doomed = start([{**job, "out": str(tmp_path / "killed"), "die_at": 7}], tmp_path)
    for process in doomed:
        process.communicate(timeout=120)
    assert [p.returncode for p in doomed] == [-signal.SIGKILL] * 2
    assert (tmp_path / "killed" / "training.pt").exists()  # of step 6

    runs = [{**job, "out": str(tmp_path / name)} for name in ("killed", "whole")]
    runs.append({**job, "out": str(tmp_path / "two.pt"), "gradients": True})
    said = [p.communicate(timeout=120) for p in start(runs, tmp_path)]
    assert "resuming" in said[0][0] and "held-out PSNR" in said[0][0], said[0]
    assert not said[1][0], "only the first rank speaks"
    whole, resumed = (tokenizer.load(tmp_path / n).state_dict() for n in ("whole", "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert rows(tmp_path / "whole") == rows(tmp_path / "killed")

    ranks.gradients(data, tmp_path / "one.pt", World())
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("one", "two"))
    assert one.keys() == two.keys() and "judge.main.0.weight" in one and "counts" in one
    for name, values in one.items():
        # fp32 sums over two halves of the batch instead of one
        torch.testing.assert_close(two[name], values, rtol=1e-4, atol=1e-5, msg=name)


def test_batch_that_does_not_divide_is_refused_with_what_would(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "open_world", lambda device: nullcontext(World(size=3)))
    with pytest.raises(InputError, match="does not divide by 3"):
        train.main(ranks.command(data, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
