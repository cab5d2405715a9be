"""What an update computes: a model with its term, the gradient of a batch; the check for leaks."""

import torch
from torch import Tensor, nn

from kernels.attention import Backend
from kernels.mask import densify, is_exact
from lvm import parallel
from lvm.config import Run
from lvm.mask import attention_mask, leaks
from lvm.model import Transformer
from lvm.objectives import Sums
from lvm.objectives.next_code import next_code
from tokenizer.cli import CommandError
from tokenizer.world import World
from visual_sentences.batch import IGNORE, Batch


class Learner(nn.Module):
    """The trunk and its term as one module, so that FSDP gathers the head within its forward."""

    def __init__(
        self, model: Transformer, *, z_loss: float = 0.0, attention: Backend = "auto"
    ) -> None:
        super().__init__()
        self.model, self.z_loss, self.attention = model, z_loss, attention

    def forward(self, batch: Batch, kind: Tensor | None = None, kinds: int = 0) -> Sums:
        """Return the sums of a batch; given the `kind` [B] of each row, tensors [kinds] by kind."""
        mask = attention_mask(
            batch.doc, batch.block, batch.island, exact=batch.exact, backend=self.attention
        )
        features = self.model.features(batch.ids, pos=batch.pos, mask=mask)
        weight, labels = self.model.head.weight, batch.labels
        if kind is None:
            return next_code(features, weight, labels, z_loss=self.z_loss)
        parts = [next_code(features[kind == k], weight, labels[kind == k]) for k in range(kinds)]
        return Sums(
            loss=torch.stack([part.loss for part in parts]),
            count=torch.stack([part.count for part in parts]),
            nll=torch.stack([part.nll for part in parts]),
            correct=torch.stack([part.correct for part in parts]),
        )


def backward(learner: nn.Module, batch: Batch, *, run: Run, world: World) -> Tensor:
    """Add the gradient of the global mean loss; returns this rank's [loss, nll, correct, count].

    Every micro-batch's sum is divided by the number of labels in the whole batch, on all ranks:
    that, rather than a mean of means, makes accumulation, ranks and packing change no number. FSDP
    averages gradients over ranks, which the factor `world.size` undoes.
    """
    scale = world.size / world.total((batch.labels != IGNORE).sum())
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
