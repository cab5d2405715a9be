"""From a prompt of pictures to events: finished rows while they are drawn, then whole answers.

C candidates, F new images, n = s² codes an image, H = W pixels.
"""

import base64
import hashlib
import json
import math
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict
from typing import cast

import numpy as np
import torch
from torch import Tensor

from lvm.decoding.windows import log_likelihood
from lvm.generate import Piece, check_tokenizer, encode, reads_of, stream
from lvm.model import Transformer
from lvm.playground.asked import Asked, Kind
from lvm.playground.jobs import Event
from lvm.prompting.answers import floats, pictures
from tokenizer.cli import InputError
from tokenizer.images import encode_image, grid
from tokenizer.protocol import Tokenizer

LOOKS = 8  # pictures shown of an unfinished image; each costs the decoding of a whole one
SHEET_SIDE = 96  # pixels; smaller pictures are enlarged to about this on the sheet


class Answerer:
    """A model and its tokenizer, used by one thread at a time."""

    def __init__(self, model: Transformer, tok: Tokenizer) -> None:
        """Raises InputError where the tokenizer is not the model's."""
        check_tokenizer(reads_of(model), tok)
        self.model, self.tok = model, tok
        self.device = model.embed.weight.device
        self.size, n = tok.image_size, tok.codes_per_image
        self.rows = math.isqrt(n) if math.isqrt(n) ** 2 == n else 1  # of codes, as they finish
        self.width = n // self.rows
        self.id = fingerprint(model, tok)

    def answer(self, images: np.ndarray, asked: Asked) -> Generator[Event, None, None]:
        """Answer images uint8 [k, H, W, 3]; closing the generator stops the model.

        {"event": "start"}, then after each row of codes {"event": "rows", "frame", "rows", "of"},
        now and then with "images": of each candidate the finished rows as PNG, in base64; the last
        of a frame is the whole image. In the end {"event": "done",
        "nats", "gain", "sheet", "seconds"}. Raises InputError where the prompt does not fit.
        """
        yield {"event": "start"}
        begun = time.monotonic()
        sampling = asked.sampling()
        try:
            prompt = encode(self.model, self.tok, floats(images, self.device))
            every, frames = -(-self.rows // LOOKS), []
            pieces = cast(Generator[Piece, None, None], stream(self.model, prompt, sampling))
            with closing(pieces):
                for piece in pieces:
                    done = piece.codes.shape[-1] // self.width
                    event: Event = {
                        "event": "rows", "frame": piece.frame, "rows": done, "of": self.rows
                    }  # fmt: skip
                    if done % every == 0 or done == self.rows:
                        shown = self._finished(piece.codes)
                        event["images"] = [png(picture) for picture in shown]
                    if done == self.rows:
                        frames.append((piece.codes, shown))
                    yield event
            codes = torch.stack([codes for codes, _ in frames], dim=1)
            nats, gain = scores(self.model, prompt, codes)
            answers = np.stack([shown for _, shown in frames], axis=1)
            yield {
                "event": "done",
                "nats": nats,
                "gain": gain,
                "sheet": png(sheet(images, answers, kind=asked.kind)),
                "seconds": round(time.monotonic() - begun, 2),
            }
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"{sampling.candidates} candidates do not fit the device's memory; "
                "ask for fewer, or for a shorter prompt"
            ) from error

    def _finished(self, codes: Tensor) -> np.ndarray:
        """Return the finished rows of codes [C, m], uint8 [C, H·m/n, W, 3].

        Codes that are not drawn yet are those of the last finished row: the decoder looks at them
        too, so an unfinished picture still changes a little.
        """
        rows = codes.unflatten(-1, (-1, self.width))
        done = rows.shape[1]
        filled = torch.cat([rows, rows[:, -1:].expand(-1, self.rows - done, -1)], dim=1)
        return pictures(self.tok, filled.flatten(1))[:, : self.size * done // self.rows]


def sheet(prompt: np.ndarray, answers: np.ndarray, *, kind: Kind) -> np.ndarray:
    """Lay out prompt [k, H, W, 3] and answers [C, F, H, W, 3], uint8, on one sheet [h, w, 3].

    Pairs: a row a pair, then query and answer of each candidate. Frames: a row a candidate.
    """
    scale = max(1, SHEET_SIDE // prompt.shape[1])
    if kind == "pairs":
        answered = [picture for answer in answers for picture in (prompt[-1], answer[0])]
        return grid(np.stack([*prompt[:-1], *answered]), columns=2, scale=scale)
    rows = [np.concatenate([prompt, answer]) for answer in answers]
    return grid(np.concatenate(rows), columns=len(rows[0]), scale=scale)


def scores(
    model: Transformer, prompt: Tensor, codes: Tensor
) -> tuple[list[float], list[float] | None]:
    """Score answers codes [C, F, n] after prompt [k, n], in nats a code.

    Returns how surprising each answer is to the model (lower is likelier), and how much less so
    with the whole prompt than with its last image alone; None for a prompt of one image.
    """
    prompt = prompt.to(codes.device)

    def surprise(context: Tensor) -> Tensor:
        found = log_likelihood(model, reads_of(model), [context], codes[None])[0]
        return -found.double().sum(-1) / codes[0].numel()

    whole = surprise(prompt)
    gain = surprise(prompt[-1:]) - whole if len(prompt) > 1 else None
    return whole.tolist(), gain.tolist() if gain is not None else None


def png(image: np.ndarray) -> str:
    """Return uint8 [H, W, 3] as a PNG in base64."""
    return base64.b64encode(encode_image(image)).decode()


@torch.no_grad()
def fingerprint(model: Transformer, tok: Tokenizer) -> str:
    """Return a short name of model and tokenizer that another training would not have.

    Of each weight only the first and last 64 values count: 7B parameters would take half a minute.
    """
    known = hashlib.sha256(tok.id.encode())
    known.update(json.dumps([asdict(model.config), asdict(reads_of(model))]).encode())
    for name, weight in model.named_parameters():
        flat = weight.flatten()
        some = torch.cat([flat[:64], flat[-64:]]).float().cpu().numpy()
        known.update(name.encode() + some.tobytes())
    return known.hexdigest()[:20]
