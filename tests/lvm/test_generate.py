"""Sampling against transformers and against slow loops; what must not change a drawn image."""

import json
from dataclasses import replace

import pytest
import torch

import lvm
from lvm import export
from lvm.decoding.sampling import pick, uniform
from lvm.decoding.windows import log_likelihood
from lvm.generate import Drawn, Sampling, draw, generate_codes, rank, stream
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


@pytest.mark.parametrize(("layout", "qk_norm"), [("bos", False), ("none", False), ("bos", True)])
def test_greedy_equals_transformers_generate(make_model, tmp_path, rng, layout, qk_norm):
    transformers = pytest.importorskip("transformers", reason="the oracle; in the extra dev")
    model = make_model(layout=layout, qk_norm=qk_norm)
    export.write(model, tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
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


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ((6, N), {}, "prompt of 6 images is too long: a row of this model has 6.*2 pairs"),
        ((2, N + 1), {}, "images of 5 codes"),
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


def slow_draw(model, prompt, sampling, *, candidate=0, given=()):
    """Draw one candidate a code at a time: whole forward passes, and two of them with guidance."""
    reads = model.reads
    n, room = reads.codes_per_image, reads.images_per_row
    start = [reads.vocab.bos] if reads.layout == "bos" else []
    u = uniform(sampling.candidates, sampling.new * n, sampling.seed)[candidate]
    contexts = [prompt.tolist(), prompt[max(0, len(prompt) - sampling.bare) :].tolist()]
    images = []
    for f in range(sampling.new):
        codes = list(given) if f == 0 else []
        for j in range(len(codes), n):
            found = []
            for context in contexts:
                whole = context + images
                window = whole if len(whole) < room else whole[len(whole) - room + 1 :]
                ids = torch.tensor([[*start, *(x for image in window for x in image), *codes]])
                with torch.no_grad():
                    found.append(model(ids)[:, -1, : reads.codes].float())
            full, bare = found
            logits = bare + sampling.guidance * (full - bare)
            codes.append(int(pick(logits, u[None, f * n + j, None], sampling)))
        images.append(codes)
    return torch.tensor(images)


GUIDED = Sampling(new=7, candidates=2, guidance=2.5, seed=1)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(new=3, candidates=2, seed=3, min_p=0.05),
        Sampling(new=7, candidates=2, seed=3, top_p=0.9),  # two windows past the row
        GUIDED,
        replace(GUIDED, bare=2, guidance=0.5, temperature=0),
        replace(GUIDED, bare=0, new=2),
        replace(GUIDED, bare=9),  # no shorter than the prompt
    ],
)
@pytest.mark.parametrize("given", [0, 3])
def test_a_draw_is_that_of_a_slow_loop(make_model, rng, sampling, given):
    model = make_model()
    prompt = torch.randint(0, K, (3, N), generator=rng)
    codes = torch.randint(0, K, (given,), generator=rng)
    drawn = draw(model, prompt, sampling, given=codes)
    for c in range(2):
        wanted = slow_draw(model, prompt, sampling, candidate=c, given=codes.tolist())
        assert torch.equal(drawn.codes[c], wanted)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("layout", ["bos", "none"])
def test_prompts_of_several_lengths_are_drawn_as_alone(make_model, rng, layout, guidance):
    """Also where some have left the row and others have not."""
    model = make_model(layout=layout)
    prompts = [torch.randint(0, K, (k, N), generator=rng) for k in (5, 1, 3, 1)]
    sampling = Sampling(new=7, candidates=3, seed=2, guidance=guidance)
    together = draw(model, prompts, sampling)
    assert together.codes.shape == (4, 3, 7, N)
    for b, prompt in enumerate(prompts):
        alone = draw(model, prompt, sampling)
        assert torch.equal(together.codes[b], alone.codes)
        # The same sums in batches of another size.
        torch.testing.assert_close(
            together.log_likelihood[b], alone.log_likelihood, atol=1e-4, rtol=1e-5
        )


def test_guidance_of_one_is_off_and_costs_no_row(make_model, rng):
    model = make_model()
    prompt = torch.randint(0, K, (3, N), generator=rng)
    rows = []
    model.embed.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    off = draw(model, prompt, Sampling(candidates=4))
    assert set(rows) == {1, 4}
    near = draw(model, prompt, Sampling(candidates=4, guidance=1 + 1e-6))
    assert set(rows) == {1, 4, 8}
    assert torch.equal(off.codes, near.codes)
    assert not torch.equal(off.codes, generate_codes(model, prompt, candidates=4, guidance=4.0))


def test_given_codes_are_kept_and_not_counted(make_model, rng):
    model = make_model()
    prompt = torch.randint(0, K, (2, N), generator=rng)
    free = draw(model, prompt, Sampling(new=2, candidates=2, seed=5))
    given = free.codes[1, 0, :3]
    drawn = draw(model, prompt, Sampling(new=2, candidates=2, seed=5), given=given)
    assert torch.equal(drawn.codes[:, 0, :3], given.expand(2, 3))
    assert torch.equal(drawn.codes[1], free.codes[1])  # the rest has the numbers it had
    ids = torch.cat([torch.tensor([K]), prompt.flatten(), drawn.codes[0].flatten()])
    with torch.no_grad():
        logp = model(ids[None, :-1])[0].log_softmax(-1).gather(-1, ids[1:, None])[-2 * N :, 0]
    wanted = torch.stack([logp[3:N].sum(), logp[N:].sum()])
    # fp32, the same sums in another order
    torch.testing.assert_close(drawn.log_likelihood[0], wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.zeros(N).long(), "fewer than the 4 codes"),
        (torch.zeros(1, 2).long(), "in one row"),
        (torch.tensor([K]), r"given codes must lie in 0 … 39"),
        (torch.tensor([-1]), r"given codes must lie in 0 … 39"),
    ],
)
def test_given_codes_that_do_not_fit_are_refused(make_model, given, words):
    with pytest.raises(InputError, match=words):
        draw(make_model(), torch.zeros(1, N).long(), Sampling(), given=given)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_greedy_is_the_argmax_of_one_pass_over_512_codes(make_model, rng, qk_norm):
    model = make_model(codes_per_image=64, row_images=9, qk_norm=qk_norm, init_std=0.35)
    prompt = torch.randint(0, K, (1, 64), generator=rng)
    drawn = generate_codes(model, prompt, new=8, temperature=0)[0].flatten()
    ids = torch.cat([torch.tensor([K]), prompt.flatten(), drawn])
    with torch.no_grad():
        wanted = model(ids[None, :-1])[0, -512:, :K].argmax(-1)
    assert torch.equal(drawn, wanted)
    assert len(set(drawn.tolist())) > 8


def test_an_eos_in_the_config_ends_no_image(make_model, tmp_path, rng):
    model = make_model()
    with torch.no_grad():
        model.head.weight[2] *= 4  # code 2 is drawn often
    export.write(model, tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": 2}))
    prompt = torch.randint(0, K, (2, N), generator=rng)
    for temperature in (0.0, 1.0):
        options = {"new": 6, "candidates": 3, "temperature": temperature}
        drawn = generate_codes(lvm.load(tmp_path / "m"), prompt, **options)
        assert torch.equal(drawn, generate_codes(model, prompt, **options))
        assert drawn.shape == (3, 6, N) and bool((drawn[..., :-1, :] == 2).any())


@pytest.mark.parametrize("sampling", [Sampling(new=7, candidates=3, seed=4), GUIDED])
@pytest.mark.parametrize("given", [0, 3])
def test_a_stream_is_a_draw_in_pieces(make_model, rng, sampling, given):
    model = make_model()
    prompt = torch.randint(0, K, (4, N), generator=rng)
    codes = torch.randint(0, K, (given,), generator=rng)
    pieces = list(stream(model, prompt, sampling, given=codes))
    places = [(p.frame, p.codes.shape[1]) for p in pieces]
    # Rows of 2 codes; three given codes end the first row, which is not drawn.
    assert places == [(f, m) for f in range(7) for m in (2, 4)][given // 2 :]
    drawn = draw(model, prompt, sampling, given=codes).codes
    for piece in pieces:
        assert torch.equal(piece.codes, drawn[:, piece.frame, : piece.codes.shape[1]])


def test_a_closed_stream_works_no_more(make_model, rng):
    model = make_model(codes_per_image=16)
    calls = []
    model.embed.register_forward_hook(lambda module, args, out: calls.append(1))
    pieces = stream(model, torch.randint(0, K, (2, 16), generator=rng), Sampling(new=2))
    assert calls == []
    assert next(pieces).codes.shape == (1, 4)
    assert len(calls) == 4  # the prompt and three codes: the row, and none of the next
    pieces.close()
    assert next(pieces, None) is None and len(calls) == 4


def test_a_stream_refuses_when_it_is_called(make_model):
    with pytest.raises(InputError, match="prompt of 6 images"):
        stream(make_model(), torch.zeros(6, N).long(), Sampling())


def whole_log_likelihood(model, prompt, codes):
    ids = torch.cat([torch.tensor([K]), prompt.flatten(), codes.flatten()])
    with torch.no_grad():
        logp = model(ids[None, :-1])[0].log_softmax(-1)
    return float(logp.gather(-1, ids[1:, None])[-codes.numel() :].sum())


def test_candidates_are_ranked_by_likelihood_and_by_gain(make_model, rng):
    model = make_model()
    prompts = [torch.randint(0, K, (k, N), generator=rng) for k in (3, 2)]
    drawn = draw(model, prompts, Sampling(new=2, candidates=6))
    full = [[whole_log_likelihood(model, p, c) for c in drawn.codes[b]]
            for b, p in enumerate(prompts)]  # fmt: skip
    bare = [[whole_log_likelihood(model, p[-1:], c) for c in drawn.codes[b]]
            for b, p in enumerate(prompts)]  # fmt: skip
    full, bare = torch.tensor(full), torch.tensor(bare)
    by_likelihood, by_gain = full.argsort(-1, True), (full - bare).argsort(-1, True)
    assert not torch.equal(by_likelihood, by_gain)
    assert torch.equal(rank(model, prompts, drawn), by_likelihood)
    assert torch.equal(rank(model, prompts, drawn, by="gain"), by_gain)
    first = Drawn(drawn.codes[0], drawn.log_likelihood[0])
    assert torch.equal(rank(model, prompts[0], first, by="gain"), by_gain[0])


def test_bf16_weights_draw_and_score_as_fp32_does(make_model, rng):
    model = make_model(qk_norm=True)
    half = make_model(qk_norm=True).to(torch.bfloat16)
    prompt = torch.randint(0, K, (3, N), generator=rng)
    drawn = draw(half, prompt, Sampling(new=6, candidates=8, guidance=1.5))
    assert int(drawn.codes.max()) < K and drawn.log_likelihood.dtype == torch.float32
    wanted = log_likelihood(model, model.reads, [prompt], drawn.codes[None])[0]
    with torch.no_grad():
        spread = float(model(torch.cat([torch.tensor([K]), prompt.flatten()])[None]).std())
    # Some twenty products and sums in a row, each rounded to 2^-9 of logits that spread by `spread`
    # (as in tests/lvm/test_model.py); a code's log-likelihood errs as two logits do.
    error = (drawn.log_likelihood - wanted).abs().mean() / N
    assert 0 < float(error) < 2 * 0.05 * spread


def test_guidance_against_nothing_needs_a_bos(make_model):
    prompt = torch.zeros(1, N).long()
    with pytest.raises(InputError, match="take bare 1"):
        draw(make_model(layout="none"), prompt, Sampling(guidance=2, bare=0))
    draw(make_model(layout="none"), prompt, Sampling(guidance=2, bare=1))


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
    assert rows == [(2, 1 + 3 * N), *[(8,)] * (N - 1)]
