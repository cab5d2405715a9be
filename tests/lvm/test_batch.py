"""Prompts from a JSONL file: answers as one by one, resumed, shared; bad lines named."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lvm
import tokenizer
from lvm import export
from lvm.evaluation.in_context import target_nll
from lvm.generate import Sampling, draw, rank
from lvm.prompt import Prompt, main
from lvm.prompting.answers import pictures
from lvm.prompting.prompt_file import BadLine, finished, resolve
from tokenizer.cli import InputError
from tokenizer.config import VQGANConfig
from tokenizer.images import read_image, save_image
from tokenizer.vqgan import VQGAN

SIDE = 8


@pytest.fixture
def place(make_model, tmp_path, np_rng) -> Path:
    """A tokenizer, a model of 6 images a row and pictures 0.png to 6.png; answers go to `out`."""
    config = VQGANConfig(
        image_size=SIDE, channels=32, multipliers=(1, 1, 1), res_blocks=1, latent_dim=4, code_dim=4,
        codebook_size=40,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tok = VQGAN(config)
        torch.nn.init.normal_(tok.quantize.embedding.weight)
    tokenizer.save(tok, tmp_path / "tok")
    export.write(make_model(tokenizer=tok.id), tmp_path / "model")
    for i in range(7):
        save_image(tmp_path / f"{i}.png", np_rng.integers(0, 256, (9 + i, 14, 3), np.uint8))
    return tmp_path


LINES: list[dict[str, Any]] = [
    {"input": ["0.png", "1.png", "2.png"], "target": "3.png", "output": "a.png"},
    {"input": ["4.png"], "output": "sub/b.png"},
    {"input": ["0.png", "1.png", "2.png", "3.png", "4.png"], "output": "c.jpg"},
    {"input": ["5.png", "2.png"], "target": ["1.png", "6.png"], "output": "d.webp", "more": 1},
    {"input": ["6.png"], "output": "e.png"},
]


def command(place: Path, *lines: dict[str, Any] | str, **changes: Any) -> Prompt:
    rows = [line if isinstance(line, str) else json.dumps(line) for line in lines or LINES]
    (place / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    return Prompt(
        model=place / "model", tokenizer=place / "tok", batch=place / "prompts.jsonl",
        **{"out": place / "out", "batch_size": 2, "candidates": 2, **changes},
    )  # fmt: skip


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(row) for row in (folder / "results.jsonl").read_text().splitlines()]


def images(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.suffix != ".jsonl")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def codes_of(place: Path, names: list[str]) -> torch.Tensor:
    read = np.stack([read_image(place / name, size=SIDE) for name in names])
    floats = torch.from_numpy(read).permute(0, 3, 1, 2) / 255
    return tokenizer.load(place / "tok").encode(floats)


def test_every_line_has_the_answer_that_it_has_alone(place):
    options: dict[str, Any] = {"rank": "gain", "new": 2, "candidates": 4}
    assert main(command(place, **options)) == 0
    found, model = records(place / "out"), lvm.load(place / "model")
    assert [record["line"] for record in found] == [1, 2, 3, 4, 5]
    for line, record in zip(LINES, found, strict=True):
        prompt = codes_of(place, line["input"])
        drawn = draw(model, prompt, Sampling(new=2, candidates=4))
        order = rank(model, prompt, drawn, by="gain")
        assert record["drawn_as"] == (order + 1).tolist()
        # A batch sums in another order than a prompt alone: fp32 rounding of sums around 30.
        assert record["log_likelihood"] == pytest.approx(
            drawn.log_likelihood.sum(-1)[order].tolist(), rel=1e-5
        )
        name = place / "out" / line["output"]
        wanted = pictures(tokenizer.load(place / "tok"), drawn.codes[order])
        for c in range(4):
            for f in range(2):
                file = name.with_stem(f"{name.stem}-{c + 1}-{f + 1}")
                assert file.is_file()
                if name.suffix == ".png":  # the others lose a little
                    assert np.array_equal(np.asarray(Image.open(file)), wanted[c, f])
        assert name.is_file()
    assert len({tuple(record["drawn_as"]) for record in found}) > 3  # each by its own prompt


def test_targets_have_a_perplexity_and_a_distance(place):
    main(command(place, rank=None))
    first, _, third, fourth, _ = records(place / "out")
    model = lvm.load(place / "model")
    prompt = codes_of(place, LINES[0]["input"])
    nll = target_nll(model, prompt[None], codes_of(place, ["3.png"]))
    # rel 1e-5: encoded and computed in batches of other sizes, in fp32
    assert first["perplexity"] == pytest.approx(float(nll.double().mean().exp()), rel=1e-5)
    wanted = read_image(place / "3.png", size=SIDE) / 255
    got = [np.asarray(Image.open(place / f"out/a-{c}.png")) / 255 for c in (1, 2)]
    # exact but for the order of a float64 sum
    assert first["mse"] == pytest.approx([((x - wanted) ** 2).mean() for x in got], rel=1e-9)
    prompt = codes_of(place, ["5.png", "2.png", "1.png", "6.png"])
    parts = [target_nll(model, prompt[None, :k], prompt[None, k]) for k in (2, 3)]
    both = float(torch.cat(parts).double().mean().exp())
    assert fourth["perplexity"] == pytest.approx(both, rel=1e-5)
    assert "perplexity" not in third and "mse" not in third


def test_what_is_finished_is_not_done_again(place, capsys):
    main(command(place))
    whole, wrote = images(place / "out"), records(place / "out")
    (place / "out/a.png").unlink()  # finished once, and lost
    rows = (place / "out/results.jsonl").read_text().splitlines(keepends=True)
    (place / "out/results.jsonl").write_text("".join(rows[:2]))
    (place / "out/results-1.part.jsonl").write_text(rows[3] + rows[4][:30])  # killed in a write
    old = os.stat(place / "out/d.webp").st_mtime_ns
    capsys.readouterr()
    assert main(command(place)) == 0
    assert "2 lines were finished before" in capsys.readouterr().out
    assert os.stat(place / "out/d.webp").st_mtime_ns == old
    assert images(place / "out") == whole
    for now, before in zip(records(place / "out"), wrote, strict=True):
        assert now["log_likelihood"] == pytest.approx(
            before["log_likelihood"], rel=1e-5
        )  # as above
    assert not list((place / "out").glob("*.part.jsonl"))


def test_other_settings_or_another_model_do_all_lines_again(place, make_model, capsys):
    main(command(place))
    first = images(place / "out")
    main(command(place, seed=1))
    assert "finished before" not in capsys.readouterr().out
    assert images(place / "out")["a.png"] != first["a.png"]
    shutil.rmtree(place / "model")
    export.write(make_model(tokenizer=tokenizer.load(place / "tok").id, seed=1), place / "model")
    main(command(place, seed=1))
    assert "finished before" not in capsys.readouterr().out
    main(command(place, seed=1))
    assert "5 lines were finished before" in capsys.readouterr().out


def test_bad_lines_are_named_counted_and_do_not_stop_the_rest(place, capsys):
    (place / "bad.png").write_text("no image")
    (place / "out").mkdir()
    (place / "out/folder.png").mkdir()
    found = main(
        command(
            place,
            LINES[0],
            "{",
            "[]",
            "",
            {"output": "x.png"},
            {"input": [], "output": "x.png"},
            {"input": [1], "output": "x.png"},
            {"input": ["0.png"], "target": 3, "output": "x.png"},
            {"input": ["0.png"]},
            {"input": ["0.png"], "output": "x.tga"},
            {"input": ["gone.png"], "output": "x1.png"},
            {"input": ["0.png", "bad.png"], "output": "x2.png"},
            {"input": ["0.png"], "target": "bad.png", "output": "x3.png"},
            {"input": ["0.png"] * 6, "output": "x4.png"},
            {"input": ["0.png"] * 5, "target": ["1.png"] * 2, "output": "x5.png"},
            {"input": ["../0.png"], "output": "x6.png"},
            {"input": ["0.png"], "output": "../x7.png"},
            {"input": [str(place / "0.png")], "output": "x8.png"},
            {"input": ["0.png"], "output": "./a.png"},
            {"input": ["0.png"], "output": "folder.png"},
            LINES[4],
        )
    )
    assert found == 1
    reasons = {r["line"]: r["error"] for r in records(place / "out") if "error" in r}
    assert reasons == {
        2: "not JSON", 3: "no object", 5: "no input", 6: "no input", 7: "no input", 8: "no target",
        9: "no output", 10: "output is no image", 11: "missing file", 12: "not an image",
        13: "not an image", 14: "prompt too long", 15: "prompt too long",
        16: "path leaves the folder", 17: "path leaves the folder", 18: "absolute path",
        19: "output given twice", 20: "output cannot be written",
    }  # fmt: skip
    said = capsys.readouterr()
    assert "2 of 20 prompts answered" in said.out
    assert "not answered, no input: 3" in said.out
    assert "prompts.jsonl, line 12: not an image" in said.err
    assert "line 14: prompt too long (6 images and an answer; a row has 6 images)" in said.err
    answered = {"a.png", "a-1.png", "a-2.png", "e.png", "e-1.png", "e-2.png"}
    assert set(images(place / "out")) - {"folder-1.png", "folder-2.png"} == answered
    assert not (place / "x7.png").exists()


def test_a_mended_line_is_answered_and_the_rest_is_not_done_again(place, capsys):
    assert main(command(place, LINES[1], {"input": ["gone.png"], "output": "g.png"})) == 1
    shutil.copy(place / "0.png", place / "gone.png")
    assert main(command(place, LINES[1], {"input": ["gone.png"], "output": "g.png"})) == 0
    assert "1 lines were finished before" in capsys.readouterr().out
    assert all("error" not in record for record in records(place / "out"))


def test_paths_stay_in_their_folder(tmp_path):
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    (tmp_path / "secret.png").touch()
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    assert resolve(root, "in/../a.png", anywhere=False) == root / "in/../a.png"
    for name, reason in {
        "../secret.png": "leaves",
        "in/../../secret.png": "leaves",
        "link.png": "leaves",
        str(root / "a.png"): "absolute",
        "a\0.png": "cannot",
    }.items():
        with pytest.raises(BadLine, match=reason):
            resolve(root, name, anywhere=False)
    assert resolve(root, str(tmp_path / "secret.png"), anywhere=True) == tmp_path / "secret.png"
    assert resolve(root, "../secret.png", anywhere=True) == root / "../secret.png"


def test_root_is_where_inputs_start_and_out_where_answers_go(place):
    (place / "lists").mkdir()
    found = command(place, root=place, out=place / "there")
    shutil.move(place / "prompts.jsonl", place / "lists/prompts.jsonl")
    assert main(replace(found, batch=place / "lists/prompts.jsonl")) == 0
    assert (place / "there/sub/b.png").is_file()
    assert main(replace(found, batch=place / "lists/prompts.jsonl", root=None)) == 1


def test_wrong_commands_are_refused(place):
    (place / "empty.jsonl").write_text("\n\n")
    for words, changes in {
        "--batch has its prompts in a file: leave --query, --image out": {
            "query": (place / "0.png",), "image": place / "0.png",
        },
        "--batch-size 0": {"batch_size": 0},
        "nothing.jsonl cannot be read": {"batch": place / "nothing.jsonl"},
        "empty.jsonl has no line": {"batch": place / "empty.jsonl"},
        "0 new images": {"new": 0},
        "folder cannot be made": {"out": place / "0.png"},
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=words):
            main(replace(command(place), **changes))


def test_a_torn_or_foreign_result_is_no_result(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"line": 1}\n[]\n{"no": 2}\n{"line": 3')
    assert finished(tmp_path) == {1: {"line": 1}}


def start(place: Path, out: str, *, rank: int = 0, size: int = 1, port: int = 0) -> Any:
    environment = {
        **os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1",
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "lvm.prompt", "model", "--tokenizer", "tok", "--batch",
         "prompts.jsonl", "--out", out, "--batch-size", "1", "--candidates", "2"],
        cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_do_what_one_does(place):
    main(command(place, batch_size=1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [start(place, "two", rank=r, size=2, port=port) for r in range(2)]
    said = [process.communicate(timeout=100)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    assert "answers: 3/3 prompts" in said[0]  # and two are the other's
    assert "5 of 5 prompts answered" in said[0]
    assert images(place / "two") == images(place / "out")
    assert records(place / "two") == records(place / "out")


@pytest.mark.slow
def test_a_killed_run_goes_on(place):
    """kill -9 once something is finished; the rest of 60 prompts takes longer than to see that."""
    lines = [{"input": [f"{i % 7}.png"], "output": f"{i}.png"} for i in range(60)]
    found = command(place, *lines, batch_size=1)
    main(replace(found, out=place / "whole"))
    process = start(place, "out")
    part = place / "out/results-0.part.jsonl"
    until = time.monotonic() + 100
    while not (part.is_file() and part.stat().st_size) and time.monotonic() < until:
        with pytest.raises(subprocess.TimeoutExpired):  # it is still at work
            process.wait(timeout=0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(finished(place / "out"))
    assert 0 < before < 60
    again = start(place, "out")
    said = again.communicate(timeout=100)[0]
    assert again.returncode == 0, said
    assert f"{before} lines were finished before" in said
    assert images(place / "out") == images(place / "whole")
    assert records(place / "out") == records(place / "whole")
