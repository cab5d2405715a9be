"""Compare our attention with SDPA in training: python -m lvm.bench [--device cuda].

The same small model from the same weights on the same rows, once with each. The curves of the loss
should differ by rounding only, which grows from update to update; packed rows of four documents,
bf16, on a GPU the shape of lvm_100m and 200 updates. On a CPU, which has one backend with a
backward pass, SDPA runs twice and the curves are equal. Sampling is timed by `lvm.bench_generate`.
"""

import statistics
import time
from dataclasses import replace

import torch
from torch import Tensor

from kernels.attention import Backend, resolve
from kernels.cross_entropy import linear_cross_entropy
from kernels.mask import Mask
from kernels.timing import options, report
from lvm.config import ModelConfig
from lvm.model import build
from lvm.optim import clip
from lvm.recipes import recipe
from visual_sentences.batch import IGNORE

ALPHABET = 256  # codes that the rows of training use
DOCUMENTS = 4  # of a row
LAST = 20  # updates whose mean is the loss at the end


def progressions(rows: int, length: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Return ids and labels [B, T] of documents that count up by a stride of their own.

    One code in ten is drawn at random, so that the loss has a floor and the stride must be read
    from the document: a few hundred updates learn it.
    """
    drawn = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=drawn)

    place = torch.arange(length // DOCUMENTS)
    strides, starts = draw(1, 9, rows, DOCUMENTS, 1), draw(0, ALPHABET, rows, DOCUMENTS, 1)
    codes = (starts + strides * place) % ALPHABET
    noise = draw(0, 10, *codes.shape) == 0
    codes = torch.where(noise, draw(0, ALPHABET, *codes.shape), codes)
    labels = torch.cat([codes[:, :, 1:], torch.full_like(codes[:, :, :1], IGNORE)], 2)
    return codes.flatten(1), labels.flatten(1)


def curve(
    config: ModelConfig, backend: Backend, *, device: str, rows: int, length: int, steps: int
) -> tuple[list[float], float]:
    """Train and return the loss of every update and the tokens a second of the later ones."""
    model = build(config, seed=0).to(device)
    parameters = list(model.parameters())
    fused = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), fused=True)
    index = torch.arange(length, device=device, dtype=torch.int32).expand(rows, length)
    document = length // DOCUMENTS
    mask = Mask.interval(
        (index // document * document).contiguous(), index + 1, exact=document % 128 == 0
    )
    mask = resolve(mask, queries=length, keys=length, device=torch.device(device), backend=backend)
    warm, losses, began = steps // 10, [], 0.0
    for step in range(steps):
        if step == warm:
            synchronise(device)
            began = time.perf_counter()
        ids, labels = (x.to(device) for x in progressions(rows, length, seed=step))
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            features = model.features(ids, pos=index % document, mask=mask)
            sums = linear_cross_entropy(
                features.flatten(0, 1), model.head.weight, labels.flatten(), ignore=IGNORE
            )
        loss = sums.loss / sums.count
        loss.backward()
        clip(parameters, 1.0)
        for group in fused.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / max(1, warm))
        fused.step()
        fused.zero_grad()
        losses.append(loss.detach())
    synchronise(device)
    speed = rows * length * (steps - warm) / (time.perf_counter() - began)
    return torch.stack(losses).tolist(), speed


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def training_table(device: str) -> list[dict[str, object]]:
    """Train with each backend; a row each, then how far the curves lie apart."""
    if device == "cuda":
        config = replace(recipe("lvm_100m").model, vocab_size=8320)
        rows, length, steps = 4, 4096, 200
        backends: list[Backend] = ["triton", "sdpa"]
    else:
        config = replace(recipe("tiny").model, vocab_size=384)
        rows, length, steps = 2, 256, 30
        backends = ["sdpa", "sdpa"]
    table: list[dict[str, object]] = []
    curves = []
    for backend in backends:
        losses, speed = curve(config, backend, device=device, rows=rows, length=length, steps=steps)
        curves.append(losses)
        table.append(
            {
                "attention": backend,
                "updates": steps,
                "tokens an update": rows * length,
                "first loss": round(losses[0], 4),
                "last loss": round(statistics.mean(losses[-LAST:]), 4),
                "tokens/s": round(speed),
            }
        )
    ours, theirs = curves
    apart = [abs(a - b) / b for a, b in zip(ours, theirs, strict=True)]
    ends = [statistics.mean(losses[-LAST:]) for losses in curves]
    table.append(
        {
            "largest relative difference": f"{max(apart):.2e}",
            "at update": apart.index(max(apart)),
            "in the first ten": f"{max(apart[:10]):.2e}",
            "of the last loss": f"{abs(ends[0] - ends[1]) / ends[1]:.2e}",
        }
    )
    return table


def main() -> None:
    found = options("python -m lvm.bench", __doc__)
    report("training", found.device, training_table(found.device))


if __name__ == "__main__":
    main()
