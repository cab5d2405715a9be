"""The demo's driver: its programs take its commands, its stages are skipped and fail well."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

import tokenizer
from examples import answers, demo, render
from examples.tasks import PALETTES
from lvm import evaluate
from lvm.config import ModelConfig, Reads, Run
from lvm.evaluation.tasks import tasks_of
from lvm.export import write
from lvm.model import build
from lvm.recipes import recipe
from tokenizer import train
from tokenizer.cli import CommandError
from tokenizer.images import save_image
from visual_sentences import build as shards
from visual_sentences.manifest import Manifest


def parse(module: str, words: tuple[str, ...]) -> object:
    """Parse a command's words as its program does; a wrong option ends the process."""
    if module == "lvm.train":
        return tyro.cli(Run, default=recipe(words[0]), args=words[1:])
    command = {
        "examples.render": render.Render,
        "tokenizer.train": train.command_line(),
        "visual_sentences.build": shards.Build,
        "lvm.evaluate": evaluate.Evaluate,
        "examples.answers": answers.Answers,
    }[module]
    return tyro.cli(command, args=words)


@pytest.mark.parametrize("size", ["quick", "full"])
def test_every_command_of_the_demo_is_one_that_its_program_takes(size):
    parsed = {}
    for stage in demo.stages(demo.Demo(size=size, out=Path("x"))):
        for module, *words in stage.commands:
            parsed[module] = parse(module, tuple(words))
    wanted = demo.SIZES[size]
    assert parsed["tokenizer.train"].recipe.model.image_size == wanted.pixels
    assert parsed["tokenizer.train"].recipe.model.codes_per_image == wanted.codes_per_image
    assert parsed["examples.render"].size == wanted.pixels
    assert parsed["lvm.train"].data == "x/sentences"
    assert str(parsed["lvm.evaluate"].data) == "x/heldout" == str(parsed["examples.answers"].data)


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("targets/map07-03/005.png", "map07"),
        ("targets/e1m1-12/000.png", "e1m1"),
        ("targets/deadly_corridor-00/1.png", "deadly_corridor"),
    ],
)
def test_targets_are_grouped_by_map(key, place):
    assert re.search(demo.MAP, key)[1] == place


def test_the_demo_judges_segmentations_by_the_colours_they_are_painted_in():
    given = answers.palettes(["swap", "segment-c", "depth-warm", "segment-a", "segment-a"])
    assert [text.split("=")[0] for text in given] == ["segment-c", "segment-a"]
    found = tasks_of(["segment-a", "segment-c"], given)
    for name, task in found.items():
        assert (task.palette * 255).round().int().tolist() == PALETTES[name].tolist()


def test_a_stage_that_was_run_is_skipped_and_one_that_fails_says_so(tmp_path, capfd):
    good = demo.Stage(name="good", commands=(("timeit", "-n", "1", "pass"),))
    demo.run_stage(good, out=tmp_path, number=1, count=2)
    assert "python -m timeit -n 1 pass" in capfd.readouterr().out
    demo.run_stage(good, out=tmp_path, number=1, count=2)
    assert "there already" in capfd.readouterr().out
    bad = demo.Stage(name="bad", commands=(("no_such_module",),))
    with pytest.raises(CommandError, match="the stage bad ended with code 1"):
        demo.run_stage(bad, out=tmp_path, number=2, count=2)
    assert not (tmp_path / "stages/bad.json").exists()


def test_answers_are_written_for_every_kind_of_sentence(tmp_path, np_rng):
    """A random tokenizer and a random model: what is checked is what is asked and written."""
    config = tokenizer.VQGANConfig(
        image_size=16, channels=32, multipliers=(1,), patch=4, res_blocks=1, latent_dim=8,
        code_dim=8, codebook_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    tokenizer.save(tokenizer.VQGAN(config).eval(), tmp_path / "tok")
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        for i in range(8):
            noise = np_rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            save_image(tmp_path / folder / f"{i}.png", noise)
    sources = (
        'kind = "pair"\ninputs = "a"\ntargets = "b"',
        'kind = "pair"\ninputs = "a"\ntargets = "c"',
        'kind = "video"\npath = "b"',
        'kind = "image"\npath = "c"',
    )
    spec = "row_len = 128\n" + "".join(
        f'[[source]]\nname = "s{i}"\n{text}\n' for i, text in enumerate(sources)
    )
    (tmp_path / "mix.toml").write_text(spec)
    data = tmp_path / "data"
    shards.build(
        shards.Build(spec=tmp_path / "mix.toml", tokenizer=tmp_path / "tok", out=data, workers=1),
        log=lambda text: None,
    )
    manifest = Manifest.load(data)
    reads = Reads(
        layout="bos", codes=64, codes_per_image=16, row_len=128, image_size=16,
        tokenizer=manifest.tokenizer,
    )  # fmt: skip
    shape = ModelConfig(width=32, layers=1, heads=2, ffn=48, vocab_size=manifest.vocab.size)
    model = tmp_path / "model"
    write(build(shape, seed=0, reads=reads), model, format="native", dtype=torch.float32)
    command = answers.Answers(
        model=model, tokenizer=tmp_path / "tok", data=data, out=tmp_path / "out", prompts=4
    )
    answers.main(command)
    found = json.loads((tmp_path / "out/answers.json").read_text())
    names = {p.name for p in (tmp_path / "out").glob("*.png")}
    assert set(found["scores"]) == {"s0", "s1"}
    for part in found["scores"].values():
        assert part["n"] == 2
        kinds = {"right", "wrong", "none", "copy", "last", "mean"}
        assert set(part["figures"][part["primary"]]) == kinds
    for task in ("s0", "s1"):
        mine = {entry["place"]: entry for entry in found["analogies"] if entry["task"] == task}
        assert list(mine) == ["best", "worst"]  # of two, none is in the middle
        best, worst = (mine[place]["scores"]["right"]["psnr"] for place in mine)
        assert best >= worst
    for entry in found["analogies"]:
        assert len(entry["prompt"]) == len(entry["wrong_prompt"]) == 7
        assert set(entry["answers"]) == set(entry["scores"]) == {"right", "wrong", "none"}
        assert {*entry["prompt"], entry["target"], *entry["answers"].values()} <= names
    assert [len(found["sequences"][0][k]) for k in ("given", "drawn", "true")] == [6, 2, 2]
    assert [entry["kind"] for entry in found["sentences"]] == ["pair", "pair", "video", "image"]
    assert all(entry["rows"] for entry in found["sentences"])
    answers.main(replace(command, out=tmp_path / "again"))
    assert (tmp_path / "again/answers.json").read_text() == (
        tmp_path / "out/answers.json"
    ).read_text()
