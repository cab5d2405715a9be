"""The prompt command from files to files, and each way a prompt can be wrong."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

import lvm
import tokenizer
from lvm import export
from lvm.prompt import Prompt, main
from tokenizer.cli import InputError
from tokenizer.config import VQGANConfig
from tokenizer.images import read_image, save_image
from tokenizer.vqgan import VQGAN

SIDE = 8  # pixels of the tokenizer's images, 4 codes each


@pytest.fixture(scope="module")
def tok(tmp_path_factory) -> Path:
    config = VQGANConfig(
        image_size=SIDE, channels=32, multipliers=(1, 1, 1), res_blocks=1, latent_dim=4, code_dim=4,
        codebook_size=40,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = VQGAN(config)
        torch.nn.init.normal_(made.quantize.embedding.weight)
    folder = tmp_path_factory.mktemp("tok")
    tokenizer.save(made, folder)
    return folder


@pytest.fixture
def place(make_model, tok, tmp_path, np_rng) -> Path:
    """A folder with a model of 6 images a row and pictures 0.png to 6.png of odd sizes."""
    model = make_model(tokenizer=tokenizer.load(tok).id)
    export.write(model, tmp_path / "model")
    for i in range(7):
        save_image(tmp_path / f"{i}.png", np_rng.integers(0, 256, (9 + i, 14, 3), np.uint8))
    return tmp_path


@pytest.fixture
def analogy(place, tok) -> Prompt:
    """Two pairs and a query, one answer."""
    files = [place / f"{i}.png" for i in range(5)]
    return Prompt(
        model=place / "model",
        tokenizer=tok,
        pair=((files[0], files[1]), (files[2], files[3])),
        query=files[4],
        out=place / "new" / "out.png",
    )


def pixels(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path))


def test_an_analogy_gives_the_image_that_complete_gives(analogy, tok, place, capsys):
    main(analogy)
    images = np.stack([read_image(place / f"{i}.png", size=SIDE) for i in range(5)])
    floats = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    frames = lvm.complete(lvm.load(analogy.model), tokenizer.load(tok), floats)
    wanted = (frames[0, 0] * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(pixels(analogy.out), wanted)
    assert sorted(p.name for p in analogy.out.parent.iterdir()) == ["out-sheet.png", "out.png"]
    said = capsys.readouterr().out
    assert "candidate 1:" in said
    assert "out-sheet.png" in said


def test_the_sheet_shows_pairs_then_query_and_answer(analogy, place):
    main(analogy)
    sheet = pixels(analogy.out.with_stem("out-sheet"))
    scale, gap = 96 // SIDE, 2
    step = SIDE * scale + gap
    assert sheet.shape == (3 * step + gap, 2 * step + gap, 3)
    cells = [
        sheet[gap + r * step : (r + 1) * step : scale, gap + c * step : (c + 1) * step : scale]
        for r in range(3)
        for c in range(2)
    ]
    shown = [read_image(place / f"{i}.png", size=SIDE) for i in range(5)] + [pixels(analogy.out)]
    assert all(np.array_equal(cell, image) for cell, image in zip(cells, shown, strict=True))


def test_candidates_are_a_grid_and_numbered_files(analogy):
    main(replace(analogy, candidates=3))
    folder = analogy.out.parent
    names = ["out-1.png", "out-2.png", "out-3.png", "out-sheet.png", "out.png"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert pixels(analogy.out).shape == (3 * (SIDE + 2) + 2, SIDE + 4, 3)
    first = pixels(folder / "out-1.png")
    assert np.array_equal(pixels(analogy.out)[2 : 2 + SIDE, 2 : 2 + SIDE], first)
    main(analogy)
    assert np.array_equal(pixels(analogy.out), first)  # the first of three is the only one of one


def test_frames_are_continued_past_the_row(place, tok):
    command = Prompt(
        model=place / "model",
        tokenizer=tok,
        frames=tuple(place / f"{i}.png" for i in range(5)),
        new=3,
        candidates=2,
        out=place / "next.png",
    )
    main(command)
    single = {f"next-{c}-{f}.png" for c in (1, 2) for f in (1, 2, 3)}
    assert single <= {p.name for p in place.iterdir()}
    assert pixels(place / "next.png").shape == (2 * (SIDE + 2) + 2, 3 * (SIDE + 2) + 2, 3)
    assert pixels(place / "next-sheet.png").shape[1] == 8 * (96 + 2) + 2


def test_the_options_reach_the_sampling(analogy):
    def answer(**changes) -> bytes:
        main(replace(analogy, **changes))
        return analogy.out.read_bytes()

    plain = answer()
    assert plain == answer()
    assert plain != answer(seed=1)
    greedy = answer(temperature=0.0)
    assert greedy == answer(temperature=0.0, seed=1) == answer(top_k=1, seed=2)


def test_bad_prompts_are_refused_by_what_is_wrong(analogy, place, tok, make_model):
    def refused(words: str, **changes) -> None:
        with pytest.raises(InputError, match=words):
            main(replace(analogy, **changes))
        assert not analogy.out.exists()

    q = analogy.query
    (place / "text.png").write_text("no image")
    (place / "cut.png").write_bytes((place / "1.png").read_bytes()[:60])
    refused("--query is missing", query=None)
    refused("give --pair … --query, or --frames", query=None, pair=())
    refused("--frames is a prompt of its own", frames=(q,))
    refused("--new 2 goes with --frames", new=2)
    refused("prompt of 9 images is too long: a row of this model has 6", pair=analogy.pair * 2)
    refused(r"ends in \.png", out=analogy.out.with_suffix(".jpg"))
    refused("its folder cannot be made", out=q / "x" / "out.png")
    refused(r"text\.png \(not an image\).*none\.png \(missing file\)",
            pair=((place / "text.png", q), (place / "none.png", q)))  # fmt: skip
    refused(r"cut\.png \((truncated|unreadable)\)", query=place / "cut.png")
    refused("no tokenizer folder", tokenizer=place / "nowhere")
    refused("no model folder", model=place / "nowhere")
    refused("at least 1", candidates=0)
    export.write(make_model(tokenizer="0" * 64), place / "other")
    refused("the same code is another picture", model=place / "other")
    export.write(make_model(codes=50), place / "more")
    refused("the tokenizer has 40 codes, 4 an image; the model was trained on 50",
            model=place / "more")  # fmt: skip


def test_repeated_pairs_and_lists_of_frames_are_parsed():
    common = ["m", "--tokenizer", "t", "--out", "o.png"]
    pairs = ["--pair", "a", "b", "--pair", "c", "d", "--query", "q"]
    found = tyro.cli(Prompt, args=[*common, *pairs])
    assert found.pair == ((Path("a"), Path("b")), (Path("c"), Path("d")))
    assert tyro.cli(Prompt, args=[*common, "--frames", "a", "b"]).frames == (Path("a"), Path("b"))


def test_the_command_exits_with_2_and_no_traceback(place, tok):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "lvm.prompt", str(place / "model"), "--tokenizer", str(tok),
         "--query", str(place / "gone.png"), "--out", str(place / "o.png")],
        env={**os.environ, "PYTHONPATH": str(root)}, cwd=place, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("python -m lvm.prompt: these images cannot be used")
    assert "gone.png (missing file)" in done.stderr
    assert "Traceback" not in done.stderr
