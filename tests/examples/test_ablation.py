"""The ablation of the tokenizer: arms, table and figures of a very short one."""

import numpy as np
import pytest

from examples import ablation
from tokenizer.cli import InputError
from tokenizer.images import save_image


@pytest.fixture
def pictures(tmp_path, np_rng):
    for split, count in (("train", 12), ("heldout", 9)):
        folder = tmp_path / "pictures" / split
        folder.mkdir(parents=True)
        for i in range(count):
            coarse = np_rng.integers(0, 256, (4, 4, 3), np.uint8)
            save_image(folder / f"{i}.png", np.kron(coarse, np.ones((8, 8, 1), np.uint8)))
    return tmp_path / "pictures"


@pytest.mark.slow
def test_arms_are_trained_once_and_compared(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablation, "has_features", lambda: False)
    command = ablation.Ablation(
        pictures=pictures,
        out=tmp_path / "out",
        steps=10,
        image_size=32,
        arms=("preset", "codes by gradient", "perceptual term"),
    )
    ablation.main(command)
    said = capsys.readouterr().out
    assert "left out: perceptual term" in said and said.count("tokenizer.train") == 2
    rows = (command.out / "table.md").read_text().splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| preset", "| codes by gradient"]
    assert "not measured" in rows[2] and "1.00×" in rows[2] and "of 512" in rows[2]
    assert (command.out / "curves.png").stat().st_size > 0
    assert (command.out / "arms.png").stat().st_size > 0
    ablation.main(command)
    assert "tokenizer.train" not in capsys.readouterr().out


def test_unknown_arms_and_folders_are_refused(pictures, tmp_path):
    command = {"out": tmp_path / "out", "steps": 1}
    with pytest.raises(InputError, match="no arm 'presets'; wanted some of preset"):
        ablation.main(ablation.Ablation(pictures=pictures, arms=("presets",), **command))
    with pytest.raises(InputError, match=r"examples\.render"):
        ablation.main(ablation.Ablation(pictures=tmp_path, **command))
