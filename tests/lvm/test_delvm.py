"""DeLVM's recipes, initialisation and training: a frozen codebook as embedding, on ranks too."""

import json
import math
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import lvm
import tokenizer
from lvm import export, optim
from lvm.codebook import read_codebook
from lvm.config import ModelConfig, Run
from lvm.generate import generate_codes
from lvm.learner import Learner
from lvm.model import build, on_meta
from lvm.recipes import recipe
from lvm.train import train
from tokenizer.cli import InputError
from tokenizer.config import VQGANConfig
from tokenizer.vqgan import VQGAN
from visual_sentences.pack import Rows, pack
from visual_sentences.vocab import Vocab

transformers = pytest.importorskip("transformers", reason="the oracle; in the extra dev")
CODES, CHANNELS = 61, 4
RANKS = Path(__file__).with_name("test_parallel.py")  # has what starts two of them


def make_tokenizer(folder: Path, *, seed: int = 0, channels: int = CHANNELS) -> Path:
    """A tokenizer of the data's geometry: 61 codes, 4 of them an image of 32 pixels."""
    config = VQGANConfig(
        image_size=32, channels=32, multipliers=(1, 1, 1, 1, 1), res_blocks=1,
        latent_dim=channels, code_dim=channels, codebook_size=CODES,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = VQGAN(config)
        with torch.no_grad():  # a new codebook has values of size 1 / 61
            made.quantize.embedding.weight.normal_()
    tokenizer.save(made, folder)
    return folder


@pytest.fixture(scope="module")
def tok(tmp_path_factory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("delvm") / "tok")


@pytest.fixture(scope="module")
def codes(make_data, tok, tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("codes"), tokenizer=tokenizer.load(tok).id)


def small(data: Path, out: Path, **values: Any) -> Run:
    """delvm_300m, made small."""
    run = recipe("delvm_300m")
    model = replace(
        run.model, width=32, ffn=48, layers=2, heads=2, vocab_size=0, codebook_dim=CHANNELS
    )
    run = replace(
        run, model=model, optim=replace(run.optim, lr=3e-3, warmup=2), steps=10, save_every=5,
        batch_rows=8, precision="fp32", device="cpu", log_every=1, data=str(data), out=str(out),
    )  # fmt: skip
    return replace(run, **values)


# Recipes


@pytest.mark.parametrize(
    ("name", "trained", "ffn"),
    [("delvm_300m", 291_181_568, 2816), ("delvm_1b", 1_147_545_600, 5632)],
)
def test_recipes_have_the_published_sizes(name, trained, ffn):
    """291.2 and 1147.5 M; the 8192 x 64 values of the codebook are not trained."""
    run = recipe(name)
    parameters = dict(on_meta(run.model).named_parameters())
    counted = sum(p.numel() for p in parameters.values() if p.requires_grad)
    assert counted == trained
    assert [n for n, p in parameters.items() if not p.requires_grad] == ["embed.codebook"]
    assert run.model.num_params() == trained + 8192 * 64
    assert (run.model.ffn, run.model.dim, run.model.norm_eps) == (ffn, 128, 1e-5)
    assert run.batch_rows * 2048 == 262_144
    assert (run.layout, run.whole_rows) == ("none", False)
    assert (run.optim.beta1, run.optim.beta2, run.optim.eps) == (0.9, 0.95, 1e-8)
    assert (run.optim.weight_decay, run.optim.decay_all, run.optim.clip) == (0.1, True, 1.0)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.0),
        (112, 0.75e-4),
        (224, 1.5e-4),
        (224 + 9944, 1.5e-5 + 1.35e-4 * (1 + 0.5**0.5) / 2),  # a quarter of the way down
        (20_112, 0.825e-4),  # half of it
        (40_000, 1.5e-5),
        (50_000, 1.5e-5),
    ],
)
def test_the_schedule_has_delvms_values(step, rate):
    run = recipe("delvm_300m")
    factor = optim.rate(step, run.optim, horizon=run.steps)
    assert run.optim.lr * factor == pytest.approx(rate, abs=1e-18)  # fp64 of 1e-4


# Initialisation


def test_weights_are_drawn_with_delvms_deviations():
    """Part by part and layer by layer; 5 standard errors of a deviation of n draws, 1/sqrt(2 n)."""
    config = ModelConfig(
        width=128, ffn=352, layers=3, heads=4, vocab_size=512, attn_bias=True, codebook_dim=64,
        init="delvm",
    )  # fmt: skip
    model = build(config, seed=1)
    expected = {"embed.proj.weight": 0.0052, "head.weight": 0.0052}
    for i in range(3):
        scaled = 0.006 / math.sqrt(2 * (i + 1))
        attn, mlp = f"layers.{i}.attn", f"layers.{i}.mlp"
        expected |= {f"{attn}.{part}.weight": 0.006 for part in "qkv"}
        expected |= {f"{attn}.o.weight": scaled, f"{mlp}.gate.weight": 0.006}
        expected |= {f"{mlp}.up.weight": scaled, f"{mlp}.down.weight": 0.0015}
    for name, tensor in model.state_dict().items():
        if name == "embed.codebook":
            continue
        if tensor.ndim == 1:
            assert (tensor == (0.0 if name.endswith("bias") else 1.0)).all(), name
            continue
        n, wanted = tensor.numel(), expected.pop(name)
        assert abs(float(tensor.std()) / wanted - 1) < 5 / math.sqrt(2 * n), name
        assert abs(float(tensor.mean())) < 5 * wanted / math.sqrt(n), name
    assert not expected


def test_codebook_and_biases_change_the_draw_of_nothing_else():
    config = ModelConfig(width=32, ffn=48, layers=2, heads=2, vocab_size=40)
    plain = build(config, seed=3).state_dict()
    biased = build(replace(config, attn_bias=True, codebook_dim=8), seed=3).state_dict()
    shared = [name for name in plain if name != "embed.weight"]
    assert all(torch.equal(plain[name], biased[name]) for name in shared)


# What is predicted


def test_code_0_is_a_label_as_any_other(make_model):
    """DeLVM's collation keeps labels above 0 alone."""
    vocab = Vocab(codes=40, codes_per_image=4)
    rows = Rows(
        tokens=torch.zeros(1, 16, dtype=torch.uint16),
        starts=torch.tensor([[0, 8]], dtype=torch.int32),
        length=torch.tensor([12], dtype=torch.int32),
        source=torch.zeros(1, dtype=torch.int32),
        row=torch.zeros(1, dtype=torch.int64),
    )
    batch = pack(rows, layout="none", vocab=vocab)
    assert int((batch.labels == 0).sum()) == int(batch.predicted) == 7 + 3  # two documents
    model = make_model(layout="none", vocab_size=40, attn_bias=True, codebook_dim=6)
    sums = Learner(model)(batch)
    assert int(sums.count) == 10
    head = model.head.weight
    sums.loss.backward()
    assert head.grad is not None and float(head.grad[0].norm()) > 0
    assert model.embed.codebook.grad is None
    with torch.no_grad():  # each document by itself, as nothing of the others is read
        nll = 0.0
        for length in (8, 4):
            logits = model(torch.zeros(1, length, dtype=torch.long))[0, :-1]
            nll += float(F.cross_entropy(logits, torch.zeros(length - 1).long(), reduction="sum"))
    assert float(sums.nll) == pytest.approx(nll, rel=1e-5)  # fp32, other order of sums


def test_padding_has_no_vector_and_moves_nothing(make_model):
    model = make_model(layout="none", vocab_size=40, codebook_dim=6)
    pad = Vocab(codes=40, codes_per_image=4).pad
    assert pad > 40
    with torch.no_grad():
        padded = model(torch.tensor([[3, 1, 4, 1, pad, pad]]))
        assert torch.equal(padded[:, :4], model(torch.tensor([[3, 1, 4, 1, 0, 7]]))[:, :4])


# Training


@pytest.fixture(scope="module")
def runs(codes, tok, tmp_path_factory) -> Path:
    """One process to 10; to 5 and then without the tokenizer to 10; two ranks to 10, each with a
    part of the model, and each with a copy."""
    folder = tmp_path_factory.mktemp("runs")
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # sums depend on the number of threads
    one = small(codes, folder / "one", codebook=str(tok), eval_every=5)
    assert train(one) == 0
    broken = replace(one, out=str(folder / "broken"))
    assert train(replace(broken, steps=5, optim=replace(broken.optim, decay_steps=10))) == 0
    assert train(replace(broken, codebook="", optim=replace(broken.optim, decay_steps=10))) == 0
    torch.set_num_threads(before)
    two = replace(one, out=str(folder / "two"))
    copies = replace(two, out=str(folder / "copies"), shards=1)
    runpy.run_path(str(RANKS))["on_ranks"]([two, copies], folder)
    return folder


def losses(out: Path) -> list[float]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if line["split"] == "train"]


def test_the_codebook_is_the_tokenizers_before_and_after(runs, tok):
    vectors = read_codebook(tok).vectors
    for name in ("one", "two", "copies", "broken"):
        model = lvm.load(runs / name)
        assert torch.equal(model.embed.codebook, vectors)
        assert not model.embed.codebook.requires_grad
        assert (model.config.vocab_size, model.reads.layout) == (CODES, "none")
        assert model.reads.tokenizer == tokenizer.load(tok).id


def test_it_is_in_the_checkpoint_and_no_optimiser_has_it(runs):
    stored = runpy.run_path(str(RANKS))["stored"]
    one, two = stored(runs / "one"), stored(runs / "two")
    assert one == two
    assert one["model.embed.codebook"][0] == (CODES, CHANNELS)
    assert "optim.model.embed.proj.weight.exp_avg" in one
    assert not [name for name in one if name.startswith("optim.model.embed.codebook")]


def test_losses_on_two_ranks_are_those_of_one_process(runs):
    """fp32 AdamW over 10 updates: sums in another order, amplified by 10 updates, stay ≤ 1e-5."""
    for ranks in ("two", "copies"):
        assert losses(runs / ranks) == pytest.approx(losses(runs / "one"), rel=1e-5)
    assert len(losses(runs / "one")) == 10
    assert losses(runs / "one")[-1] < losses(runs / "one")[0]


def test_a_run_goes_on_without_the_tokenizer(runs):
    assert losses(runs / "broken") == losses(runs / "one")


def test_a_run_is_exported_with_the_codebook_folded(runs, tmp_path, rng):
    model = lvm.load(runs / "one")
    export.write(model, tmp_path / "hf")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.randint(0, CODES, (2, 20), generator=rng)
    with torch.no_grad():
        table = model.embed.codebook @ model.embed.proj.weight.T
        torch.testing.assert_close(theirs.model.embed_tokens.weight, table, atol=1e-6, rtol=0)
        torch.testing.assert_close(theirs(ids).logits, model(ids), atol=1e-5, rtol=0)  # fp32
    prompt = torch.randint(0, CODES, (3, 4), generator=rng)
    drawn = [generate_codes(m, prompt, temperature=0.0) for m in (model, lvm.load(tmp_path / "hf"))]
    assert torch.equal(*drawn)
    export.write(model, tmp_path / "native", format="native")
    again = lvm.load(tmp_path / "native")
    state = model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())
    assert again.config == model.config


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"codebook": ""}, "--codebook missing: delvm_300m embeds codes by the codebook"),
        ({"codebook": "other"}, "is tokenizer .*, .* was built with .*: its codes mean other"),
        ({"layout": "bos"}, "--layout bos with model.codebook_dim 4: .*none for bos"),
        ({"vocab_size": 128}, "--model.vocab-size 128: .* has 61 codes"),
        ({"codebook_dim": 8}, "vectors of 4 channels, the model wants 8"),
        ({"codebook_dim": 0}, "the model's embedding is a table of its own"),
        ({"codebook": "nowhere"}, "nowhere"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_run_folder_is_made(
    codes, tok, tmp_path, values, words
):
    run = small(codes, tmp_path / "run", codebook=str(tok))
    if values.get("codebook") == "other":
        values = {"codebook": str(make_tokenizer(tmp_path / "tok", seed=1))}
    shape = {k: v for k, v in values.items() if k in ("vocab_size", "codebook_dim")}
    rest = {k: v for k, v in values.items() if k not in shape}
    with pytest.raises(InputError, match=words):
        train(replace(run, model=replace(run.model, **shape), **rest))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchtitan_takes_the_codebook_too(runs, codes, tok):
    pytest.importorskip("torchtitan")
    pytest.importorskip("triton")
    start = runpy.run_path(str(Path(__file__).with_name("test_titan.py")))["on_ranks"]
    run = small(codes, runs / "titan", codebook=str(tok), eval_every=5)
    start([(run, 1)], runs, world=1)
    assert losses(runs / "titan") == losses(runs / "one")
    assert torch.equal(lvm.load(runs / "titan").embed.codebook, read_codebook(tok).vectors)
