"""Laws with known coefficients, noise, run folders as the trainer writes them, and mistakes."""

import json
import math
import sys
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from lvm.config import Run
from lvm.planning.law import Law, Point, enough, fit
from lvm.recipes import recipe, recipes
from lvm.scaling import Scaling, band, main, read_run, read_runs
from lvm.train import train
from tokenizer.cli import InputError

CHINCHILLA = Law(E=1.69, A=406.4, a=0.34, B=410.7, b=0.28)  # Hoffmann et al. 2022, equation 10
SIZES, LENGTHS = (1e7, 3e7, 1e8, 3e8, 1e9), (1e9, 3e9, 1e10, 3e10)


def points(law: Law, *, noise: float = 0.0, seed: int = 0) -> list[Point]:
    rng = np.random.default_rng(seed)
    return [
        Point(
            name=f"{n:g}-{d:g}",
            params=n,
            tokens=d,
            loss=law.loss(n, d) * math.exp(noise * rng.standard_normal()),
        )
        for n in SIZES
        for d in LENGTHS
    ]


@pytest.mark.parametrize(
    "law",
    [
        CHINCHILLA,
        Law(E=3.2, A=8.0, a=0.2, B=900.0, b=0.45),
        Law(E=0.5, A=60.0, a=0.5, B=9.0, b=0.1),
    ],
    ids=["chinchilla", "shallow in size", "shallow in length"],
)
def test_a_law_without_noise_is_found(law):
    """Losses are exact to 1e-16; the flattest direction of the fit loses some nine digits."""
    found = fit(points(law), resamples=0)
    assert found.explained == pytest.approx(1.0)
    for name in ("E", "A", "a", "B", "b"):
        assert getattr(found.law, name) == pytest.approx(getattr(law, name), rel=1e-5), name


def test_noise_of_a_thousandth_leaves_the_optimum_within_its_band():
    """20 runs, 0.1 %: what several seeds of one run differ by. Exponents to 10 %, E to 3 %."""
    found = fit(points(CHINCHILLA, noise=1e-3), resamples=100)
    law = asdict(found.law)
    assert law["E"] == pytest.approx(1.69, rel=0.03)
    assert (law["a"], law["b"]) == pytest.approx((0.34, 0.28), rel=0.1)
    assert 3e-4 < found.residual < 2e-3 and found.explained > 0.999
    low, high = band(law.best(1e21)[0] for law in found.resampled)
    assert low < CHINCHILLA.best(1e21)[0] < high and high < 2 * low


def test_one_bad_run_does_not_bend_the_law():
    runs = points(CHINCHILLA)
    runs[7] = replace(runs[7], loss=2 * runs[7].loss)
    assert fit(runs, resamples=0).law.b == pytest.approx(0.28, rel=0.02)


def test_the_best_split_is_the_lowest_loss_at_its_flops():
    for flops in (1e19, 1e23):
        params, tokens = CHINCHILLA.best(flops)
        assert 6 * params * tokens == pytest.approx(flops)
        least = CHINCHILLA.loss(params, tokens)
        for factor in (0.9, 1.1):
            assert CHINCHILLA.loss(params * factor, tokens / factor) > least


def test_same_seed_same_bands():
    runs = points(CHINCHILLA, noise=1e-3)
    one, two, other = (fit(runs, resamples=20, seed=seed).resampled for seed in (0, 0, 1))
    assert one == two and one != other


def test_what_can_tell_five_unknowns_apart():
    runs = points(CHINCHILLA)
    assert enough(runs) and not enough(runs[:5])
    assert not enough(runs[:8])  # two sizes
    assert not enough([p for p in runs if p.tokens < 5e9])  # two lengths


def write_run(folder: Path, *, width: int, steps: int, loss: float, val: bool = True) -> Path:
    """Write a run folder with the trainer's files and fields, of 1000 tokens an update."""
    folder.mkdir(parents=True)
    run = recipe("tiny")
    run = replace(run, model=replace(run.model, width=width, vocab_size=128), out=str(folder))
    (folder / "config.json").write_text(json.dumps(run.to_json()))
    (folder / "DONE").write_text("done\n")
    rows = [
        {"step": step, "split": "train", "tokens": step * 1000, "nll": value}
        for step, value in ((steps // 2, 9.0), (steps, loss + 0.01))
    ]
    if val:
        rows += [
            {"step": s, "split": "val", "nll": v} for s, v in ((steps // 2, 9.0), (steps, loss))
        ]
    text = "\n".join(json.dumps(row) for row in rows)
    (folder / "metrics.jsonl").write_text(text + '\n{"step": 9')  # and a line cut off
    return folder


def params(width: int) -> int:
    return replace(recipe("tiny").model, width=width).num_params(embeddings=False)


LOCAL = Law(E=2.0, A=40.0, a=0.35, B=300.0, b=0.4)


@pytest.fixture
def ladder(tmp_path) -> list[Path]:
    return [
        write_run(
            tmp_path / f"{width}-{steps}",
            width=width,
            steps=steps,
            loss=LOCAL.loss(params(width), steps * 1000),
        )
        for width in (32, 64, 128)
        for steps in (100, 400, 1600)
    ]


def test_run_folders_to_law_plot_and_json(ladder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "law"
    main(Scaling(runs=tuple(ladder), out=out, resamples=20, flops=(1e13,)))
    text = capsys.readouterr().out
    values = json.loads((out / "scaling.json").read_text())
    assert values["split"] == "val" and not values["weak"] and "WEAK" not in text
    assert values["law"]["E"] == pytest.approx(2.0, rel=1e-3)
    assert values["law"]["a"] == pytest.approx(0.35, rel=1e-3)
    assert [row["flops"] for row in values["best"]] == [1e13]
    assert values["best"][0]["params"] == pytest.approx(LOCAL.best(1e13)[0], rel=1e-3)
    assert len(values["runs"]) == 9 and values["runs"][0]["params"] == params(32)
    assert (out / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert str(ladder[0]) in text and "scaling.png" in text


def test_without_matplotlib_the_rest_is_there(ladder, tmp_path, capsys, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    main(Scaling(runs=tuple(ladder), out=tmp_path, resamples=0))
    assert "no scaling.png: matplotlib does not import here" in capsys.readouterr().out
    values = json.loads((tmp_path / "scaling.json").read_text())
    assert values["bands"]["E"] == [] and len(values["best"]) == 4


def test_noise_alone_is_called_weak(tmp_path, capsys):
    rng = np.random.default_rng(0)
    runs = [
        write_run(
            tmp_path / f"{w}-{s}", width=w, steps=s, loss=3 * math.exp(0.05 * rng.standard_normal())
        )
        for w in (32, 64, 128)
        for s in (100, 400, 1600)
    ]
    main(Scaling(runs=tuple(runs), out=tmp_path, resamples=20))
    assert "WEAK" in capsys.readouterr().out
    values = json.loads((tmp_path / "scaling.json").read_text())
    assert values["weak"] and values["explained"] < 0.5


def test_a_size_that_does_not_matter_is_called_undetermined(tmp_path, capsys):
    runs = [
        write_run(tmp_path / f"{w}-{s}", width=w, steps=s, loss=LOCAL.loss(1e9, s * 1000))
        for w in (32, 64, 128)
        for s in (100, 400, 1600)
    ]
    main(Scaling(runs=tuple(runs), out=tmp_path, resamples=20))
    assert "WEAK: these runs do not determine a;" in capsys.readouterr().out
    values = json.loads((tmp_path / "scaling.json").read_text())
    assert values["weak"] and values["undetermined"] == ["a"] and values["explained"] > 0.99


def test_the_loss_is_the_last_one_of_the_split(ladder, tmp_path):
    found, split = read_runs(ladder, "train")
    assert split == "train"
    assert found[0].loss == pytest.approx(LOCAL.loss(params(32), 1e5) + 0.01)
    early = ladder[0] / "metrics.jsonl"  # validated before the end alone
    kept = [line for line in early.read_text().splitlines() if '"val"' not in line or "9.0" in line]
    early.write_text("\n".join(kept))
    assert set(read_run(ladder[0])) == {"train"}
    assert read_runs(ladder, "auto")[1] == "train"
    with pytest.raises(InputError, match=r"no val loss after the last update in .*32-100"):
        read_runs(ladder, "val")


def test_mistakes_are_told_with_what_to_do(ladder, tmp_path):
    with pytest.raises(InputError, match=r"5 runs of 2 sizes and 3 lengths.*ladder_"):
        read_runs(ladder[:5], "auto")
    with pytest.raises(InputError, match=r"nowhere is no run folder.*no config\.json"):
        read_runs([tmp_path / "nowhere"], "auto")
    (ladder[1] / "DONE").unlink()
    with pytest.raises(InputError, match="is not finished"):
        read_runs(ladder, "auto")
    with pytest.raises(InputError, match="have to be positive"):
        main(Scaling(runs=(), flops=(-1.0,)))
    lines = '{"step": 4, "split": "train", "tokens": 9, "nll": NaN}'
    (ladder[0] / "metrics.jsonl").write_text(lines)
    with pytest.raises(InputError, match=r"loss of .* is nan; leave the run out"):
        read_runs(ladder, "train")


def test_the_rungs_are_a_ladder():
    """Each two to six times the one below, alike in all that is not size."""
    runs = sorted(
        (run() for name, run in recipes().items() if name.startswith("ladder_")),
        key=lambda run: run.model.num_params(embeddings=False),
    )
    sizes = [run.model.num_params(embeddings=False) for run in runs]
    assert all(2 < b / a < 6 for a, b in pairwise(sizes)) and len(sizes) == 6
    rates = [run.optim.lr for run in runs]
    assert rates == sorted(rates, reverse=True)

    def rest(run: Run) -> Run:
        same = replace(run.optim, lr=1.0, muon_lr=1.0)
        return replace(run, recipe="", model=runs[0].model, optim=same)

    assert all(rest(run) == rest(runs[0]) for run in runs)


def test_a_run_of_the_trainer_is_read(data, tmp_path):
    run = replace(
        recipe("ladder_200k"),
        data=str(data),
        out=str(tmp_path / "run"),
        device="cpu",
        steps=2,
        batch_rows=4,
        eval_every=2,
        eval_rows=4,
        log_every=1,
    )
    train(run)
    found = read_run(tmp_path / "run")
    assert set(found) == {"train", "val"}
    assert found["val"].params == run.model.num_params(embeddings=False)
    assert found["val"].tokens == 2 * 4 * 32
    assert found["val"].loss == pytest.approx(math.log(128), abs=0.5)  # all but untrained
