"""Which images a new one is drawn after, and a draw in progress.

A row of the model has `room` images. While prompt and new images fit, all are drawn on from one
prefix. The image after that is drawn after the last room - 1 images alone, computed anew with their
positions from 0, one at a time (LVM's sliding window of 15 images):

    room 6, prompt a b c, five new ones           prefix (shared)     suffix (each candidate's own)
      round 1   draws 1 2 3                       a b c               1 2 3
      round 2   draws 4                           b c                 1 2 3 4
      round 3   draws 5                           c                   1 2 3 4 5

So images of the prompt that are still in the window are computed once for all candidates. Prompts
of several lengths are drawn in the same rounds, each with its own window.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lvm.config import Reads
from lvm.decoding.decoder import Decoder
from lvm.decoding.sampling import Sampling, uniform
from lvm.model import Transformer


@dataclass(frozen=True, slots=True)
class Round:
    """Images first … first + count - 1 of the new ones, drawn after one reading of the window."""

    first: int
    count: int
    own: int  # new images in the window, those just before `first`
    kept: tuple[int, ...]  # images at the end of each prompt that are in the window

    def contexts(self, reads: Reads, prompts: Sequence[Tensor]) -> list[Tensor]:
        """Return the ids [t] that each prompt [k, n] begins this round with."""
        contexts = []
        for prompt, kept in zip(prompts, self.kept, strict=True):
            ids = prompt[len(prompt) - kept :].flatten()
            if reads.layout == "bos":
                ids = torch.cat([ids.new_full((1,), reads.vocab.bos), ids])
            contexts.append(ids)
        return contexts


def rounds(lengths: Sequence[int], *, new: int, room: int) -> Iterator[Round]:
    """Yield the rounds that draw `new` images after prompts of so many images, room in a row."""
    done = 0
    while done < new:
        own = min(done, room - 1)
        kept = tuple(min(length, room - 1 - own) for length in lengths)
        count = min(new - done, room - own - max(kept))
        yield Round(done, count, own, kept)
        done += count


class Work:
    """A draw in progress: B prompts [k_b, n] on the model's device, C candidates, R = B·C rows."""

    def __init__(
        self,
        model: Transformer,
        reads: Reads,
        prompts: Sequence[Tensor],
        sampling: Sampling,
        given: Tensor | None = None,
    ) -> None:
        """`given` int64 [m] are the first codes of the first new image."""
        self.model, self.reads, self.sampling, self.given = model, reads, sampling, given
        self.batch = len(prompts)
        self.prompts = list(prompts)
        if sampling.guidance != 1:
            self.prompts += [prompt[max(0, len(prompt) - sampling.bare) :] for prompt in prompts]
        self.plan = list(
            rounds([len(p) for p in self.prompts], new=sampling.new, room=reads.images_per_row)
        )
        n, candidates = reads.codes_per_image, sampling.candidates
        bos = reads.layout == "bos"
        noise = uniform(candidates, sampling.new * n, sampling.seed)
        with torch.inference_mode():
            self.decoder = Decoder(
                model,
                contexts=len(self.prompts),
                candidates=candidates,
                places=(
                    bos + n * max(self.plan[0].kept) + (0 if given is None else len(given)),
                    n * max(r.own + r.count for r in self.plan) - 1,
                ),
                u=noise.to(model.head.weight.device).repeat(self.batch, 1),
                sampling=sampling,
            )

    @torch.inference_mode()
    def rows(self) -> Iterator[tuple[int, int]]:
        """Draw; yield (frame, m) whenever m codes of a new image end a raster row of it."""
        n, decoder, given = self.reads.codes_per_image, self.decoder, self.given
        side = math.isqrt(n) if math.isqrt(n) ** 2 == n else n
        for part in self.plan:
            contexts, column = part.contexts(self.reads, self.prompts), part.first * n
            if given is not None and part.first == 0:
                contexts = [torch.cat([ids, given]) for ids in contexts]
                decoder.codes[:, : len(given)] = given
                column = len(given)
            own = decoder.codes[:, (part.first - part.own) * n : part.first * n]
            own = own.repeat(len(self.prompts) // self.batch, 1)
            end = (part.first + part.count) * n
            for done in range(column + 1, end + 1):
                if done == column + 1:
                    decoder.begin(contexts, own, column)
                else:
                    decoder.advance()
                if done % n % side == 0:
                    yield (done - 1) // n, (done - 1) % n + 1

    @property
    def codes(self) -> Tensor:
        """The codes int64 [B, C, new, n] so far; a view of what is being written."""
        return self._by_image(self.decoder.codes)

    @property
    def log_likelihood(self) -> Tensor:
        """The log-likelihoods fp32 [B, C, new] so far."""
        return self._by_image(self.decoder.scores).sum(-1)

    def _by_image(self, x: Tensor) -> Tensor:
        return x.view(self.batch, self.sampling.candidates, -1, self.reads.codes_per_image)


@torch.inference_mode()
def log_likelihood(
    model: Transformer, reads: Reads, prompts: Sequence[Tensor], codes: Tensor
) -> Tensor:
    """Return fp32 [B, C, new] of codes [B, C, new, n] after B prompts, in the windows of a draw."""
    batch, candidates, new, n = codes.shape
    rows = codes.reshape(batch * candidates, new * n).to(model.head.weight.device)
    sampling = Sampling(new=new, candidates=candidates)
    work = Work(model, reads, prompts, sampling)
    out = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    for part in work.plan:
        first, end = part.first * n, (part.first + part.count) * n
        before = work.decoder.prefill(part.contexts(reads, prompts))
        before = before.repeat_interleave(candidates, 0)[:, None]
        for index, found in work.decoder.extend(rows[:, first - part.own * n : end - 1]):
            features = torch.cat([before[index], found], 1)[:, part.own * n :]
            for row, each in zip(index.tolist(), features, strict=True):  # one row's logits at once
                logp = model.head(each).float().log_softmax(-1)
                out[row, first:end] = logp.gather(-1, rows[row, first:end, None])[:, 0]
    return out.view(codes.shape).sum(-1)
