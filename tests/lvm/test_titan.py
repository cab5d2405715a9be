"""torchtitan's Trainer against ours: the same losses, one kind of run folder, clear refusals."""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

import tokenizer
from lvm.checkpoint import latest, load_model_state
from lvm.config import Patches, Run
from lvm.prompt import Prompt
from lvm.prompt import main as prompt
from lvm.recipes import recipe
from lvm.titan import ABSENT, VERSION, Titan, check, main
from lvm.titan import train as train_under_titan
from lvm.train import train
from tokenizer.cli import InputError
from tokenizer.config import VQGANConfig
from tokenizer.images import save_image
from tokenizer.vqgan import VQGAN

HERE = Path(__file__).parent
SIDE = 32  # pixels of an image of the data, 4 codes


def small(data: Path, out: Path, **values) -> Run:
    """Ten fp32 updates that any way of dividing two ranks divides."""
    run = recipe("tiny")
    model = replace(run.model, layers=2, width=32, ffn=48, heads=4, kv_heads=2, qk_norm=True)
    optim = replace(run.optim, warmup=2, decay_steps=10)
    base = replace(run, model=model, optim=optim, precision="fp32", device="cpu", log_every=1)
    return replace(base, data=str(data), out=str(out), steps=10, save_every=5, **values)


def at_once(run: Run, **shape) -> Run:
    return replace(run, model=replace(run.model, **shape))


@pytest.mark.parametrize(
    ("tp", "world", "shape", "words"),
    [
        (3, 4, {}, "does not divide 4 ranks"),
        (0, 4, {}, "does not divide 4 ranks"),
        (4, 4, {"heads": 2, "kv_heads": 2}, "2 heads; [1, 2] do"),
        (4, 8, {}, "2 key/value heads"),
        (2, 2, {"ffn": 49}, "49 channels of the MLP; [1] do"),
        (2, 2, {"attn_bias": True}, "no rule divides biases"),
        (2, 2, {"codebook_dim": 8}, "no rule divides a codebook as embedding"),
    ],
)
def test_a_model_that_ranks_cannot_share_is_refused(tp, world, shape, words):
    run = at_once(small(Path("d"), Path("o")), **shape)
    with pytest.raises(InputError) as said:
        check(run, tp=tp, world=world, row_len=32)
    assert words in str(said.value)


def test_what_a_divided_model_does_not_do_is_refused():
    run = small(Path("d"), Path("o"))
    check(run, tp=2, world=4, row_len=32)
    for other, words in [
        (replace(run, compile=True), "--compile"),
        (replace(run, optim=replace(run.optim, name="muon")), "--optim.name adamw"),
        (replace(run, patches=Patches()), "python -m lvm.train"),
    ]:
        with pytest.raises(InputError, match=words):
            check(other, tp=2, world=4, row_len=32)
    with pytest.raises(InputError, match="33 positions"):
        check(run, tp=2, world=4, row_len=33)


def test_one_rank_a_reader_takes_every_shape():
    for shape in ({"heads": 1, "kv_heads": 1, "ffn": 7}, {"attn_bias": True}, {"codebook_dim": 8}):
        check(at_once(small(Path("d"), Path("o")), **shape), tp=1, world=3, row_len=33)


@pytest.mark.parametrize("option", sorted(ABSENT))
def test_what_torchtitan_has_and_this_command_has_not_is_said(option):
    for args in ([option, "2"], [f"{option}=2"]):
        with pytest.raises(InputError, match=f"{option} is not supported: "):
            main(["tiny", "--data", "d", "--out", "o", *args])


def test_a_recipe_comes_first(capsys):
    with pytest.raises(InputError, match="--data stands where the recipe's name is wanted"):
        main(["--data", "d"])
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "--tp N" in capsys.readouterr().out


def test_torchtitan_that_is_not_there_or_another_is_one_message(data, tmp_path, monkeypatch):
    command = Titan(run=small(data, tmp_path / "run"))
    real = metadata.version

    def version(name: str) -> str:
        if name != "torchtitan":
            return real(name)
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(InputError, match=f"not installed: pip install torchtitan=={VERSION}"):
        train_under_titan(command)
    monkeypatch.setattr(metadata, "version", lambda name: "0.2.2")
    with pytest.raises(InputError, match=rf"torchtitan 0\.2\.2 is installed.*wanted {VERSION}"):
        train_under_titan(command)
    monkeypatch.setattr(metadata, "version", lambda name: VERSION)
    monkeypatch.setitem(sys.modules, "torchtitan", None)
    monkeypatch.delitem(sys.modules, "lvm.titan_compat", raising=False)
    monkeypatch.delattr("lvm.titan_compat", raising=False)
    with pytest.raises(InputError, match=r"cannot be imported beside torch .*torch 2\.13"):
        train_under_titan(command)
    assert not (tmp_path / "run").exists()


def test_data_and_folder_are_asked_for_before_torchtitan():
    with pytest.raises(InputError, match="--data and --out missing"):
        train_under_titan(Titan(run=recipe("tiny")))


def lines(out: Path, key: str, split: str = "train") -> list[float]:
    found = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in found if line["split"] == split]


def losses(out: Path, split: str = "train") -> list[float]:
    return lines(out, "loss" if split == "train" else "nll", split)


def on_ranks(jobs: list[tuple[Run, int]], folder: Path, *, world: int) -> None:
    """Run each with its tensor-parallel size on `world` processes, one after the other."""
    listing = folder / f"jobs-{world}.json"
    listing.write_text(json.dumps([(run.to_json(), tp) for run, tp in jobs]))
    with ExitStack() as stack:  # all open at once, so that the ports differ
        free = [stack.enter_context(socket.socket()) for _ in jobs]
        for opened in free:
            opened.bind(("127.0.0.1", 0))
        ports = " ".join(str(opened.getsockname()[1]) for opened in free)
    shared = {
        **os.environ,
        "PYTHONPATH": str(HERE.parents[1]),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "PORTS": ports,
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / "ranks_titan.py"), str(listing)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=300)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:
            rank.kill()


@pytest.fixture(scope="module")
def tok(tmp_path_factory) -> Path:
    """A tokenizer of the data's geometry: 61 codes, 4 of them an image."""
    config = VQGANConfig(
        image_size=SIDE, channels=32, multipliers=(1, 1, 1, 1, 1), res_blocks=1, latent_dim=4,
        code_dim=4, codebook_size=61,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = VQGAN(config)
    folder = tmp_path_factory.mktemp("tok")
    tokenizer.save(made, folder)
    return folder


@pytest.fixture(scope="module")
def runs(make_data, tok, tmp_path_factory) -> Path:
    """The same run by each trainer, unbroken, broken, and handed from one to the other."""
    pytest.importorskip("torchtitan")
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("titan")
    data = make_data(folder / "data", tokenizer=tokenizer.load(tok).id)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # sums depend on the number of threads

    ours = small(data, folder / "ours", eval_every=5, micro_rows=4)
    muon = replace(ours, out=str(folder / "muon"), optim=replace(ours.optim, name="muon"))

    def named(name: str, run: Run = ours, **values) -> Run:
        return replace(run, out=str(folder / name), **values)

    train(ours)
    train(muon)
    train(named("ours-two-parts", steps=5))
    one = [
        (named("one"), 1),
        (named("one-broken", steps=5), 1),
        (named("one-broken"), 1),
        (named("one-muon", muon), 1),
        (named("one-bf16", precision="bf16"), 1),
    ]
    on_ranks(one, folder, world=1)
    two = [
        (named("two"), 1),
        (named("two-broken", steps=5), 1),
        (named("two-broken"), 1),
        (named("two-muon", muon), 1),
        (named("parts"), 2),
        (named("parts-broken", steps=5), 2),
        (named("parts-broken"), 2),
        (named("parts-ours", steps=5), 2),
        (named("parts-recomputed", recompute="selective"), 2),
        (named("ours-two-parts"), 2),
    ]
    on_ranks(two, folder, world=2)
    four = [
        (named("four", micro_rows=2, shards=1), 2),
        (named("four-muon", muon, micro_rows=2, shards=2), 1),
    ]
    on_ranks(four, folder, world=4)
    train(named("parts-ours"))
    train(named("ours-bf16", precision="bf16"))
    torch.set_num_threads(before)
    return folder


def weights_differ(one: Path, other: Path) -> list[str]:
    a, b = load_model_state(one), load_model_state(other)
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.slow
@pytest.mark.parametrize("other", ["one", "one-muon", "one-bf16"])
def test_one_process_makes_the_updates_of_our_trainer_bit_by_bit(runs, other):
    """The same operators in the same order, with micro-batches, in fp32 and bf16, Muon too."""
    ours = runs / {"one": "ours", "one-muon": "muon", "one-bf16": "ours-bf16"}[other]
    assert losses(runs / other) == losses(ours)
    assert losses(runs / other, "val") == losses(ours, "val")
    assert not weights_differ(runs / other, ours)
    assert losses(ours)[-1] < losses(ours)[0] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "parts", "parts-recomputed", "four"])
def test_losses_on_several_ranks_are_those_of_our_trainer_on_one(runs, name):
    """FSDP2, tensor parallel, both with copies: fp32 sums in another order, amplified by AdamW over
    10 updates. The bound is lvm.train's own for ranks, a tenth of what the backend was to keep."""
    assert losses(runs / name) == pytest.approx(losses(runs / "ours"), rel=1e-5)
    assert losses(runs / name, "val") == pytest.approx(losses(runs / "ours", "val"), rel=1e-5)
    # A part of a gradient that is not summed, of QK-norm's few weights, moves losses by less.
    norms = lines(runs / "ours", "grad_norm")
    assert lines(runs / name, "grad_norm") == pytest.approx(norms, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two-muon", "four-muon"])
def test_muon_works_on_the_meshes_that_torchtitan_lays_out(runs, name):
    """Shards, and copies of shards; gradients in another order are rounded to bf16, as in ours."""
    assert losses(runs / name) == pytest.approx(losses(runs / "muon"), abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "two", "parts"])
def test_a_resumed_run_equals_the_unbroken_one_bit_by_bit(runs, name):
    assert losses(runs / f"{name}-broken") == losses(runs / name)
    assert not weights_differ(runs / f"{name}-broken", runs / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ours-two-parts", "parts-ours"])
def test_a_run_is_handed_from_one_trainer_to_the_other(runs, name):
    """Weights, optimiser and place in the data, whole on one side and in parts on the other."""
    assert losses(runs / name) == pytest.approx(losses(runs / "ours"), rel=1e-5)
    starts = json.loads((runs / name / "environment.json").read_text())
    assert sorted(start["world"] for start in starts) == [1, 2]
    assert [start["step"] for start in starts] == [0, 5]


@pytest.mark.slow
def test_a_run_of_parts_names_its_tensors_as_ours_and_says_what_made_it(runs):
    assert load_model_state(runs / "parts").keys() == load_model_state(runs / "ours").keys()
    start = json.loads((runs / "parts" / "environment.json").read_text())[0]
    assert start["packages"]["torchtitan"] == VERSION
    assert latest(runs / "parts") == runs / "parts" / "checkpoints" / "step-00000010"
    line = json.loads((runs / "parts" / "metrics.jsonl").read_text().splitlines()[0])
    ours = json.loads((runs / "ours" / "metrics.jsonl").read_text().splitlines()[0])
    assert list(line) == list(ours)
    assert line["tokens"] == ours["tokens"] and line["samples"] == ours["samples"]


@pytest.mark.slow
def test_a_run_of_parts_answers_a_prompt(runs, tok, tmp_path):
    rng = np.random.default_rng(0)
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for file in files:
        save_image(file, rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8))
    answer = tmp_path / "answer.png"
    prompt(
        Prompt(
            model=runs / "parts",
            tokenizer=tok,
            pair=((files[0], files[1]),),
            query=(files[2],),
            out=answer,
        )
    )
    assert answer.is_file()
