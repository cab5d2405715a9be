"""EasyLM's weights: an independent reference with neighbouring pairs, and what is refused."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import lvm
from lvm import easylm
from lvm.config import Reads
from lvm.easylm import from_interleaved, to_interleaved
from tokenizer.cli import InputError

transformers = pytest.importorskip("transformers", reason="the oracle; in the extra dev")
WIDTH, HEADS, DIM, FFN, LAYERS, VOCAB = 24, 3, 8, 40, 2, 8292


@pytest.fixture
def state(rng) -> dict[str, torch.Tensor]:
    """Weights as EasyLM names and turns them, [in, out], far from their initialisation."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng) / shape[0] ** 0.5 * 1.5

    found = {
        "transformer.wte.embedding": draw(VOCAB, WIDTH) * 50,
        "lm_head.kernel": draw(WIDTH, VOCAB),
    }
    norms = {"transformer.ln_f.kernel": WIDTH}
    for i in range(LAYERS):
        block = f"transformer.h.{i}"
        for name in ("wq", "wk", "wv", "wo"):
            found[f"{block}.attention.{name}.kernel"] = draw(WIDTH, WIDTH)
        found[f"{block}.feed_forward.w1.kernel"] = draw(WIDTH, FFN)
        found[f"{block}.feed_forward.w3.kernel"] = draw(WIDTH, FFN)
        found[f"{block}.feed_forward.w2.kernel"] = draw(FFN, WIDTH)
        norms |= {f"{block}.attention_norm.kernel": WIDTH, f"{block}.ffn_norm.kernel": WIDTH}
    for name, size in norms.items():
        found[name] = 0.5 + torch.rand(size, generator=rng)
    return found


def reference(state: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits of ids [T] in float64; a rotation is a matrix of 2 x 2 blocks, one a pair."""
    s = {name: tensor.double() for name, tensor in state.items()}
    steps = len(ids)

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    turn = torch.zeros(steps, DIM, DIM, dtype=torch.float64)  # a matrix a position
    for t in range(steps):
        for i in range(DIM // 2):
            angle = torch.tensor(t * 10_000.0 ** (-2 * i / DIM), dtype=torch.float64)
            cos, sin = angle.cos(), angle.sin()
            pair = slice(2 * i, 2 * i + 2)
            turn[t, pair, pair] = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    x = s["transformer.wte.embedding"][ids]
    for i in range(LAYERS):
        block = f"transformer.h.{i}."
        h = norm(x, s[block + "attention_norm.kernel"])
        q, k, v = (h @ s[f"{block}attention.{n}.kernel"] for n in ("wq", "wk", "wv"))
        heads = []
        for head in range(HEADS):
            part = slice(head * DIM, (head + 1) * DIM)
            turned_q = torch.einsum("tij,tj->ti", turn, q[:, part])
            turned_k = torch.einsum("tij,tj->ti", turn, k[:, part])
            scores = turned_q @ turned_k.T / DIM**0.5
            scores = scores.masked_fill(torch.ones(steps, steps).triu(1).bool(), float("-inf"))
            heads.append(scores.softmax(-1) @ v[:, part])
        x = x + torch.cat(heads, -1) @ s[block + "attention.wo.kernel"]
        h = norm(x, s[block + "ffn_norm.kernel"])
        gate = F.silu(h @ s[block + "feed_forward.w1.kernel"])
        up = h @ s[block + "feed_forward.w3.kernel"]
        x = x + (gate * up) @ s[block + "feed_forward.w2.kernel"]
    return norm(x, s["transformer.ln_f.kernel"]) @ s["lm_head.kernel"]


def test_the_permutation_is_the_one_of_the_converter(rng):
    """view(heads, C / 2, 2, width), axes 1 and 2 swapped, as EasyLM's converter writes it."""
    weight = torch.randn(6 * 10, 7, generator=rng)
    moved = from_interleaved(weight, heads=6)
    assert torch.equal(moved, weight.view(6, 5, 2, 7).transpose(1, 2).reshape(60, 7))
    assert moved[:10, 0].tolist() == weight[[0, 2, 4, 6, 8, 1, 3, 5, 7, 9], 0].tolist()


@pytest.mark.parametrize(("heads", "dim"), [(1, 2), (3, 4), (4, 10), (32, 100)])
def test_the_permutations_undo_each_other(rng, heads, dim):
    weight = torch.randn(heads * dim, 3, generator=rng)
    there, back = from_interleaved(weight, heads=heads), to_interleaved(weight, heads=heads)
    assert torch.equal(to_interleaved(there, heads=heads), weight)
    assert torch.equal(from_interleaved(back, heads=heads), weight)
    assert torch.equal(there, weight) == (dim == 2)
    assert torch.equal(there.sort(0).values, weight.sort(0).values)  # rows move, nothing else


@pytest.mark.parametrize(("suffix", "join"), [(".npz", "/"), (".safetensors", ".")])
def test_logits_are_those_of_neighbouring_pairs(state, tmp_path, rng, suffix, join):
    path = tmp_path / f"state{suffix}"
    table = {"params" + join + name.replace(".", join): t for name, t in state.items()}
    if suffix == ".npz":
        np.savez(path, **{name: t.numpy() for name, t in table.items()})
    else:
        save_file(table, path)
    model = easylm.load(path, heads=HEADS)
    assert not model.training
    assert model.reads == Reads(
        layout="none", codes=8192, codes_per_image=256, row_len=4096, whole_rows=True
    )
    ids = torch.randint(0, VOCAB, (30,), generator=rng)
    with torch.no_grad():
        found = model(ids[None])[0]
    wanted = reference(state, ids)
    assert wanted.std() > 1
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=0)  # fp32 against float64
    with torch.no_grad():  # rows as they come would give another network
        for block in model.layers:
            block.attn.q.weight.copy_(to_interleaved(block.attn.q.weight, heads=HEADS))
            block.attn.k.weight.copy_(to_interleaved(block.attn.k.weight, heads=HEADS))
        assert (model(ids[None])[0].double() - wanted).abs().max() > 0.1


def test_the_command_writes_a_folder_that_transformers_opens(state, tmp_path, rng, capsys):
    save_file(state, tmp_path / "state.safetensors")
    command = easylm.Convert(
        state=tmp_path / "state.safetensors", heads=HEADS, out=tmp_path / "hf", shard_gb=1e-3
    )
    easylm.main(command)
    assert "hf" in capsys.readouterr().out
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.randint(0, VOCAB, (20,), generator=rng)
    with torch.no_grad():
        found = theirs(ids[None]).logits[0]
        assert torch.equal(lvm.load(tmp_path / "hf").head.weight, state["lm_head.kernel"].T)
    torch.testing.assert_close(found.double(), reference(state, ids), atol=1e-4, rtol=0)


def test_bf16_is_the_rounded_model(state, tmp_path):
    save_file(state, tmp_path / "state.safetensors")
    half = easylm.load(tmp_path / "state.safetensors", heads=HEADS, dtype=torch.bfloat16)
    full = easylm.load(tmp_path / "state.safetensors", heads=HEADS).state_dict()
    assert all(torch.equal(v, full[k].bfloat16()) for k, v in half.state_dict().items())


def test_what_the_model_reads_may_lie_beside_the_state(state, tmp_path):
    save_file(state, tmp_path / "state.safetensors")
    reads = Reads(layout="bos", codes=512, codes_per_image=64, row_len=1024)
    reads.save(tmp_path)
    assert easylm.load(tmp_path / "state.safetensors", heads=HEADS).reads == reads


def without(state, *names):
    return {k: v for k, v in state.items() if k not in names}


@pytest.mark.parametrize(
    ("change", "heads", "words"),
    [
        (lambda s: s, 5, "--heads 5: the queries .* have 24 channels"),
        (lambda s: s, 0, "--heads 0"),
        (lambda s: without(s, "lm_head.kernel"), 3, r"missing: lm_head\.kernel"),
        (lambda s: s | {"extra": s["lm_head.kernel"] + 1}, 3, "unexpected: extra"),
        (
            lambda s: s | {"lm_head.kernel": s["lm_head.kernel"].T.contiguous()},
            3,
            r"another shape: lm_head\.kernel \[8292, 24\], wanted \[24, 8292\]",
        ),
        (lambda s: without(s, "transformer.wte.embedding"), 3, "holds no LLaMA of EasyLM"),
        (
            lambda s: s | {"params.lm_head.kernel": s["lm_head.kernel"] + 1},
            3,
            "differ in nothing but their prefix",
        ),
    ],
)
def test_other_states_are_refused_by_what_is_wrong(state, tmp_path, change, heads, words):
    save_file(change(state), tmp_path / "state.safetensors")
    with pytest.raises(InputError, match=words):
        easylm.load(tmp_path / "state.safetensors", heads=heads)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="no file at"):
        easylm.load(tmp_path / "nothing.npz", heads=1)
    (tmp_path / "streaming_params").write_bytes(b"\x92")
    with pytest.raises(InputError, match=r"neither \.safetensors nor \.npz"):
        easylm.load(tmp_path / "streaming_params", heads=1)
    (tmp_path / "bad.npz").write_bytes(b"PK but not a zip")
    with pytest.raises(InputError, match="cannot be read as a table"):
        easylm.load(tmp_path / "bad.npz", heads=1)
    np.savez(tmp_path / "objects.npz", a=np.array([{"a": 1}], dtype=object))
    with pytest.raises(InputError, match="cannot be read as a table"):
        easylm.load(tmp_path / "objects.npz", heads=1)
