"""From a question to its answers: drawn, ranked, decoded, laid out and written.

C candidates, k images before the answers, S the side of the tokenizer's images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lvm.generate import Sampling, decode, draw, encode, rank
from lvm.model import Transformer
from lvm.prompting.prompts import Question, kept_rows, mirrored, side_of
from tokenizer.files import atomic_write
from tokenizer.images import encode_image, grid
from tokenizer.protocol import Tokenizer

Rank = Literal["likelihood", "gain"]
IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
SHEET_SIDE = 96  # pixels; smaller images are enlarged to about this on sheets


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Candidates, best first where they were ranked."""

    codes: Tensor  # int64 [C, new, n]
    log_likelihood: Tensor  # fp32 [C, new], of the codes that were drawn
    drawn: int  # codes of a candidate that were drawn, the given ones not counted
    order: tuple[int, ...]  # the number that each candidate was drawn as, from 0

    @property
    def nats(self) -> list[float]:
        """Mean of -log p a drawn code, one a candidate."""
        return (-self.log_likelihood.double().sum(-1) / self.drawn).tolist()


def answer(
    model: Transformer,
    tok: Tokenizer,
    images: Tensor | Sequence[Tensor],
    sampling: Sampling,
    *,
    part: Tensor | None = None,
    rows: int = 0,
    by: Rank | None = None,
) -> Answers:
    """Answer a prompt of float images [k, 3, S, S] in [0, 1]; raises InputError where it cannot.

    Of `part`, float [3, S, S], the first `rows` rows of codes begin the first answer. `by` ranks.
    """
    prompt, given = encode(model, tok, images), None
    if part is not None:
        side = side_of(tok.codes_per_image)
        given = encode(model, tok, part[None])[0, : rows * side]
    drawn = draw(model, prompt, sampling, given=given)
    order = torch.arange(sampling.candidates)
    if by is not None:
        order = rank(model, prompt, drawn, by=by).cpu()
    home = prompt.device if given is None else given.device  # where the tokenizer is
    return Answers(
        codes=drawn.codes.to(home)[order.to(home)],
        log_likelihood=drawn.log_likelihood.cpu()[order],
        drawn=drawn.codes[0].numel() - (0 if given is None else len(given)),
        order=tuple(order.tolist()),
    )


def complete(
    model: Transformer,
    tok: Tokenizer,
    images: Tensor | Sequence[Tensor],
    sampling: Sampling,
    *,
    part: Tensor | None = None,
    keep: float = 0.5,
    by: Rank | None = None,
) -> Tensor:
    """Return float images [C, new, 3, S, S] in [0, 1]; arguments as `lvm.complete`."""
    rows = 0
    if part is not None:
        n, size = tok.codes_per_image, tok.image_size
        rows = kept_rows(keep, n)
        if part.shape == (3, size, size):  # any other is refused by `encode`
            part = part[:, torch.from_numpy(mirrored(rows * size // side_of(n), size))]
    found = answer(model, tok, images, sampling, part=part, rows=rows, by=by)
    return decode(tok, found.codes)


def answer_question(
    model: Transformer,
    tok: Tokenizer,
    question: Question,
    sampling: Sampling,
    *,
    by: Rank | None = None,
) -> tuple[np.ndarray, Answers]:
    """Return answers as uint8 [C, new, S, S, 3], and what is known of them."""
    device = model.embed.weight.device
    part = None if question.part is None else floats(question.part[None], device)[0]
    images = floats(question.images, device)
    found = answer(model, tok, images, sampling, part=part, rows=question.rows, by=by)
    return pictures(tok, found.codes), found


def pictures(tok: Tokenizer, codes: Tensor) -> np.ndarray:
    """Decode codes [..., n] to uint8 [..., S, S, 3]."""
    return (decode(tok, codes).float() * 255).round().byte().movedim(-3, -1).cpu().numpy()


def sheet(question: Question, answers: np.ndarray) -> np.ndarray:
    """Lay the prompt and its answers out on one sheet, uint8 [H, W, 3].

    Examples: a row an example, then a row a candidate, query and answers. Frames: a row a
    candidate, the frames of the prompt and then its own. A known part, and white below it, stands
    above the candidates in the column of the answer that it begins.
    """
    prompt, blank = question.images, np.full_like(answers[0, 0], 255)
    scale = max(1, SHEET_SIDE // len(blank))
    examples = len(prompt) // question.width if question.width else 0
    whole = examples * question.width
    rows = list(prompt[:whole].reshape(examples, -1, *blank.shape)) if examples else []
    asked = prompt[whole:]
    if question.part is not None:
        known = np.concatenate([question.part[: question.height], blank[question.height :]])
        rows.append(np.stack([*asked, known, *[blank] * (answers.shape[1] - 1)]))
    rows += [np.concatenate([asked, a]) for a in answers]
    return grid(np.concatenate(rows), columns=len(rows[-1]), scale=scale)


def animation(question: Question, answers: np.ndarray) -> np.ndarray:
    """Show the images of the prompt and then the answers one after another, uint8 [k + new, H, W,
    3]; several candidates side by side, best on the left."""
    candidates = len(answers)
    before = np.concatenate([question.images] * candidates, axis=2)
    after = np.concatenate(list(answers), axis=2)
    return np.concatenate([before, after])


def write_answers(out: Path, answers: np.ndarray) -> list[Path]:
    """Write answers [C, new, S, S, 3] to files by the suffix of `out`; returns them, `out` first.

    One answer is `out` itself. Several make `out` a grid, a candidate a row and a frame a column,
    and each a file beside it: OUT-1.png … for candidates or frames, OUT-1-2.png for both.
    """
    candidates, new = answers.shape[:2]
    if candidates * new == 1:
        write_image(out, answers[0, 0])
        return [out]
    files = []
    for c in range(candidates):
        for f in range(new):
            places = ([c + 1] if candidates > 1 else []) + ([f + 1] if new > 1 else [])
            files.append(out.with_stem("-".join([out.stem, *map(str, places)])))
            write_image(files[-1], answers[c, f])
    write_image(out, grid(answers.reshape(-1, *answers.shape[2:]), columns=new))
    return [out, *files]


def write_image(path: Path, image: np.ndarray) -> None:
    """Write uint8 [H, W, 3] atomically, in the format of the suffix."""
    with atomic_write(path) as file:
        file.write(encode_image(image, format=IMAGE_FORMATS[path.suffix.lower()], quality=95))


def floats(images: np.ndarray, device: torch.device) -> Tensor:
    """Return uint8 [k, H, W, 3] as float [k, 3, H, W] in [0, 1] on the device."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255
