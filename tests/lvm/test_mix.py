"""`--mix`: the shares of a training run without another build of its data."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lvm.checkpoint import Trainer, latest
from lvm.config import Run
from lvm.feed import CodeFeed
from lvm.recipes import recipe
from lvm.train import main, train
from tokenizer.cli import InputError, guarded


@pytest.fixture
def run(data, tmp_path) -> Run:
    """Two updates of the smallest model on 24 rows each of the sources a and b."""
    tiny = recipe("tiny")
    return replace(
        tiny,
        model=replace(tiny.model, layers=1, width=32, heads=2, ffn=48),
        precision="fp32",
        device="cpu",
        steps=2,
        save_every=2,
        log_every=1,
        data=str(data),
        out=str(tmp_path / "run"),
    )


def seen(run: Run, monkeypatch) -> dict[str, Counter[int]]:
    """Train and count the rows that were trained on and those of validations, by source."""
    found: dict[str, Counter[int]] = {"train": Counter(), "val": Counter()}
    batch = CodeFeed.batch

    def counted(self, rows):
        there = rows.source[rows.length > 0]
        found["train" if torch.is_grad_enabled() else "val"].update(there.tolist())
        return batch(self, rows)

    monkeypatch.setattr(CodeFeed, "batch", counted)
    train(run)
    monkeypatch.undo()
    return found


def test_a_mixture_changes_the_shares_of_training_and_not_those_of_validation(run, monkeypatch):
    mixed = replace(run, mix={"a": 3.0, "b": 1.0}, steps=6, eval_every=6, eval_rows=12)
    found = seen(mixed, monkeypatch)
    assert found["train"] == {0: 36, 1: 12}  # 6 × 8 rows are a virtual epoch
    assert found["val"] == {0: 6, 1: 6}
    resolved = Run.from_json(json.loads((Path(run.out) / "config.json").read_text()))
    assert resolved.mix == {"a": 3.0, "b": 1.0}
    assert Trainer.load(latest(Path(run.out))).phases[0].mixture == {"a": 36, "b": 12}


def test_a_source_that_the_mixture_does_not_name_is_not_read(run, monkeypatch):
    only = replace(run, mix={"b": 5.0})
    assert seen(only, monkeypatch)["train"] == {1: 16}
    assert Trainer.load(latest(Path(run.out))).phases[0].mixture == {"a": 0, "b": 24}


def test_a_run_goes_on_with_its_own_mixture_alone(run):
    mixed = replace(run, mix={"a": 3.0, "b": 1.0})
    train(mixed)
    with pytest.raises(InputError, match=r"mix\.a: 3\.0, now None; mix\.b: 1\.0, now None"):
        train(replace(run, steps=4))
    with pytest.raises(InputError, match=r"mix\.b: 1\.0, now 2\.0"):
        train(replace(mixed, mix={"a": 3.0, "b": 2.0}, steps=4))
    (Path(run.out) / "config.json").unlink()  # then what the checkpoint says is compared
    with pytest.raises(InputError, match=r"in shares \{'a': 36, 'b': 12\}, this is"):
        train(replace(run, steps=4))
    assert train(replace(mixed, steps=4)) == 0
    assert Trainer.load(latest(Path(run.out))).samples == 32


def test_a_run_from_before_the_option_goes_on(run):
    train(run)
    path = Path(run.out) / "config.json"
    old = json.loads(path.read_text())
    del old["mix"]
    path.write_text(json.dumps(old))
    assert train(replace(run, steps=3)) == 0


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        (("c", "1"), 'the mixture names "c", which has no rows of split "train"; there are a, b'),
        (("a", "0"), 'the mixture gives "a" 0.0; wanted a number above 0'),
        (("a", "nan"), 'the mixture gives "a" nan; wanted a number above 0'),
        (("a",), "Failed to parse"),
    ],
)
def test_a_wrong_mixture_is_refused_before_anything_is_written(run, capsys, mix, message):
    args = ["tiny", "--data", run.data, "--out", run.out, "--device", "cpu", "--mix", *mix]
    with pytest.raises(SystemExit) as ended:
        guarded(lambda: main(args), prog="train")
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not Path(run.out).exists()


def test_image_shards_are_refused(run, make_data, tmp_path):
    images = make_data(tmp_path / "images")
    manifest = images / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"form": "images"}))
    with pytest.raises(InputError, match="holds images, wanted codes"):
        train(replace(run, data=str(images)))
    assert not Path(run.out).exists()
