"""The prompt command from files to files, and each way a prompt can be wrong."""

import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

import lvm
import tokenizer
from lvm import export
from lvm.generate import Sampling, decode, draw, rank
from lvm.prompt import Prompt, main
from lvm.prompting.answers import pictures
from lvm.prompting.frames import last_frames, write_frames
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
        query=(files[4],),
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
    assert len({plain, answer(min_p=0.5), answer(guidance=3.0), answer(top_p=0.5)}) == 4
    assert plain == answer(min_p=0.0, guidance=1.0)
    greedy = answer(temperature=0.0)
    assert greedy == answer(temperature=0.0, seed=1) == answer(top_k=1, seed=2)


def codes_of(images: Sequence[Path], tok: Path) -> torch.Tensor:
    stacked = np.stack([read_image(path, size=SIDE) for path in images])
    return tokenizer.load(tok).encode(torch.from_numpy(stacked).permute(0, 3, 1, 2) / 255)


def test_examples_of_three_are_answered_twice(place, tok):
    files = [place / f"{i}.png" for i in range(4)]
    out = place / "out.png"
    command = Prompt(
        model=place / "model", tokenizer=tok, example=(tuple(files[:3]),), query=(files[3],),
        candidates=2, guidance=2.0, out=out,
    )  # fmt: skip
    main(command)
    names = {f"out-{c}-{f}.png" for c in (1, 2) for f in (1, 2)}
    assert names == {p.name for p in place.glob("out-?-?.png")}
    step = SIDE * (96 // SIDE) + 2
    assert pixels(place / "out-sheet.png").shape == (3 * step + 2, 3 * step + 2, 3)
    sampling = Sampling(new=2, candidates=2, guidance=2.0, bare=1)
    drawn = draw(lvm.load(command.model), codes_of(files, tok), sampling)
    wanted = pictures(tokenizer.load(tok), drawn.codes[1, 0])
    assert np.array_equal(pixels(place / "out-2-1.png"), wanted)


@pytest.mark.parametrize("kind", ["alone", "pairs", "frames"])
def test_the_kept_part_begins_the_first_answer(analogy, place, capsys, kind):
    known = place / "6.png"
    changes = {
        "alone": {"pair": (), "query": ()},
        "pairs": {},
        "frames": {"pair": (), "query": (), "frames": (place / "0.png",), "new": 2},
    }
    command = replace(analogy, image=known, keep=0.5, candidates=2, **changes[kind])
    tok = tokenizer.load(command.tokenizer)
    seen = {}

    def watched(model, prompts, sampling, *, given=None):
        seen["given"], seen["drawn"] = given, draw(model, prompts, sampling, given=given)
        return seen["drawn"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lvm.prompting.answers.draw", watched)
        main(command)
    upper = read_image(known, size=SIDE)[: SIDE // 2]
    floats = torch.from_numpy(np.concatenate([upper, upper[::-1]])).permute(2, 0, 1) / 255
    given = tok.encode(floats[None])[0, :2]  # 4 codes are 2 rows of 2
    assert torch.equal(seen["given"], given)
    assert (seen["drawn"].codes[:, 0, :2] == given).all()
    assert len({tuple(codes.tolist()) for codes in seen["drawn"].codes[:, 0]}) == 2
    left = 4 * command.new - 2 if command.new else 2  # codes that were not given
    nats = -seen["drawn"].log_likelihood.sum(-1) / left
    assert f"candidate 1: {nats[0]:.3f} nats a code" in capsys.readouterr().out
    sheet = pixels(command.out.with_stem("out-sheet"))
    row = {"alone": 0, "pairs": 2, "frames": 0}[kind]
    column = {"alone": 0, "pairs": 1, "frames": 1}[kind]
    step, scale = SIDE * (96 // SIDE) + 2, 96 // SIDE
    y, x = 2 + row * step, 2 + column * step
    cell = sheet[y : y + SIDE * scale : scale, x : x + SIDE * scale : scale]
    assert np.array_equal(cell[: SIDE // 2], upper)
    assert (cell[SIDE // 2 :] == 255).all()


@pytest.mark.parametrize("by", ["likelihood", "gain"])
def test_ranking_puts_the_best_first(analogy, place, tok, capsys, by):
    """Five candidates, so that their order is that of drawing by chance once in 120 times."""
    files = [place / f"{i}.png" for i in range(5)]
    model, prompt = lvm.load(analogy.model), codes_of(files, tok)
    drawn = draw(model, prompt, Sampling(candidates=5))
    order = rank(model, prompt, drawn, by=by).tolist()
    assert order != sorted(order)
    main(replace(analogy, candidates=5, rank=by))
    said = [line for line in capsys.readouterr().out.split("\n") if line.startswith("candidate")]
    nats = (-drawn.log_likelihood[:, 0] / 4)[order]
    assert said == [
        f"candidate {i}: {value:.3f} nats a code".replace(":", f" (drawn as {n + 1}):")
        for i, (n, value) in enumerate(zip(order, nats.tolist(), strict=True), 1)
    ]
    wanted = pictures(tokenizer.load(tok), drawn.codes[order, 0])
    for i in range(5):
        assert np.array_equal(pixels(analogy.out.with_stem(f"out-{i + 1}")), wanted[i])


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_a_clip_in_and_a_clip_out(place, tok, np_rng, suffix):
    frames = np_rng.integers(0, 256, (6, SIDE, SIDE, 3), np.uint8)
    write_frames(place / "walk.gif", frames, fps=4)
    out = place / f"next{suffix}"
    main(
        Prompt(
            model=place / "model", tokenizer=tok, frames=(place / "walk.gif",), stride=2, new=2,
            candidates=2, out=out,
        )
    )  # fmt: skip
    options = {"stride": 1, "size": SIDE, "preprocess": "squash"}
    assert len(last_frames(out, count=99, **options)) == 3 + 2  # of 6 every second, and the answers
    assert pixels(place / "next-sheet.png").shape[1] == 5 * (96 + 2) + 2
    assert (place / "next-2-2.png").is_file()


def test_from_python_a_part_is_kept_and_candidates_are_ranked(place, tok):
    """The same as the command, with images as tensors."""
    model, toke = lvm.load(place / "model"), tokenizer.load(tok)
    images = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    options = {"candidates": 4, "min_p": 0.01, "guidance": 1.5}
    found = lvm.complete(model, toke, images[:2], part=images[2], rank="gain", **options)
    hidden = images[2].clone()
    hidden[:, SIDE // 2 :] = 0
    again = lvm.complete(model, toke, images[:2], part=hidden, rank="gain", **options)
    assert torch.equal(found, again)
    mirror = torch.cat([images[2, :, :4], images[2, :, :4].flip(1)], dim=1)
    given = toke.encode(mirror[None])[0, :2]
    drawn = draw(model, toke.encode(images[:2]), Sampling(**options), given=given)
    order = rank(model, toke.encode(images[:2]), drawn, by="gain")
    assert order.tolist() != [0, 1, 2, 3]
    assert torch.equal(found, decode(toke, drawn.codes[order]))
    with pytest.raises(InputError, match=r"shape \[3, 4, 8\]; wanted \[3, 8, 8\]"):
        lvm.complete(model, toke, images[:2], part=images[2, :, :4])
    with pytest.raises(InputError, match=r"an image of shape \[3, 8, 9\]"):
        lvm.complete(model, toke, [images[0], torch.zeros(3, 8, 9)])


def test_bad_prompts_are_refused_by_what_is_wrong(analogy, place, tok, make_model):
    def refused(words: str, **changes) -> None:
        with pytest.raises(InputError, match=words):
            main(replace(analogy, **changes))
        assert not analogy.out.exists()

    (q,) = analogy.query
    (place / "text.png").write_text("no image")
    (place / "cut.png").write_bytes((place / "1.png").read_bytes()[:60])
    refused("--query is missing", query=())
    refused("give --pair … --query, --example … --query, --frames, or --image", query=(), pair=())
    refused("--frames is a prompt of its own", frames=(q,))
    refused("--new 2, but an example has 1", new=2)
    refused("--query has 2 images and an example 2", query=(q, q))
    refused("prompt of 9 images is too long: a row of this model has 6", pair=analogy.pair * 2)
    refused(r"out\.tga: wanted a name that ends in one of \.png.*\.mp4",
            out=analogy.out.with_suffix(".tga"))  # fmt: skip
    refused("folder cannot be made", out=q / "x" / "out.png")
    refused(r"text\.png \(not an image\).*none\.png \(missing file\)",
            pair=((place / "text.png", q), (place / "none.png", q)))  # fmt: skip
    refused(r"cut\.png \((truncated|unreadable)\)", query=(place / "cut.png",))
    refused("no tokenizer folder", tokenizer=place / "nowhere")
    refused("no model folder", model=place / "nowhere")
    refused("at least 1", candidates=0)
    refused("0 new images", new=0, pair=(), query=(), frames=(q,))
    refused("--fps 0", fps=0)
    refused("--root and --anywhere go with --batch", root=place)
    (place / "pixels").mkdir()
    (place / "pixels/config.json").write_text('{"patches": {"size": 14}}')
    refused("is a model of pixels", model=place / "pixels")
    export.write(make_model(), place / "torn")
    (place / "torn/lvm.json").write_text('{"format": 1, "codes": ')
    refused(r"torn.lvm\.json cannot be read", model=place / "torn")
    export.write(make_model(tokenizer="0" * 64), place / "other")
    refused("the same code is another picture", model=place / "other")
    export.write(make_model(codes=50), place / "more")
    refused("the tokenizer has 40 codes, 4 an image; the model was trained on 50",
            model=place / "more")  # fmt: skip


def test_a_huge_png_is_refused_by_its_header(analogy, place, monkeypatch):
    """100 megapixels, none of which is in the file: the header alone must be enough."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))
    (place / "huge.png").write_bytes(data + chunk(b"IEND", b""))
    with pytest.raises(InputError, match=r"huge\.png \(too large: 100 megapixels, at most 67"):
        main(replace(analogy, query=(place / "huge.png",)))


def test_repeated_pairs_and_lists_of_frames_are_parsed():
    common = ["m", "--tokenizer", "t", "--out", "o.png"]
    pairs = ["--pair", "a", "b", "--pair", "c", "d", "--query", "q"]
    found = tyro.cli(Prompt, args=[*common, *pairs])
    assert found.pair == ((Path("a"), Path("b")), (Path("c"), Path("d")))
    assert tyro.cli(Prompt, args=[*common, "--frames", "a", "b"]).frames == (Path("a"), Path("b"))


def test_no_example_is_said(analogy, capsys):
    main(replace(analogy, pair=()))
    assert "without an example the model has to guess" in capsys.readouterr().err
    main(analogy)
    assert not capsys.readouterr().err


def run_python(code: str, *, cwd: Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[-2]


def test_the_help_loads_no_torch_and_an_answer_no_compiler(analogy, tok, place):
    """What a start-up waits for: torch takes a second, its compiler another, transformers five."""
    code = (
        "import sys\nfrom lvm.prompt import Prompt, main\nassert 'torch' not in sys.modules\n"
        "from pathlib import Path\n"
        f"main(Prompt(model=Path('model'), tokenizer=Path({str(tok)!r}), query=(Path('0.png'),),\n"
        "            out=Path('o.png')))\n"
        "slow = {'torch._dynamo', 'transformers', 'pyarrow', 'av', 'rich', 'triton'}\n"
        "print(sorted(slow & set(sys.modules)))\n"
    )
    assert run_python(code, cwd=place) == "[]"


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
