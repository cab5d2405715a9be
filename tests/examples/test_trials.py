"""What the experiments share, and the experiment on scenes in small."""

import json

import numpy as np
import pytest

from examples import trials
from examples.scenes import Scenes, arrange, main
from examples.trials import interval, step, written
from tokenizer.cli import CommandError, InputError
from tokenizer.images import save_image


def test_the_interval_is_students():
    stats = pytest.importorskip("scipy.stats", reason="the oracle; scikit-image brings it")
    for n, quantile in trials.T95.items():
        assert quantile == pytest.approx(stats.t.ppf(0.975, n), abs=5e-4)  # three decimals
    values = [1.0, 2.0, 4.0]
    found = interval(values)
    half = stats.t.ppf(0.975, 2) * stats.sem(values)
    assert found["mean"] == pytest.approx(7 / 3)
    assert found["high"] - found["mean"] == pytest.approx(half, rel=1e-3)
    assert found["mean"] - found["low"] == pytest.approx(half, rel=1e-3)
    assert interval([3.0]) == {"mean": 3.0, "low": None, "high": None, "n": 1}
    assert written(found, digits=1) == "2.3 [-1.5, 6.1]"
    assert written(interval([0.5]), scale=100, digits=0) == "50"


def test_a_step_is_run_once_and_its_failure_is_said(tmp_path):
    done, log = tmp_path / "done", tmp_path / "log"
    step("timeit", "-n1", "-r1", f"open({str(done)!r}, 'w').close()", done=done, log=log)
    before = log.read_text()
    step("timeit", "-n1", "-r1", "1 / 0", done=done, log=log)
    assert log.read_text() == before
    with pytest.raises(CommandError, match=f"timeit failed; {log} says why"):
        step("timeit", "-n1", "-r1", "1 / 0", done=tmp_path / "never", log=log)
    assert "ZeroDivisionError" in log.read_text()


@pytest.fixture
def pictures(tmp_path):
    """Twenty walks through each of two maps, of two frames, dark ones and bright ones."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(("cave", "sky")):
        for walk in range(20):
            folder = tmp_path / "pictures/train/rgb" / f"{name}-{walk:02d}"
            folder.mkdir(parents=True)
            for frame in range(2):
                pixels = rng.integers(0, 90, (32, 32, 3)) + 150 * number
                save_image(folder / f"{frame:03d}.png", pixels.astype(np.uint8))
    return tmp_path / "pictures"


def test_walks_are_held_out_whole(pictures, tmp_path):
    tree = arrange(Scenes(pictures=pictures, out=tmp_path / "out"))
    found = {
        split: sorted(p.relative_to(tree / split).as_posix() for p in (tree / split).rglob("*.png"))
        for split in ("train", "val")
    }
    assert [len(found[split]) for split in ("train", "val")] == [60, 20]
    walks = {split: {name.split("_")[0] for name in names} for split, names in found.items()}
    assert not walks["train"] & walks["val"]
    assert {"cave/cave-03", "sky/sky-19"} <= walks["val"] and len(walks["val"]) == 10
    with pytest.raises(InputError, match="render first"):
        arrange(Scenes(pictures=tmp_path / "none", out=tmp_path / "other"))


@pytest.mark.slow
def test_the_experiment_on_scenes_runs_and_goes_on(pictures, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="draws the curves; in the extra demo")
    command = Scenes(
        pictures=pictures, out=tmp_path / "out", steps=2, seeds=(0, 1), epochs=1,
        only=("linear", "knn"),
    )  # fmt: skip
    main(command)
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["images"]["train"] == 60 and found["images"]["groups"] == 10
    assert set(found["top1"]) == {"model", "random", "pixels"}
    assert found["top1"]["pixels"]["knn"]["mean"] == 1.0  # dark and bright are told apart
    assert (tmp_path / "out/curve.png").is_file()
    assert len((tmp_path / "out/table.md").read_text().splitlines()) == 7
    capsys.readouterr()
    main(command)
    assert "python -m" not in capsys.readouterr().out  # nothing was run again
