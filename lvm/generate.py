"""Sampling images from a model: one prompt or many, several candidates, a cache of keys and values.

B prompts, C candidates, R = B·C rows, n codes an image, K codes. The prompt is computed once a
prompt, not once a candidate. An image is always exactly n codes below K: no eos ends it, no special
id is drawn. Candidate i draws its own stream of uniform numbers and is the same whatever the
number of candidates and of prompts; prompts of a batch share the streams, so that what differs
between their answers is the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvm.config import Reads
from lvm.model import Cache, Transformer
from tokenizer.cli import InputError
from tokenizer.protocol import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What to draw, and how. Top-k and then top-p cut the distribution over codes."""

    new: int = 1
    """Images to draw after the prompt."""
    candidates: int = 1
    """Independent answers."""
    temperature: float = 1.0
    """0 takes the most likely code each time."""
    top_k: int = 0
    """Keep this many most likely codes (0: all)."""
    top_p: float = 1.0
    """Keep the most likely codes up to this probability (1: all)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.new < 1 or self.candidates < 1:
            raise InputError(
                f"{self.new} new images, {self.candidates} candidates: wanted at least 1 of each"
            )
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise InputError(
                f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}: wanted "
                "temperature >= 0, top_k >= 0 and 0 < top_p <= 1"
            )


@dataclass(frozen=True, slots=True)
class Drawn:
    codes: Tensor  # int64 [..., C, new, n]
    log_likelihood: Tensor  # fp32 [..., C, new], natural log of the whole image under the model


def complete(
    model: Transformer, tok: Tokenizer, images: Tensor | Sequence[Tensor], **options: Any
) -> Tensor:
    """Continue a visual sentence; returns float images [candidates, new, 3, H, W] in [0, 1].

    `images` is float [k, 3, H, W] in [0, 1], or a list of such [3, H, W], of the tokenizer's size.
    An analogy prompt is x1, y1, x2, y2, …, query. `options` are the fields of Sampling. Raises
    InputError where the tokenizer is not the model's, or the images do not fit.
    """
    sampling = Sampling(**options)
    codes = encode(model, tok, images)
    drawn = draw(model, codes, sampling).codes
    return decode(tok, drawn.to(codes.device))


def encode(model: Transformer, tok: Tokenizer, images: Tensor | Sequence[Tensor]) -> Tensor:
    """Return the codes [k, n] of prompt images, having checked both; arguments as `complete`."""
    check_tokenizer(reads_of(model), tok)
    if len(images) == 0:
        return torch.empty(0, tok.codes_per_image, dtype=torch.long)
    side = tok.image_size
    for image in images:
        if image.shape != (3, side, side):
            raise InputError(
                f"an image of shape {list(image.shape)}; wanted [3, {side}, {side}], as the "
                "tokenizer was trained: resize it first"
            )
        if not image.is_floating_point() or not -0.01 <= image.min() <= image.max() <= 1.01:
            raise InputError("images must be float in [0, 1]; divide uint8 pixels by 255")
    with torch.inference_mode():
        return tok.encode(images if isinstance(images, Tensor) else torch.stack(list(images)))


def decode(tok: Tokenizer, codes: Tensor) -> Tensor:
    """Return float images [..., 3, H, W] in [0, 1] of codes [..., n]."""
    with torch.inference_mode():
        images = tok.decode(codes.reshape(-1, codes.shape[-1])).clamp(0, 1)
    return images.view(*codes.shape[:-1], *images.shape[1:])


def generate_codes(model: Transformer, codes: Tensor, **options: Any) -> Tensor:
    """Return the codes [..., candidates, new, n] that `draw` draws after codes [..., k, n]."""
    return draw(model, codes, Sampling(**options)).codes


@torch.inference_mode()
def draw(model: Transformer, codes: Tensor, sampling: Sampling) -> Drawn:
    """Draw images after the prompt codes [k, n], or [B, k, n]: several prompts of one length.

    An image that no longer fits the row is drawn after the last images_per_row - 1 images, computed
    anew, as LVM does. Log-likelihoods are the model's own, over its whole table at temperature 1,
    whatever the sampling was; to rank by them prefers flat pictures.
    """
    reads = reads_of(model)
    prompts = (codes if codes.dim() == 3 else codes[None]).to(model.embed.weight.device)
    check_prompt(reads, prompts)
    n, room = reads.codes_per_image, reads.images_per_row
    new, candidates, batch = sampling.new, sampling.candidates, prompts.shape[0]
    noise = _uniform(candidates, new * n, sampling.seed).to(prompts.device)
    noise = noise.repeat(batch, 1)  # [R, new·n]

    images, rows = prompts, candidates  # `rows`: how many each row of `images` becomes
    answers, scores, done = [], [], 0
    while done < new:
        if images.shape[1] >= room:
            images = images[:, images.shape[1] - room + 1 :]
        count = min(new - done, room - images.shape[1])
        u = noise[:, done * n : (done + count) * n]
        drawn, score = _continue(model, reads, images, rows=rows, u=u, sampling=sampling)
        answers.append(drawn.unflatten(1, (count, n)))
        scores.append(score.unflatten(1, (count, n)).sum(-1))
        images = torch.cat([images.repeat_interleave(rows, 0), answers[-1]], dim=1)
        done, rows = done + count, 1
    shape = (batch, candidates) if codes.dim() == 3 else (candidates,)
    drawn, score = torch.cat(answers, 1), torch.cat(scores, 1)
    return Drawn(drawn.unflatten(0, shape), score.unflatten(0, shape))


def _continue(
    model: Transformer, reads: Reads, images: Tensor, *, rows: int, u: Tensor, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """Draw u.shape[1] codes after images [B, k, n] for `rows` rows of each; codes and their logs.

    The last code of all is never an input, so that R images fit a row of R.
    """
    ids = images.flatten(1)
    if reads.layout == "bos":
        ids = torch.cat([ids.new_full((ids.shape[0], 1), reads.vocab.bos), ids], dim=1)
    steps = u.shape[1]
    length = ids.shape[1] + steps - 1
    cache = Cache(model.config, rows=ids.shape[0], length=length, like=model.embed.weight)
    logits = model.head(model.features(ids, cache=cache)[:, -1])
    if rows > 1:
        cache, logits = cache.expand(rows), logits.repeat_interleave(rows, 0)
    drawn = torch.empty(u.shape, dtype=torch.long, device=u.device)
    score = torch.empty(u.shape, dtype=torch.float32, device=u.device)
    for t in range(steps):
        if t:
            logits = model(drawn[:, t - 1 : t], cache=cache)[:, -1]
        logits = logits.float()
        chosen = pick(logits[:, : reads.codes], u[:, t : t + 1], sampling)
        drawn[:, t : t + 1] = chosen
        score[:, t : t + 1] = logits.gather(-1, chosen) - logits.logsumexp(-1, keepdim=True)
    return drawn, score


def pick(logits: Tensor, u: Tensor, sampling: Sampling) -> Tensor:
    """Return the codes [R, 1] that uniform numbers u [R, 1] choose from fp32 logits [R, K].

    A code is where the running sum of the probabilities passes u: one number a code and no state,
    so that a row's draws depend on nothing but its own numbers.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    p = (logits / sampling.temperature).softmax(-1)
    ids = None
    if 0 < sampling.top_k < p.shape[-1]:
        p, ids = p.topk(sampling.top_k, dim=-1)
    elif sampling.top_p < 1:
        p, ids = p.sort(dim=-1, descending=True)
    if sampling.top_p < 1:
        before = p.cumsum(-1) - p
        p = p * (before < sampling.top_p * p.sum(-1, keepdim=True))
    sums = p.cumsum(-1)
    index = torch.searchsorted(sums, u * sums[:, -1:], right=True)
    return index if ids is None else ids.gather(-1, index)


def _uniform(rows: int, steps: int, seed: int) -> Tensor:
    """Return numbers in [0, 1), fp32 [rows, steps], each row from a generator of its own.

    The largest stays 2⁻²⁰ below 1, so that times a sum it never rounds up to the sum.
    """
    out = torch.empty(rows, steps)
    for i, row in enumerate(out):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63)
        row.copy_(torch.rand(steps, generator=generator))
    return out.clamp_(max=1 - 2**-20)


def reads_of(model: Transformer) -> Reads:
    if model.reads is None:
        raise ValueError("the model does not know what it reads; load it, or set model.reads")
    return model.reads


def check_tokenizer(reads: Reads, tok: Tokenizer) -> None:
    """Refuse a tokenizer whose codes are not those that the model was trained on."""
    check_codes(
        reads,
        tokenizer=tok.id,
        codes=tok.codebook_size,
        codes_per_image=tok.codes_per_image,
        what="tokenizer",
    )


def check_codes(
    reads: Reads, *, tokenizer: str, codes: int, codes_per_image: int, what: str
) -> None:
    """Refuse codes of another geometry or, where the model knows it, of another tokenizer."""
    if (codes, codes_per_image) != (reads.codes, reads.codes_per_image):
        raise InputError(
            f"the {what} has {codes} codes, {codes_per_image} an image; the model was trained on "
            f"{reads.codes} codes, {reads.codes_per_image} an image: give the one of its training"
        )
    if reads.tokenizer and tokenizer and tokenizer != reads.tokenizer:
        raise InputError(
            f"the codes of this {what} are of tokenizer {tokenizer[:12]}…, the model learnt those "
            f"of {reads.tokenizer[:12]}…: the same code is another picture there; give the one of "
            "its training"
        )


def check_prompt(reads: Reads, prompts: Tensor) -> None:
    """Refuse prompt codes [B, k, n] that the model cannot continue."""
    k, n = prompts.shape[1:]
    if n != reads.codes_per_image:
        raise InputError(f"images of {n} codes; the model reads {reads.codes_per_image} an image")
    if k >= reads.images_per_row:
        most = reads.images_per_row - 1
        raise InputError(
            f"a prompt of {k} images is too long: a row of this model has {most + 1}, one of them "
            f"the answer; give at most {most} frames, or {max(0, most - 1) // 2} pairs and a query"
        )
    if reads.layout == "none" and (k == 0 or reads.images_per_row == 1):
        raise InputError("this model has no bos, so it needs at least one image to start from")
    if prompts.numel() and not 0 <= int(prompts.min()) <= int(prompts.max()) < reads.codes:
        raise InputError(f"prompt codes must lie in 0 … {reads.codes - 1}")
