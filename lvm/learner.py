"""What an update computes: a model with its term, the gradient of a batch; the check for leaks."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kernels.attention import Backend
from kernels.mask import densify, is_exact
from lvm import parallel
from lvm.codebook import read_codebook
from lvm.config import Distil, Run
from lvm.mask import attention_mask, leaks
from lvm.metrics import means
from lvm.model import CodebookEmbedding, Transformer
from lvm.objectives import Sums
from lvm.objectives.distil import distilled_code
from lvm.objectives.next_code import next_code
from lvm.patch_learner import PatchLearner
from lvm.teacher import Guide
from tokenizer.cli import CommandError
from tokenizer.world import World
from visual_sentences.batch import IGNORE, Batch
from visual_sentences.image_loader import Images


class Learner(nn.Module):
    """The trunk and its term as one module, so that FSDP gathers the head within its forward."""

    def __init__(
        self, model: Transformer, *, z_loss: float = 0.0, attention: Backend = "auto"
    ) -> None:
        super().__init__()
        self.model, self.z_loss, self.attention = model, z_loss, attention
        self.guide: Guide | None = None  # a teacher; no part of the module: it is not trained
        self.distil = Distil()
        self.codebook = ""  # folder of the tokenizer that a fresh run takes its embedding from

    @property
    def blocks(self) -> list[nn.Module]:
        """The units of sharding, recomputation and compilation, in the order they run."""
        return list(self.model.layers)

    def draw_weights(self, seed: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield each parameter and its first values on the CPU: see `lvm.init`."""
        yield from self.model.draw_weights(seed)
        if self.codebook and isinstance(embed := self.model.embed, CodebookEmbedding):
            yield embed.codebook, read_codebook(self.codebook).vectors

    def flops_per_token(self, row_len: int, *, causal: bool = True) -> float:
        return self.model.config.flops_per_token(row_len, causal=causal)

    @staticmethod
    def measures(nll: float, correct: float, count: float) -> dict[str, float]:
        """Return nll, perplexity and accuracy of sums over `count` predicted codes."""
        return means(nll, correct, count)

    def forward(self, batch: Batch, kind: Tensor | None = None, kinds: int = 0) -> Sums:
        """Return the sums of a batch; given the `kind` [B] of each row, tensors [kinds] by kind."""
        mask = attention_mask(
            batch.doc, batch.block, batch.island, exact=batch.exact, backend=self.attention
        )
        features = self.model.features(batch.ids, pos=batch.pos, mask=mask)
        weight, labels = self.model.head.weight, batch.labels
        if kind is None and self.guide is not None:
            soft = self.guide.soft(batch, mask)
            return distilled_code(
                features, weight, labels, soft, distil=self.distil, z_loss=self.z_loss
            )
        if kind is None:
            return next_code(features, weight, labels, z_loss=self.z_loss)
        parts = [next_code(features[kind == k], weight, labels[kind == k]) for k in range(kinds)]
        return Sums.stack(parts)


def make_learner(run: Run) -> "Learner | PatchLearner":
    """Return the model of a run with its term, on the meta device."""
    with torch.device("meta"):
        if run.patches is not None:
            return PatchLearner(run.model, run.patches, attention=run.attention)
        learner = Learner(Transformer(run.model), z_loss=run.z_loss, attention=run.attention)
        learner.codebook = run.codebook
        return learner


def backward(learner: nn.Module, batch: Batch | Images, *, run: Run, world: World) -> Tensor:
    """Add the gradient of the global mean loss; returns this rank's [loss, nll, correct, count].

    Every micro-batch's sum is divided by the number of labels in the whole batch, on all ranks:
    that, rather than a mean of means, makes accumulation, ranks and packing change no number. FSDP
    averages gradients over ranks, which the factor `world.size` undoes.
    """
    scale = world.size / world.total(batch.predicted)
    totals = torch.zeros(4, device=world.device)
    micros = batch.split(run.micro_rows)
    for i, micro in enumerate(micros):
        parallel.reduce_gradients(learner, i == len(micros) - 1)
        with parallel.compute(world, precision=run.precision):
            sums = learner(micro)
        (sums.loss * scale).backward()
        totals += torch.stack([sums.loss.detach(), sums.nll, sums.correct, sums.count])
    return totals


def refuse_leaks(batch: Batch) -> None:
    """Raise CommandError if the mask lets a position read the input that is its own label."""
    for row in batch.split(1):
        mask = attention_mask(row.doc, row.block, row.island, backend="sdpa")
        reads = densify(mask, row.ids.shape[1])
        assert reads is not None, "a packed batch has an interval mask"
        if row.exact and mask.lo is not None and mask.hi is not None:
            assert bool(is_exact(mask.lo, mask.hi)), "documents start at multiples of 128"
        if found := int(leaks(reads, row.ids, row.labels, row.doc, ignore=IGNORE)):
            raise CommandError(
                f"{found} positions of the first batch may read their own label; a model trained "
                "like this learns to copy. This is a defect of the recipe's layout or mask"
            )
