"""Training: it learns, survives kill -9 to the bit, and refuses what it cannot go on with."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import tokenizer
from tokenizer import VQGANConfig, evaluate, presets, train
from tokenizer.cli import CommandError, InputError, run
from tokenizer.images import save_image
from tokenizer.metrics import psnr
from tokenizer.presets import Recipe
from tokenizer.trainer import Trainer
from tokenizer.world import World

MODEL = VQGANConfig(
    image_size=16,
    patch=2,
    channels=32,
    multipliers=(1, 2),
    res_blocks=1,
    latent_dim=16,
    code_dim=4,
    codebook_size=32,
    normalize_codes=True,
    pixel_range=(-1.0, 1.0),
)
RECIPE = Recipe(model=MODEL, steps=12, batch=8, plain=0.3, restart_every=2, lr=3e-3)


def shapes(n: int) -> Tensor:
    """Return uint8 [n, 3, 16, 16]: a coloured disc or square on a coloured ground."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:16, 0:16]
    colours = rng.integers(0, 256, (n, 2, 3)).astype(np.uint8)
    centres, radii = rng.integers(4, 12, (n, 2)), rng.integers(2, 6, n)
    images = np.empty((n, 16, 16, 3), np.uint8)
    for image, (back, front), (cy, cx), r in zip(images, colours, centres, radii, strict=True):
        inside = np.maximum(abs(y - cy), abs(x - cx)) < r
        if r % 2:
            inside = (y - cy) ** 2 + (x - cx) ** 2 < r * r
        image[:] = np.where(inside[..., None], front, back)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(autouse=True)
def one_thread():
    """Keep sums in one order, and cores free for others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for i, image in enumerate(shapes(24)):
        save_image(folder / f"{i}.png", image.permute(1, 2, 0).numpy())
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def train_on(pixels: Tensor, recipe: Recipe, *, steps: int) -> tuple[Trainer, list[float]]:
    trainer = Trainer(replace(recipe, steps=steps), World())
    losses = []
    while trainer.step < steps:
        fraction = trainer.fraction()
        if not trainer.quantizing and fraction >= recipe.plain:
            trainer.start_codes(iter([pixels] * 100))
        losses.append(float(trainer.learn(pixels, fraction)["reconstruction"]))
    return trainer, losses


@pytest.mark.parametrize("codes", ["ema", "gradient"])
def test_training_learns_coloured_shapes(codes) -> None:
    pixels = shapes(16)
    recipe = replace(RECIPE, codes=codes, precision="fp32")
    trainer, losses = train_on(pixels, recipe, steps=80)
    quality = evaluate.measure(trainer.model.eval(), pixels).summary()
    flat = pixels.float().mean((2, 3), keepdim=True).expand(pixels.shape)
    blank = psnr(flat / 255, pixels / 255).mean()
    assert losses[-1] < 0.4 * losses[0]
    assert quality["psnr"] > float(blank) + 3.0  # far better than the mean colour of each image
    assert quality["codes_used"] >= 24


def test_bf16_training_follows_fp32() -> None:
    pixels = shapes(16)
    _, exact = train_on(pixels, replace(RECIPE, precision="fp32"), steps=10)
    _, rough = train_on(pixels, replace(RECIPE, precision="bf16"), steps=10)
    # Ten steps of bf16 convolutions; codes that flip between near neighbours move a few percent.
    assert rough == pytest.approx(exact, rel=0.15) and rough != exact


def command(data: Path, out: Path, **changes: object) -> train.Train:
    values = {"recipe": RECIPE, "data": (data,), "out": out, "device": "cpu", "workers": 1}
    return train.Train(**{**values, **changes})


def weights(out: Path) -> dict[str, Tensor]:
    return tokenizer.load(out).state_dict()


def test_run_folder_is_a_tokenizer_with_its_history(data: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    train.main(command(data, out))
    model = tokenizer.load(out)
    assert model.config == MODEL
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
        "results.json",
        "run.json",
        "samples.png",
    ]
    results = json.loads((out / "results.json").read_text())
    assert results["id"] == model.id and results["steps"] == 12
    assert results["bad"] == {"not an image": 1} and results["parameters"] == MODEL.num_params()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 12]
    assert {"loss", "vq", "psnr", "codes_used", "perplexity", "images_per_second"} <= set(rows[0])
    asked = json.loads((out / "run.json").read_text())
    assert asked["asked"]["model"]["channels"] == 32 and "torch" in asked["versions"]
    assert re.search(r"held-out PSNR \d+\.\d+ dB.*codes used \d+ of 32", capsys.readouterr().out)

    before = (out / "model.safetensors").stat().st_mtime_ns
    train.main(command(data, out, recipe=replace(RECIPE, steps=99)))
    assert "is finished (12 steps)" in capsys.readouterr().out
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_run_killed_and_resumed_ends_with_the_same_bits(data: Path, tmp_path: Path) -> None:
    train.main(command(data, tmp_path / "whole", save_every=3))
    out = tmp_path / "killed"
    # Dies in the middle of step 9, after the checkpoint of step 6 and three rows' worth of work.
    code = (
        "import os, pathlib, signal, sys, torch\n"
        "sys.path[:0] = sys.argv[3:]\n"
        "torch.set_num_threads(1)\n"
        "from tokenizer import train\n"
        "from tokenizer.trainer import Trainer\n"
        "import test_train_tokenizer as here\n"
        "step = Trainer.learn\n"
        "def learn(self, *args):\n"
        "    result = step(self, *args)\n"
        "    if self.step == 9: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return result\n"
        "Trainer.learn = learn\n"
        "data, out = map(pathlib.Path, sys.argv[1:3])\n"
        "train.main(here.command(data, out, save_every=3))\n"
    )
    places = [str(Path(__file__).parent), str(Path(tokenizer.__file__).parents[1])]
    done = subprocess.run([sys.executable, "-c", code, str(data), str(out), *places])
    assert done.returncode == -signal.SIGKILL
    assert (out / "training.pt").exists() and not (out / "results.json").exists()
    tokenizer.load(out)  # what is there is a whole tokenizer at any moment
    train.main(command(data, out, save_every=3))
    whole, resumed = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    rows = [
        [json.loads(r) for r in (p / "metrics.jsonl").read_text().splitlines()]
        for p in (tmp_path / "whole", out)
    ]
    timing = ("elapsed", "images_per_second")
    kept = [[{k: v for k, v in r.items() if k not in timing} for r in run] for run in rows]
    assert kept[0] == kept[1] and [r["step"] for r in kept[0]] == [3, 6, 9, 10, 12]


def test_run_told_to_stop_saves_and_goes_on_to_the_same_bits(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    out, learn = tmp_path / "run", Trainer.learn

    def told(self: Trainer, *args):
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "learn", told)
        train.main(command(data, out))
    assert "told to stop at step 5; the same command goes on" in capsys.readouterr().out
    train.main(command(data, out))
    assert "resuming" in capsys.readouterr().out
    train.main(command(data, tmp_path / "whole"))
    whole, stopped = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_looks_on_the_way_leave_figures_and_pictures_and_change_nothing(
    data: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen, blind = tmp_path / "seen", tmp_path / "blind"
    recipe = replace(RECIPE, model=replace(MODEL, dropout=0.1))  # it is off during a look
    train.main(command(data, seen, recipe=recipe, check_every=5, tensorboard=True))
    train.main(command(data, blind, recipe=recipe, check_every=0))
    assert all(torch.equal(a, weights(blind)[name]) for name, a in weights(seen).items())
    assert sorted(p.name for p in (seen / "pictures").iterdir()) == ["0000005.png", "0000010.png"]
    rows = [json.loads(line) for line in (seen / "metrics.jsonl").read_text().splitlines()]
    looks = [row for row in rows if "held_out_psnr" in row]
    assert [row["step"] for row in looks] == [5, 10] and 0 < looks[0]["held_out_codes_used"] <= 16
    events = EventAccumulator(str(seen / "tensorboard")).Reload()
    assert {"loss", "psnr", "held_out_psnr", "perplexity"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Images("held out")] == [5, 10]
    assert not (blind / "pictures").exists() and not (blind / "tensorboard").exists()


def test_tensorboard_that_is_not_there_is_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        train.main(command(data, tmp_path / "run", tensorboard=True))


def test_adamw_alone_learns_too() -> None:
    pixels = shapes(16)
    recipe = replace(RECIPE, optimizer="adamw", precision="fp32", weight_decay=0.05)
    trainer, losses = train_on(pixels, recipe, steps=40)
    assert losses[-1] < 0.6 * losses[0]
    decayed = {g["weight_decay"] for g in trainer.optimizer.optimizers[0].param_groups}
    assert len(trainer.optimizer.optimizers) == 1 and decayed == {0.0, 0.05}


def test_other_options_in_the_same_folder_are_refused(data: Path, tmp_path: Path) -> None:
    train.main(command(data, tmp_path / "run", recipe=replace(RECIPE, steps=2)))
    other = replace(RECIPE, steps=2, lr=1e-2, model=replace(MODEL, codebook_size=64))
    with pytest.raises(
        InputError, match=r"lr: 0.003 there, 0.01 now; model.codebook_size: 32 there"
    ):
        train.main(command(data, tmp_path / "run", recipe=other))
    (data / "more.png").write_bytes((data / "1.png").read_bytes())
    with pytest.raises(InputError, match="images: 24 there, 25 now"):
        train.main(command(data, tmp_path / "run", recipe=replace(RECIPE, steps=2)))
    with pytest.raises(InputError, match="holds no training run"):
        train.main(command(data, data))


def test_run_bounded_by_time_ends_and_keeps_its_phases(data: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, steps=None, seconds=0.5)
    train.main(command(data, tmp_path / "run", recipe=recipe, val=(data,)))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["seconds"] >= 0.5 and results["images"] == 24  # all of --val


def test_diverged_run_says_what_to_do(data: Path, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="lower --lr"):
        train.main(command(data, tmp_path / "run", recipe=replace(RECIPE, lr=1e30)))


def test_evaluate_writes_figures_and_pictures(data: Path, tmp_path: Path, capsys) -> None:
    torch.manual_seed(0)
    tokenizer.save(tokenizer.VQGAN(MODEL), tmp_path / "tok")
    evaluate.main(
        evaluate.Evaluate(folder=tmp_path / "tok", data=(data,), out=tmp_path / "ev", device="cpu")
    )
    said = capsys.readouterr().out
    assert "over 24 images" in said and "1 not an image" in said and "not measured" in said
    found = json.loads((tmp_path / "ev" / "evaluation.json").read_text())
    assert found["tokenizer"] == tokenizer.load(tmp_path / "tok").id and found["lpips"] is None
    assert (tmp_path / "ev" / "worst.png").stat().st_size > 0
    assert (tmp_path / "ev" / "typical.png").stat().st_size > 0
    evaluate.main(
        evaluate.Evaluate(folder=tmp_path / "tok", data=(data,), limit=5, batch=2, device="cpu")
    )
    # Of the five files tried the first one is the broken one.
    assert "over 4 images" in capsys.readouterr().out


def test_measured_values_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    model, pixels = tokenizer.VQGAN(MODEL).eval(), shapes(7)
    one, many = (evaluate.measure(model, pixels, batch=b) for b in (1, 7))
    torch.testing.assert_close(one.psnr, many.psnr, atol=1e-4, rtol=0)  # dB; fp32 convolutions
    assert torch.equal(one.counts, many.counts)


def test_presets_are_what_they_are_called() -> None:
    assert presets.tiny_f4().model.factor == 4
    assert presets.tiny_f4().model.codes_per_image == 64
    assert presets.tiny_f4().model.codebook_size == 512
    assert presets.small_f8().model.factor == 8
    assert presets.muse_f16_8192().model == VQGANConfig()
    published = presets.vq_f16_16384().model
    assert published.num_params() == 71_883_403  # LlamaGen's VQ-16
    assert published.codes_per_image == 256 and published.codebook_size == 16384


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"legacy_beta": True}, "--codes ema does not have"),
        ({"lpips_heads": Path("vgg.pth")}, "needs --perceptual"),
        ({"steps": None}, "--steps or --seconds"),
        ({"adversarial": -1.0}, "--adversarial -1.0"),
    ],
)
def test_recipe_that_contradicts_itself_is_refused(values, words: str) -> None:
    with pytest.raises(InputError, match=words):
        replace(RECIPE, **values)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, "muse_f16_8192"),
        (["tiny_f4", "--help"], 0, "--codebook-size"),
        (["tiny_f4"], 2, "--data"),
        (["huge"], 2, "tiny_f4"),
        (["tiny_f4", "--data", "{empty}", "--out", "{empty}/o"], 2, "has no images"),
        (["tiny_f4", "--data", "{empty}", "--out", "{empty}/o", "--batch", "0"], 2, "more than 0"),
    ],
)
def test_command_line_says_what_it_wants(
    arguments: list[str], code: int, words: str, tmp_path: Path, capsys
) -> None:
    filled = [a.format(empty=tmp_path) for a in arguments]
    with pytest.raises(SystemExit) as ended:
        run(train.command_line(), train.main, prog="train", args=filled)
    said = "".join(capsys.readouterr())
    assert ended.value.code == code, said
    assert words in said and "Traceback" not in said


@pytest.mark.parametrize("module", ["tokenizer.train", "tokenizer.evaluate"])
def test_modules_run_as_commands(module: str) -> None:
    root = Path(tokenizer.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=root
    )
    assert done.returncode == 0 and f"python -m {module}" in done.stdout
