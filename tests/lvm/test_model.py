"""The trunk against transformers, and what must not change its numbers."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lvm.config import ModelConfig
from lvm.interop import hf_names, to_hf
from lvm.mask import allowed, attention_mask
from lvm.model import Transformer, build, on_meta, rotary
from lvm.objectives.next_code import next_code
from lvm.recipes import recipes
from visual_sentences.pack import Rows, pack
from visual_sentences.vocab import Vocab

transformers = pytest.importorskip("transformers", reason="the oracle; in the extra dev")


def hugging_face(model: Transformer):
    """Transformers' model with the weights of ours."""
    config = to_hf(model.config, model.reads, dtype=torch.float32)
    config = transformers.AutoConfig.for_model(**config, attn_implementation="eager")
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert type(theirs).__name__.startswith("Qwen3" if model.config.qk_norm else "Llama")
    names = hf_names(model.config)
    theirs.load_state_dict({names[k]: v for k, v in model.state_dict().items()})
    return theirs


def rows_of(*sentences: torch.Tensor, width: int) -> Rows:
    """One stored row of sentences."""
    tokens, starts, place = torch.zeros(1, width, dtype=torch.int32), [], 0
    for sentence in sentences:
        starts.append(place)
        tokens[0, place : place + len(sentence)] = sentence
        place += len(sentence)
    return Rows(
        tokens=tokens,
        starts=torch.tensor([starts + [-1] * 2], dtype=torch.int32),
        length=torch.tensor([place], dtype=torch.int32),
        source=torch.zeros(1, dtype=torch.int32),
        row=torch.zeros(1, dtype=torch.int64),
    )


@pytest.mark.parametrize("dim", [64, 96, 100, 128])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("qk_norm", [False, True], ids=["llama", "qwen3"])
def test_logits_equal_transformers(make_model, rng, dim, kv_heads, qk_norm):
    shape = {"width": 2 * dim, "heads": 2, "kv_heads": kv_heads, "ffn": 160, "norm_eps": 1e-3}
    model = make_model(**shape, rope_theta=5000.0, init_std=0.1, qk_norm=qk_norm)
    ids = torch.randint(0, model.config.vocab_size, (2, 70), generator=rng)
    with torch.no_grad():
        ours, theirs = model(ids), hugging_face(model)(ids).logits
    # fp32 sums in another order; logits have a spread above 1, so this is 1e-4 of it or less.
    assert ours.std() > 1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_head_dim_may_differ_from_width_over_heads(make_model, rng):
    model = make_model(width=48, heads=2, kv_heads=1, head_dim=40)
    ids = torch.randint(0, 40, (1, 30), generator=rng)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), hugging_face(model)(ids).logits, atol=1e-4, rtol=0)


def test_bos_loss_of_a_packed_row_is_transformers_own_loss_of_each_sentence(make_model, rng):
    model = make_model()
    vocab = model.reads.vocab
    a, b = (torch.randint(0, 40, (n,), generator=rng) for n in (12, 8))
    batch = pack(rows_of(a, b, width=24), layout="bos", vocab=vocab)
    theirs = hugging_face(model)
    with torch.no_grad():
        mask = attention_mask(batch.doc, batch.block)
        features = model.features(batch.ids, pos=batch.pos, mask=mask)
        ours = next_code(features, model.head.weight, batch.labels)
        total = 0.0
        for codes in (a, b):
            ids = torch.cat([torch.tensor([vocab.bos]), codes])[None]
            total += float(theirs(ids, labels=ids).loss) * len(codes)
    assert int(ours.count) == 20
    assert float(ours.loss) == pytest.approx(total, rel=1e-5)  # fp32 sums of 20 terms


@pytest.mark.parametrize("layout", ["bos", "none"])
def test_packed_sentences_do_not_see_each_other(make_model, rng, layout):
    model = make_model(layout=layout)
    a, b = (torch.randint(0, 40, (n,), generator=rng) for n in (12, 8))
    vocab = model.reads.vocab

    def logits(*sentences, width):
        batch = pack(rows_of(*sentences, width=width), layout=layout, vocab=vocab)
        with torch.no_grad():
            return model(batch.ids, pos=batch.pos, mask=attention_mask(batch.doc, batch.block))[0]

    packed = logits(a, b, width=24)
    # The same sums over fewer masked terms: the order may differ, nothing else.
    torch.testing.assert_close(packed[:12], logits(a, width=12), atol=2e-5, rtol=0)
    torch.testing.assert_close(packed[12:20], logits(b, width=8), atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", sorted(recipes()))
def test_no_position_of_a_recipe_reads_its_own_label(rng, name):
    """By gradient: a logit moves with exactly the inputs that the mask rule names."""
    run = recipes()[name]()
    vocab = Vocab(codes=40, codes_per_image=4)
    config = ModelConfig(
        width=32, layers=2, heads=4, kv_heads=2, ffn=32, vocab_size=vocab.size, init_std=0.2
    )
    model = build(config, seed=1)
    a, b = (torch.randint(0, 40, (n,), generator=rng) for n in (8, 4))
    rows = rows_of(a, b, width=16)
    batch = pack(rows, layout=run.layout, vocab=vocab, whole_rows=run.whole_rows)
    inputs = []
    model.embed.register_forward_hook(lambda module, args, out: inputs.append(out))
    logits = model(batch.ids, pos=batch.pos, mask=attention_mask(batch.doc, batch.block))[0]
    weights = torch.randn(logits.shape, generator=rng)
    reads = allowed(batch.doc, batch.block)[0]
    seen = 0
    for q in (batch.labels[0] >= 0).nonzero().flatten().tolist():
        (slope,) = torch.autograd.grad((logits[q] * weights[q]).sum(), inputs[0], retain_graph=True)
        moves = slope[0].abs().sum(-1) > 0  # [T]
        assert torch.equal(moves, reads[q]), f"{name}: position {q}"
        assert not moves[q + 1 :].any(), f"{name}: position {q} reads what it predicts"
        seen += 1
    assert seen == int((batch.labels >= 0).sum()) > 8


@pytest.mark.parametrize("name", sorted(recipes()))
def test_counts_of_parameters_are_those_of_the_built_model(name):
    config = recipes()[name]().model
    config = replace(config, vocab_size=config.vocab_size or 640)
    model = on_meta(config)
    tables = sum(p.numel() for part in (model.embed, model.head) for p in part.parameters())
    total = sum(p.numel() for p in model.parameters())
    assert config.num_params() == total
    assert config.num_params(embeddings=False) == total - tables


@pytest.mark.parametrize("name", ["tiny", "lvm_100m", "lvm_3b", "lvm_3b_paper"])
def test_flops_are_those_that_torch_counts(name):
    config = replace(recipes()[name]().model, layers=2, vocab_size=640)
    length = 256
    # Shapes alone, no memory; written-out attention, since torch does not count the fused CPU one.
    with (
        FakeTensorMode(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        Transformer(config)(torch.zeros(1, length, dtype=torch.long))
    # A training step is three forward passes; torch counts every pair of positions.
    counted = 3 * counter.get_total_flops() / length
    assert config.flops_per_token(length, causal=False) == counted
    pairs = counted - config.flops_per_token(length)
    assert pairs == 6 * config.layers * config.heads * config.dim * length


PUBLISHED = {  # millions of parameters, training FLOPs a token at 4096, causal: LVM's code
    "lvm_300m_paper": (291.0, 2.25e9),
    "lvm_600m_paper": (648.4, 4.64e9),
    "lvm_1b_paper": (1147.1, 7.89e9),
    "lvm_3b_paper": (3274.7, 2.15e10),
    "lvm_7b_paper": (6544.2, 4.23e10),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_paper_recipes_have_the_published_size(name):
    config = recipes()[name]().model
    millions, flops = PUBLISHED[name]
    assert round(config.num_params() / 1e6, 1) == millions
    assert config.flops_per_token(4096) == pytest.approx(flops, rel=0.01)  # three digits published


def test_a_seed_draws_the_same_weights_whatever_the_table(make_model):
    small, large = make_model(vocab_size=128), make_model(vocab_size=256)
    assert torch.equal(small.layers[1].attn.q.weight, large.layers[1].attn.q.weight)
    assert not torch.equal(
        small.layers[1].attn.q.weight, make_model(seed=1).layers[1].attn.q.weight
    )


def test_every_tensor_is_drawn_by_its_place_and_qk_norm_moves_none(make_model):
    """Old models keep their weights: the seed of a tensor is 100003 seeds and its place."""
    plain = build(make_model().config, seed=5)
    places = {"embed.weight": 0, "layers.0.attn.q.weight": 2, "layers.0.mlp.gate.weight": 7}
    places |= {"layers.1.attn.q.weight": 11, "layers.1.mlp.down.weight": 18, "head.weight": 20}
    state = plain.state_dict()
    for name, place in places.items():
        noise = torch.randn(
            state[name].shape, generator=torch.Generator().manual_seed(500_015 + place)
        )
        assert torch.equal(state[name], noise * plain.config.init_std), name
    normed = build(replace(plain.config, qk_norm=True), seed=5).state_dict()
    assert all(torch.equal(normed.pop(name), tensor) for name, tensor in state.items())
    assert sorted(normed) == [
        f"layers.{i}.attn.{x}_norm.weight" for i in range(2) for x in ("k", "q")
    ]
    assert all(torch.equal(tensor, torch.ones(8)) for tensor in normed.values())


def test_qk_norm_makes_logits_blind_to_the_size_of_queries(make_model, rng):
    ids = torch.randint(0, 40, (1, 20), generator=rng)
    moved = []
    for qk_norm in (True, False):
        model = make_model(qk_norm=qk_norm, norm_eps=1e-12)
        with torch.no_grad():
            before = model(ids)
            for block in model.layers:
                block.attn.q.weight *= 8.0
            moved.append(float((model(ids) - before).abs().max()))
    assert moved[0] < 1e-4 < 0.1 < moved[1]  # fp32 roundings of logits of size 1


@pytest.mark.parametrize("cuda", [False, True])
def test_qk_norm_under_autocast(make_model, rng, monkeypatch, cuda):
    """Autocast on CUDA norms to fp32, which is put on here. Attention refuses mixed types."""
    plain = torch.nn.functional.rms_norm

    def wide(x, shape, weight, eps):
        return plain(x.float(), shape, weight.float(), eps)

    if cuda:
        monkeypatch.setattr("kernels.rope.F.rms_norm", wide)
    model = make_model(qk_norm=True)
    ids = torch.randint(0, 40, (1, 20), generator=rng)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(ids)
    with torch.no_grad():
        wanted = model.float()(ids)
    assert found.dtype == torch.bfloat16
    # Some twenty products and sums in a row, each rounded to 2^-9 of logits that spread by `std`.
    assert float((found - wanted).abs().mean()) < 0.05 * float(wanted.std())


def test_rotary_angles_stay_exact_under_bf16():
    """bf16 angles are wrong by radians at such positions; fp32 keeps 4095 to 2^-12."""
    pos = torch.tensor([[1, 1023, 4095]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cos, sin = rotary(pos, dim=128, theta=10_000.0)
    exact = pos.double()[..., None] * 10_000.0 ** (-torch.arange(0, 128, 2).double() / 128)
    for got, want in ((cos, exact.cos()), (sin, exact.sin())):
        assert got.dtype == torch.float32
        # an angle of 4095 times a frequency that is off by one fp32 rounding, and its own rounding
        torch.testing.assert_close(got[:, 0].double(), want, atol=4095 * 2**-22, rtol=0)
