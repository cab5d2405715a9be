"""Sampling against transformers and against slow loops; what must not change a drawn image."""

import math

import pytest
import torch

import lvm
from lvm import export, generate
from lvm.generate import Sampling, draw, generate_codes, pick
from tokenizer.cli import InputError
from tokenizer.config import VQGANConfig
from tokenizer.vqgan import VQGAN

K, N = 40, 4  # codes and codes an image of make_model's default


def slow_greedy(model, images, *, new):
    """Draw one code at a time with a whole forward pass each, no cache."""
    reads = model.reads
    for _ in range(new):
        images = images[max(0, len(images) - reads.images_per_row + 1) :]
        ids = images.flatten().tolist()
        for _ in range(reads.codes_per_image):
            start = [reads.vocab.bos] if reads.layout == "bos" else []
            with torch.no_grad():
                logits = model(torch.tensor([start + ids]))[0, -1, : reads.codes]
            ids.append(int(logits.argmax()))
        images = torch.tensor(ids).view(-1, reads.codes_per_image)
        yield images[-1]


@pytest.mark.parametrize("layout", ["bos", "none"])
def test_greedy_equals_transformers_generate(make_model, tmp_path, rng, layout):
    transformers = pytest.importorskip("transformers", reason="the oracle; in the extra dev")
    model = make_model(layout=layout)
    export.write(model, tmp_path / "m")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "m")
    images = torch.randint(0, K, (3, N), generator=rng)
    ids = images.flatten()[None]
    if layout == "bos":
        ids = torch.cat([torch.tensor([[K]]), ids], dim=1)
    found = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=3 * N
    )
    ours = generate_codes(model, images, new=3, temperature=0)
    assert torch.equal(ours.flatten(), found[0, ids.shape[1] :])
    assert len(set(ours.flatten().tolist())) > 3  # not one code for ever, which any cache gives


@pytest.mark.parametrize(("layout", "prompt"), [("bos", 0), ("bos", 5), ("none", 1), ("none", 5)])
def test_greedy_with_a_cache_equals_greedy_without(make_model, rng, layout, prompt):
    """Also past the end of the row, where the oldest images are dropped."""
    model = make_model(layout=layout)
    images = torch.randint(0, K, (prompt, N), generator=rng)
    ours = generate_codes(model, images, new=8, temperature=0)
    assert ours.shape == (1, 8, N)
    assert torch.equal(ours[0], torch.stack(list(slow_greedy(model, images, new=8))))


def test_a_candidate_is_the_same_whatever_the_number_of_candidates_and_prompts(make_model, rng):
    model = make_model()
    prompts = torch.randint(0, K, (3, 2, N), generator=rng)
    many = draw(model, prompts, Sampling(new=6, candidates=5, seed=7))
    assert many.codes.shape == (3, 5, 6, N)
    assert many.log_likelihood.shape == (3, 5, 6)
    for b, prompt in enumerate(prompts):
        few = draw(model, prompt, Sampling(new=6, candidates=2, seed=7))
        assert torch.equal(few.codes, many.codes[b, :2])
        # The same sums in batches of another size.
        torch.testing.assert_close(
            few.log_likelihood, many.log_likelihood[b, :2], atol=1e-4, rtol=1e-5
        )
    assert len({tuple(c.flatten().tolist()) for c in many.codes[0]}) == 5
    other = generate_codes(model, prompts, new=6, candidates=5, seed=8)
    assert not torch.equal(other, many.codes)


def test_an_image_drawn_earlier_does_not_depend_on_how_many_follow(make_model, rng):
    model = make_model()
    images = torch.randint(0, K, (4, N), generator=rng)
    long = generate_codes(model, images, new=5, candidates=2)
    assert torch.equal(generate_codes(model, images, new=1, candidates=2)[:, 0], long[:, 0])


def test_images_past_the_row_have_numbers_of_their_own(make_model):
    """With one image a row each starts from bos alone: equal numbers would give equal images."""
    drawn = generate_codes(make_model(row_images=1), torch.zeros(0, N).long(), new=3)
    assert len({tuple(image.tolist()) for image in drawn[0]}) == 3


def test_log_likelihoods_are_those_of_the_whole_table(make_model, rng):
    model = make_model()
    images = torch.randint(0, K, (3, N), generator=rng)
    drawn = draw(model, images, Sampling(new=2, candidates=3, temperature=0.5, top_k=9))
    for c in range(3):
        ids = torch.cat([torch.tensor([K]), images.flatten(), drawn.codes[c].flatten()])
        with torch.no_grad():
            logp = model(ids[None, :-1])[0].log_softmax(-1)
        each = logp.gather(-1, ids[1:, None])[-2 * N :].view(2, N).sum(1)
        torch.testing.assert_close(drawn.log_likelihood[c], each, atol=1e-4, rtol=0)


def test_only_codes_are_drawn_however_likely_a_special_is(make_model):
    model = make_model()
    with torch.no_grad():
        model.head.weight[K:] *= 50
    for temperature in (0.0, 1.0):
        drawn = generate_codes(
            model, torch.zeros(1, N).long(), new=9, candidates=8, temperature=temperature
        )
        assert int(drawn.max()) < K


def frequencies(logits, **options) -> torch.Tensor:
    """Draw with evenly spaced numbers: the frequencies are the distribution itself."""
    draws = 20_000
    u = ((torch.arange(draws) + 0.5) / draws)[:, None]
    picked = pick(logits.expand(draws, -1), u, Sampling(**options))
    return torch.bincount(picked.flatten(), minlength=logits.shape[-1]) / draws


def test_the_distribution_is_that_of_temperature_top_k_and_top_p():
    p = torch.tensor([0.05, 0.4, 0.0, 0.25, 0.3])
    logits = p.log()
    cases = [
        ({}, p),
        ({"temperature": 0.5}, p**2),
        ({"top_k": 2}, torch.tensor([0, 0.4, 0, 0, 0.3])),
        ({"top_k": 99}, p),
        ({"top_p": 0.7}, torch.tensor([0, 0.4, 0, 0, 0.3])),
        ({"top_p": 0.71}, torch.tensor([0, 0.4, 0, 0.25, 0.3])),
        ({"top_p": 1e-6}, torch.tensor([0, 1.0, 0, 0, 0])),
        # Top-p works on what top-k left: 0.4 of 0.7 is 0.57.
        ({"top_k": 2, "top_p": 0.5}, torch.tensor([0, 1.0, 0, 0, 0])),
        ({"temperature": 0.0}, torch.tensor([0, 1.0, 0, 0, 0])),
    ]
    for options, weights in cases:
        found = frequencies(logits, **options)
        # Each code's share of 20,000 evenly spaced numbers is off by at most one at each end.
        torch.testing.assert_close(found, weights / weights.sum(), atol=2e-4, rtol=0)


def test_the_ends_of_the_unit_interval_pick_codes_that_can_be(make_model):
    logits = torch.tensor([[-math.inf, 1.0, 2.0, -math.inf]])
    ends = generate._uniform(1, 1, 0).new_tensor([[0.0], [1 - 2**-20]])
    picked = pick(logits.expand(2, -1), ends, Sampling())
    assert picked.flatten().tolist() == [1, 2]
    assert float(generate._uniform(200, 5000, 0).max()) <= 1 - 2**-20


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ((6, N), {}, "prompt of 6 images is too long: a row of this model has 6.*2 pairs"),
        ((2, N + 1), {}, "images of 5 codes"),
        ((2, N), {"new": 0}, "at least 1"),
        ((2, N), {"candidates": 0}, "at least 1"),
        ((2, N), {"temperature": -1.0}, "temperature"),
        ((2, N), {"top_p": 0.0}, "top_p"),
    ],
)
def test_what_cannot_be_drawn_is_refused(make_model, prompt, options, words):
    with pytest.raises(InputError, match=words):
        generate_codes(make_model(), torch.zeros(prompt).long(), **options)


def test_codes_that_are_none_and_prompts_that_lack_a_start_are_refused(make_model):
    with pytest.raises(InputError, match=r"0 … 39"):
        generate_codes(make_model(), torch.full((1, N), K))
    with pytest.raises(InputError, match="no bos"):
        generate_codes(make_model(layout="none"), torch.zeros(0, N).long())


@pytest.fixture(scope="module")
def tok():
    """A random tokenizer of 4 codes an image of 8 pixels; codes far apart, so that all are used."""
    config = VQGANConfig(
        image_size=8, channels=32, multipliers=(1, 1, 1), res_blocks=1, latent_dim=4, code_dim=4,
        codebook_size=K,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tok = VQGAN(config)
        torch.nn.init.normal_(tok.quantize.embedding.weight)
    return tok.eval()


def test_complete_goes_from_images_to_images(make_model, tok, rng):
    model = make_model(tokenizer=tok.id)
    images = torch.rand(3, 3, 8, 8, generator=rng)
    frames = lvm.complete(model, tok, images, new=2, candidates=3, temperature=0.9, seed=1)
    assert frames.shape == (3, 2, 3, 8, 8)
    assert 0 <= float(frames.min()) <= float(frames.max()) <= 1
    drawn = generate_codes(model, tok.encode(images), new=2, candidates=3, temperature=0.9, seed=1)
    assert torch.equal(frames[2], tok.decode(drawn[2]))
    listed = lvm.complete(model, tok, list(images), new=2, candidates=3, temperature=0.9, seed=1)
    assert torch.equal(frames, listed)
    assert lvm.complete(model, tok, images[:0]).shape == (1, 1, 3, 8, 8)


def test_complete_refuses_images_and_tokenizers_that_do_not_fit(make_model, tok, rng):
    model = make_model(tokenizer=tok.id)
    images = torch.rand(3, 3, 8, 8, generator=rng)
    with pytest.raises(InputError, match=r"wanted \[3, 8, 8\]"):
        lvm.complete(model, tok, images[:, :, :4])
    with pytest.raises(InputError, match="divide uint8"):
        lvm.complete(model, tok, (images * 255).byte())
    with pytest.raises(InputError, match="divide uint8"):
        lvm.complete(model, tok, images * 255)
    with pytest.raises(InputError, match="another picture"):
        lvm.complete(make_model(tokenizer="0" * 64), tok, images)
    with pytest.raises(InputError, match="was trained on 41 codes"):
        lvm.complete(make_model(codes=41), tok, images)
    with pytest.raises(ValueError, match=r"set model\.reads"):
        model.reads = None
        lvm.complete(model, tok, images)


def test_a_prompt_is_computed_once_for_all_candidates(make_model, rng):
    model = make_model()
    rows = []
    model.embed.register_forward_hook(lambda module, args, out: rows.append(tuple(args[0].shape)))
    generate_codes(model, torch.randint(0, K, (2, 3, N), generator=rng), candidates=4)
    assert rows == [(2, 1 + 3 * N), *[(8, 1)] * (N - 1)]
