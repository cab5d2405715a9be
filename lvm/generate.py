"""Sampling images from a model: one prompt or many, several candidates, a cache of keys and values.

B prompts, C candidates, R = B·C rows, n codes an image, K codes. The prompt is computed once a
prompt, not once a candidate. An image is always exactly n codes below K: no eos ends it, no special
id is drawn. Candidate i draws its own stream of uniform numbers and is the same whatever the
number of candidates and of prompts; prompts of a batch share the streams, so that what differs
between their answers is the prompt.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lvm.config import Reads
from lvm.decoding.sampling import Sampling, pick
from lvm.decoding.windows import Work, log_likelihood
from lvm.model import Transformer
from tokenizer.cli import InputError
from tokenizer.protocol import Tokenizer

__all__ = [
    "Drawn", "Piece", "Sampling", "check_codes", "check_prompt", "check_tokenizer", "complete",
    "decode", "draw", "encode", "generate_codes", "pick", "rank", "reads_of", "stream",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Drawn:
    codes: Tensor  # int64 [..., C, new, n]
    log_likelihood: Tensor  # fp32 [..., C, new], natural log of the whole image under the model


@dataclass(frozen=True, slots=True)
class Piece:
    """What has been drawn of one new image."""

    frame: int  # which of the new images
    codes: Tensor  # int64 [C, m], the first m of its codes, in raster order


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


def draw(
    model: Transformer,
    prompts: Tensor | Sequence[Tensor],
    sampling: Sampling,
    *,
    given: Tensor | None = None,
) -> Drawn:
    """Draw images after prompt codes [k, n], [B, k, n], or B tensors [k_b, n] in a sequence.

    The first codes of the first new image may be `given`, int64 [m] with m < n (inpainting by
    prefix): they are part of the answer, not of its log-likelihood. An image that no longer fits
    the row is drawn after the last images_per_row - 1 images, their positions from 0, as LVM does.
    Log-likelihoods are the model's own, over its whole table at temperature 1 after the whole
    prompt, whatever the sampling was. Raises InputError for prompts that the model cannot continue.
    """
    reads, each = _prompts(model, prompts, sampling)
    work = Work(model, reads, each, sampling, _given(reads, given, model.head.weight.device))
    for _ in work.rows():
        pass
    single = isinstance(prompts, Tensor) and prompts.dim() == 2
    drawn, score = work.codes, work.log_likelihood
    return Drawn(drawn[0], score[0]) if single else Drawn(drawn, score)


def stream(
    model: Transformer, prompt: Tensor, sampling: Sampling, *, given: Tensor | None = None
) -> Iterator[Piece]:
    """Draw as `draw` does after one prompt [k, n], and yield each new image as its rows finish.

    A piece comes after every raster row (the whole image where n is no square); the last of a frame
    has all of its n codes. Rows are drawn when they are asked for, and closing the iterator ends
    the work. Errors are raised by the call itself.
    """
    reads, each = _prompts(model, prompt[None], sampling)
    work = Work(model, reads, each, sampling, _given(reads, given, model.head.weight.device))
    return _pieces(work)


def _pieces(work: Work) -> Iterator[Piece]:
    for frame, m in work.rows():
        yield Piece(frame, work.codes[0, :, frame, :m].clone())


def rank(
    model: Transformer,
    prompt: Tensor | Sequence[Tensor],
    drawn: Drawn,
    *,
    by: Literal["likelihood", "gain"] = "likelihood",
) -> Tensor:
    """Return int64 [..., C], the candidates of `draw` after the same prompts, best first.

    By the log-likelihood of all of a candidate's images, or by how much of it the prompt gives
    (`gain`): that after the whole prompt minus that after its last image alone. The first prefers
    flat pictures, which are likely after anything. Equal ones keep their order.
    """
    score = drawn.log_likelihood.sum(-1)
    if by == "gain":
        reads, each = _prompts(model, prompt)
        codes = drawn.codes if drawn.codes.dim() == 4 else drawn.codes[None]
        bare = log_likelihood(model, reads, [images[-1:] for images in each], codes)
        score = score - bare.sum(-1).view(score.shape)
    return score.argsort(dim=-1, descending=True, stable=True)


def _prompts(
    model: Transformer, prompts: Tensor | Sequence[Tensor], sampling: Sampling | None = None
) -> tuple[Reads, list[Tensor]]:
    """Return what the model reads and its prompts, each [k, n] on its device, all checked."""
    reads = reads_of(model)
    several = prompts[None] if isinstance(prompts, Tensor) and prompts.dim() == 2 else prompts
    each = [prompt.to(model.head.weight.device) for prompt in several]
    if not each:
        raise InputError("no prompt: wanted at least one")
    for prompt in each:
        check_prompt(reads, prompt[None])
    if sampling and sampling.guidance != 1 and sampling.bare == 0 and reads.layout == "none":
        raise InputError(
            "guidance against no image at all (bare 0): this model has no bos to start from; "
            "take bare 1"
        )
    return reads, each


def _given(reads: Reads, given: Tensor | None, device: torch.device) -> Tensor | None:
    """Return the given codes on the device, None for none of them."""
    if given is None or not len(given):
        return None
    if given.dim() != 1 or len(given) >= reads.codes_per_image:
        raise InputError(
            f"given codes of shape {list(given.shape)}: wanted fewer than the "
            f"{reads.codes_per_image} codes of an image, in one row"
        )
    if not 0 <= int(given.min()) <= int(given.max()) < reads.codes:
        raise InputError(f"given codes must lie in 0 … {reads.codes - 1}")
    return given.to(device)


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
