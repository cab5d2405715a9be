"""Checkpoint files: what may be in them besides tensors, what may not, and damaged ones."""

import argparse
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tokenizer
from tokenizer import VQGAN, VQGANConfig
from tokenizer.cli import InputError
from tokenizer.formats.shapes import SIGNED


def network() -> dict[str, Tensor]:
    torch.manual_seed(0)
    config = VQGANConfig(
        channels=32, multipliers=(1, 2), latent_dim=16, code_dim=8, codebook_size=64
    )
    return VQGAN(config).state_dict()


def lightning_file(folder: Path, **extra: object) -> Path:
    path = folder / "last.ckpt"
    torch.save({"epoch": 3, "state_dict": network(), **extra}, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_read_as_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    state = network()
    torch.save({"state_dict": {k: v.to(dtype) for k, v in state.items()}}, tmp_path / "net.pth")
    loaded = tokenizer.load(tmp_path / "net.pth")
    assert {t.dtype for t in loaded.state_dict().values()} == {torch.float32}
    expected = state["encoder.conv_in.weight"].to(dtype).float()
    assert torch.equal(loaded.encoder.conv_in.weight, expected)


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A module in Lightning's place, to be imported by what saves a checkpoint."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    with monkeypatch.context() as patch:
        for parent in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, parent, types.ModuleType(parent))
        patch.setitem(sys.modules, name, module)
        yield module


def test_lightning_checkpoint_is_read_without_lightning(
    lightning: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for kind in ("ModelCheckpoint", "Mode"):
        body = {"__module__": lightning.__name__, "__init__": lambda self, *a: made.append(a)}
        setattr(lightning, kind, type(kind, (), body))
    lightning.Mode.__reduce__ = lambda self: (lightning.Mode, ("min",))
    state = lightning.ModelCheckpoint()
    state.best, state.mode = torch.zeros(3), lightning.Mode()
    path = lightning_file(tmp_path, callbacks={lightning.ModelCheckpoint: {"state": state}})
    made.clear()
    whole = torch.load(path, weights_only=False)  # with Lightning there, and no caution
    assert made == [("min",)] and isinstance(whole["callbacks"], dict)
    made.clear()
    allowed = set(torch.serialization.get_safe_globals())
    for name in [n for n in sys.modules if n.startswith("pytorch_lightning")]:
        monkeypatch.delitem(sys.modules, name)
    assert tokenizer.load(path).config.pixel_range == SIGNED
    assert not made  # nothing of Lightning ran
    assert set(torch.serialization.get_safe_globals()) == allowed  # nor is it allowed later


def test_arguments_of_a_training_beside_the_tensors_are_passed_over(tmp_path: Path) -> None:
    path = lightning_file(tmp_path, args=argparse.Namespace(lr=1e-4, codebook_size=16384))
    assert tokenizer.load(path).codebook_size == 64


class Command:
    """What a malicious checkpoint would hold: a call at unpickling."""

    def __init__(self, function, *args: object) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, print], ids=lambda f: f.__name__)
def test_code_in_a_checkpoint_is_named_and_not_run(function, tmp_path: Path, capfd) -> None:
    bad = Command(function, f"open({str(tmp_path / 'ran')!r}, 'w')")
    path = lightning_file(tmp_path, callbacks=bad)
    name = "posix.system" if function is os.system else function.__name__
    with pytest.raises(InputError, match=rf"cannot be read: it asks for .*{name}.*could run code"):
        tokenizer.load(path)
    assert not (tmp_path / "ran").exists() and not capfd.readouterr().out.count("open(")


def test_code_in_a_file_of_old_torch_is_not_run_either(tmp_path: Path) -> None:
    bad = {"state_dict": {}, "hook": Command(os.system, f"touch {tmp_path / 'ran'}")}
    torch.save(bad, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"cannot be read \(.*posix\.system.*\); copy"):
        tokenizer.load(tmp_path / "old.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.ckpt", b"", r"cannot be read"),
        ("x.pt", b"PK\x03\x04 and then nothing", r"cannot be read"),
        ("x.bin", b"\x80\x02garbage", r"cannot be read \(Unsupported operand 103\); copy"),
        ("x.safetensors", b"{}", r"cannot be read"),
        ("x.h5", b"", r"wanted \.safetensors, \.bin, \.pt, \.pth, \.ckpt"),
    ],
)
def test_file_that_is_no_checkpoint_is_refused(name, content, words, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        tokenizer.load(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "no plain table"),
        ({}, "no plain table"),
        ({"state_dict": {"a": 1}}, "a is none"),
        ({"fc.weight": torch.zeros(1)}, r"no VQ-GAN of a known family; its tensors: fc\.weight"),
        ({"state_dict": {"fc.weight": torch.zeros(1)}}, "cannot be known"),
    ],
)
def test_checkpoint_of_something_else_is_refused(content, words, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputError, match=words):
        tokenizer.load(tmp_path / "x.pt")


def test_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    path = lightning_file(tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match="cannot be read"):
        tokenizer.load(path)


def test_folder_with_several_checkpoints_asks_for_one(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        torch.save({"state_dict": network()}, tmp_path / name)
    with pytest.raises(InputError, match=r"has a\.pt, b\.pt; name the file"):
        tokenizer.load(tmp_path)
    assert tokenizer.load(tmp_path / "a.pt").codebook_size == 64
