"""The engine: what may not change a number, what it holds, and that a step waits for nothing."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lvm.decoding import decoder
from lvm.decoding.decoder import Decoder
from lvm.decoding.windows import Work
from lvm.generate import Sampling, draw
from lvm.model import Block, Transformer

K, N = 40, 4
SHAPES = {
    "plain": {},
    "qk_norm": {"qk_norm": True},
    "own heads": {"kv_heads": 4},
    "biases": {"attn_bias": True},
    "codebook": {"codebook_dim": 8},
    "gelu": {"mlp": "gelu", "norm": "layer", "rotary": False},
}


def make(make_model, rng, shape):
    model = make_model(**SHAPES[shape])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=rng))
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_is_a_forward_pass(make_model, rng, monkeypatch, shape):
    """With weights joined and as they are, of two lengths and in passes of a few positions."""
    model = make(make_model, rng, shape)
    prompts = [torch.randint(0, K, (k, N), generator=rng) for k in (4, 2)]
    sampling = Sampling(new=4, candidates=3)
    found = []
    for joined, positions in ((decoder.JOIN, decoder.PREFILL), (0, 1)):
        monkeypatch.setattr(decoder, "JOIN", joined)
        monkeypatch.setattr(decoder, "PREFILL", positions)
        found.append(draw(model, prompts, sampling))
    assert torch.equal(found[0].codes, found[1].codes)
    for b, prompt in enumerate(prompts):
        images = prompt.expand(3, -1, -1)
        for f in range(4):
            ids = torch.cat([images[:, -5:], found[0].codes[b, :, f, None]], 1).flatten(1)
            ids = torch.cat([torch.full((3, 1), K), ids], 1)
            with torch.no_grad():
                logp = model(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])
            wanted = logp[:, -N:].sum((1, 2))
            for drawn in found:
                # fp32, the same sums in another order
                torch.testing.assert_close(drawn.log_likelihood[b, :, f], wanted, atol=1e-4, rtol=0)
            images = torch.cat([images, found[0].codes[b, :, f, None]], 1)


@pytest.mark.parametrize("joined", [True, False])
def test_small_weights_are_joined_and_large_ones_are_not_copied(make_model, monkeypatch, joined):
    monkeypatch.setattr(decoder, "JOIN", 2**20 if joined else 0)
    model = make_model()
    work = Work(model, model.reads, [torch.zeros(1, N).long()], Sampling())
    block = model.layers[1]
    assert isinstance(block, Block)
    counts = [len(x) for x in work.decoder.weights[1]]
    assert counts == ([1, 1, 1, 1] if joined else [3, 1, 2, 1])
    same = work.decoder.weights[1].down[0][0].data_ptr() == block.mlp.down.weight.data_ptr()
    assert same != joined


def test_caches_hold_a_prompt_once(make_model, rng):
    model = make_model()
    prompts = [torch.randint(0, K, (k, N), generator=rng) for k in (2, 3)]
    work = Work(model, model.reads, prompts, Sampling(new=2, candidates=50))
    place = 2 * 2 * 2 * 8 * 4  # bytes: k and v, layers, groups, channels, fp32
    prefix, suffix = 2 * (1 + 3 * N), 100 * (2 * N - 1)
    assert work.decoder.cache_bytes == place * (prefix + suffix)


WAITS = {"item", "_local_scalar_dense", "is_nonzero", "nonzero", "equal", "_unique2"}


class Waits(TorchDispatchMode):
    """Refuses operators whose result the host waits for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in WAITS, name
        return func(*args, **(kwargs or {}))


SAMPLINGS = [
    Sampling(candidates=3),
    Sampling(candidates=3, temperature=0),
    Sampling(candidates=3, top_k=5, top_p=0.9, min_p=0.1, temperature=0.7, guidance=2.0),
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_step_waits_for_nothing(make_model, rng, sampling):
    model = make_model(qk_norm=True)
    work = Work(model, model.reads, [torch.randint(0, K, (2, N), generator=rng)], sampling)
    rows = work.rows()
    next(rows)
    with Waits():
        list(rows)
        with pytest.raises(AssertionError, match="item"):  # it would be seen
            work.codes[0, 0, 0, 0].item()


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_step_runs_on_tensors_without_data(make_model, sampling):
    """What would read one raises, also what a CPU's operators read without a word."""
    real = make_model(qk_norm=True)
    contexts = 2 if sampling.guidance != 1 else 1
    with FakeTensorMode(), torch.inference_mode():
        found = Decoder(
            Transformer(real.config, reads=real.reads),
            contexts=contexts,
            candidates=3,
            places=(13, 7),
            u=torch.zeros(3, 8),
            sampling=sampling,
        )
        found.step()
        with pytest.raises(DataDependentOutputException):
            found.last[0].item()
    assert found.last.shape == (3 * contexts,)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_step_leaves_its_buffers_where_they_are(make_model, rng, sampling):
    """What a captured graph needs: all that a later step reads is written in place."""
    model = make_model()
    work = Work(model, model.reads, [torch.randint(0, K, (2, N), generator=rng)], sampling)

    def addresses():
        held = {**vars(work.decoder), "k": work.decoder.suffix.k, "v": work.decoder.suffix.v}
        return {k: x.data_ptr() for k, x in held.items() if isinstance(x, torch.Tensor)}

    rows = work.rows()
    next(rows)
    before = addresses()
    list(rows)
    assert addresses() == before and len(before) > 10


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_graph_draws_what_single_steps_draw(make_model, rng, monkeypatch, sampling):
    model = make_model().cuda()
    prompts = [torch.randint(0, K, (k, N), generator=rng) for k in (4, 2)]
    graph = draw(model, prompts, sampling)
    monkeypatch.setattr(Decoder, "advance", Decoder.step)
    steps = draw(model, prompts, sampling)
    assert torch.equal(graph.codes, steps.codes)
    assert torch.equal(graph.log_likelihood, steps.log_likelihood)
