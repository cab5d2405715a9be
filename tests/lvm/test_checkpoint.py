import errno
import os
import pickle
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lvm.checkpoint import Phase, Saver, Trainer, latest, load, load_model_state, tensors
from lvm.config import Optim
from lvm.model import build
from lvm.optim import optimisers
from lvm.recipes import recipe
from tokenizer.cli import CommandError, InputError, guarded
from tokenizer.world import World

ONE = World(device=torch.device("cpu"))


class Holder(nn.Module):
    """A trunk under the name that a learner gives it."""

    def __init__(self, *, seed: int, width: int = 16) -> None:
        super().__init__()
        config = replace(recipe("tiny").model, vocab_size=128, layers=1, width=width, ffn=24)
        self.model = build(config, seed=seed)


def stepped(*, seed: int, name: str = "adamw", width: int = 16):
    holder = Holder(seed=seed, width=width)
    made = optimisers(holder, Optim(name=name))
    holder.model(torch.arange(12).view(2, 6)).square().mean().backward()
    for optimiser in made:
        optimiser.step()
    return holder, made


def write(run, step, holder, made, *, keep=2, background=False, **values):
    saver = Saver(run, ONE, keep=keep, background=background)
    saver.save(Trainer(step=step, **values), model=holder, optimisers=made)
    return saver


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_what_was_saved_comes_back_bit_by_bit(tmp_path, name):
    holder, made = stepped(seed=1, name=name)
    phase = Phase(manifest="m", mixture={"a": 3}, first=0)
    write(tmp_path, 7, holder, made, samples=56, tokens=9, elapsed=1.5, phases=(phase,))
    folder = latest(tmp_path)
    other = Holder(seed=2)
    fresh = optimisers(other, Optim(name=name))
    load(folder, model=other, optimisers=fresh, world=ONE)
    found, expected = tensors(other, fresh), tensors(holder, made)
    assert found.keys() == expected.keys()
    assert len(found) > 2 * len(list(holder.parameters())) - 1  # optimiser state is among them
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    wanted = Trainer(step=7, samples=56, tokens=9, elapsed=1.5, phases=(phase,))
    assert Trainer.load(folder) == wanted


def test_weights_are_read_without_a_process_group_by_the_trunks_names(tmp_path):
    holder, made = stepped(seed=1)
    write(tmp_path, 1, holder, made)
    found = load_model_state(tmp_path)
    expected = holder.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_old_checkpoints_go_and_what_a_killed_save_left_goes(tmp_path):
    holder, made = stepped(seed=1)
    left = tmp_path / "checkpoints" / "step-00000002.tmp-save"
    left.mkdir(parents=True)
    (left / "__0_0.distcp").write_bytes(b"half")
    unnamed = tmp_path / "checkpoints" / "step-00000002"  # renamed, but killed before `latest`
    unnamed.mkdir()
    for step in (1, 2, 3):
        write(tmp_path, step, holder, made, keep=2)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000003"]
    assert latest(tmp_path).name == "step-00000003"
    assert load_model_state(tmp_path)


def test_a_checkpoint_of_another_shape_is_named(tmp_path):
    holder, made = stepped(seed=1, width=16)
    write(tmp_path, 1, holder, made)
    other = Holder(seed=1, width=32)
    with pytest.raises(
        InputError, match=r"model\.embed\.weight is \(128, 16\), wanted \(128, 32\)"
    ):
        load(latest(tmp_path), model=other, optimisers=optimisers(other, Optim()), world=ONE)


def test_a_run_without_a_checkpoint_says_so(tmp_path):
    assert latest(tmp_path) is None
    with pytest.raises(InputError, match="no checkpoint yet"):
        load_model_state(tmp_path)
    (tmp_path / "latest").write_text("step-00000009\n")
    with pytest.raises(InputError, match="step-00000009, which is not there"):
        latest(tmp_path)


def test_a_save_in_the_background_is_of_the_moment_it_was_asked_for(tmp_path):
    holder, made = stepped(seed=1)
    before = {name: value.clone() for name, value in holder.model.state_dict().items()}
    saver = write(tmp_path, 1, holder, made, background=True)
    with torch.no_grad():
        for parameter in holder.parameters():
            parameter.add_(1.0)  # training goes on while threads write
    saver.finish()
    found = load_model_state(tmp_path)
    assert all(torch.equal(found[name], before[name]) for name in before)
    saver.save(Trainer(step=2), model=holder, optimisers=made)
    saver.save(Trainer(step=3), model=holder, optimisers=made)  # waits for the one before
    assert (tmp_path / "checkpoints" / "step-00000002" / "trainer.json").is_file()
    saver.finish()
    assert latest(tmp_path).name == "step-00000003"


def test_a_save_that_fails_in_the_background_is_raised_by_the_next(tmp_path):
    holder, made = stepped(seed=1)
    write(tmp_path, 1, holder, made)
    saver = Saver(tmp_path, ONE, keep=2, background=True)
    blocked = tmp_path / "latest"
    blocked.unlink()
    blocked.mkdir()  # a file cannot be put in its place
    saver.save(Trainer(step=2), model=holder, optimisers=made)
    with pytest.raises(OSError, match="latest"):
        saver.finish()


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_one_message(tmp_path, monkeypatch, capsys, background):
    def full(self, plan, planner):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    holder, made = stepped(seed=1)
    write(tmp_path, 1, holder, made)
    monkeypatch.setattr("lvm.checkpoint._Writer.write_data", full)
    code = guarded(
        lambda: write(tmp_path, 2, holder, made, background=background).finish(), prog="train"
    )
    assert code == 1
    said = capsys.readouterr().err
    assert re.search("train: .*No space left on device.* run the command again", said)
    assert latest(tmp_path).name == "step-00000001"


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (flip, r"__0_0\.distcp is damaged: its SHA-256"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is damaged"),
        (lambda path: path.unlink(), r"__0_0\.distcp cannot be read"),
    ],
)
def test_a_damaged_file_is_named_and_the_way_back_too(tmp_path, harm, said):
    holder, made = stepped(seed=1)
    for step in (1, 2):
        write(tmp_path, step, holder, made)
    harm(latest(tmp_path) / "__0_0.distcp")
    fresh = Holder(seed=2)
    for read in (
        lambda: load_model_state(tmp_path),
        lambda: load(
            latest(tmp_path), model=fresh, optimisers=optimisers(fresh, Optim()), world=ONE
        ),
    ):
        with pytest.raises(CommandError, match=said + r".*latest: step-00000001"):
            read()
    (tmp_path / "latest").write_text("step-00000001\n")
    assert load_model_state(tmp_path)


HALF = """
import os, signal, sys
from pathlib import Path
import lvm.checkpoint as module
sys.path.insert(0, sys.argv[2])
from test_checkpoint import stepped, write
holder, made = stepped(seed=1)
write(Path(sys.argv[1]), 1, holder, made)
def die(self, plan, planner):
    super(module._Writer, self).write_data(plan, planner)
    os.kill(os.getpid(), signal.SIGKILL)  # the data is written, its index is not
module._Writer.write_data = die
write(Path(sys.argv[1]), 2, holder, made, background=True).finish()
"""


def test_a_checkpoint_killed_while_it_is_written_never_becomes_the_latest(tmp_path):
    here = Path(__file__)
    env = {**os.environ, "PYTHONPATH": str(here.parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", HALF, str(tmp_path), str(here.parent)]
    killed = subprocess.run(command, env=env, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {"step-00000001", "step-00000002.tmp-save"}
    assert latest(tmp_path).name == "step-00000001"
    holder, made = stepped(seed=1)
    write(tmp_path, 3, holder, made)
    assert latest(tmp_path).name == "step-00000003"
    assert not (tmp_path / "checkpoints" / "step-00000002.tmp-save").exists()


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_reading_a_checkpoint_runs_no_code_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    holder, made = stepped(seed=1)
    write(tmp_path, 1, holder, made)
    (latest(tmp_path) / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CommandError, match="mkdir has no place in a checkpoint"):
        load_model_state(tmp_path)
    assert not (tmp_path / "exploded").exists()
