"""Distillation: a teacher's distribution of the next code beside the code itself (DeLVM).

    loss = code_weight · CE(code) + weight · T² · KL(teacher ‖ student)      at temperature T

(Hinton et al. 2015; Guo et al. 2024, "Data-efficient Large Vision Models through Sequential
Autoregression"); `reverse` takes KL(student ‖ teacher). Only positions that have a label count,
where DeLVM's code sums the divergence over all, padding and ends of sentences too. N positions, V
columns of the table, K of them kept by a stored teacher.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.cross_entropy import linear_cross_entropy
from lvm.config import Distil
from lvm.objectives import Sums
from visual_sentences.batch import IGNORE


@dataclass(frozen=True, slots=True)
class Soft:
    """A teacher's logits: of all its columns [..., V], or the K largest [..., K] and their ids."""

    values: Tensor
    ids: Tensor | None = None

    def probabilities(self, columns: int, temperature: float) -> Tensor:
        """Return fp32 [N, columns]: softmax of logits / temperature over the columns that there
        are, 0 in all others.

        Of K stored logits the softmax is over these: what the teacher gave all others is spread
        over the K in proportion.
        """
        values = self.values.flatten(0, -2)
        if self.ids is None:
            p = values[:, :columns].float().div(temperature).softmax(-1)
            return torch.nn.functional.pad(p, (0, columns - p.shape[1]))
        p = values.float().div(temperature).softmax(-1)
        table = torch.zeros(len(p), columns, device=p.device)
        return table.scatter_(1, self.ids.flatten(0, -2).long(), p)


def distilled_code(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    soft: Soft,
    *,
    distil: Distil,
    z_loss: float = 0.0,
) -> Sums:
    """Sum the loss above of the head weight [V, D] on features [B, T, D] and labels [B, T].

    `nll` of the result is the student's own, on the codes. The teacher's table [N, V] is held in
    fp32: 4·V bytes a position of the micro-batch.
    """
    x, wanted = features.flatten(0, 1), labels.flatten()
    target = soft.probabilities(len(weight), distil.temperature)
    scale = distil.weight * distil.temperature**2
    rest: dict[str, Any] = {
        "ignore": IGNORE, "z_loss": z_loss, "hard_weight": distil.code_weight
    }  # fmt: skip
    if distil.reverse:
        found = linear_cross_entropy(x, weight, wanted, **rest)
        divergence = checkpoint(
            _reverse, x, weight, target, wanted, distil.temperature, use_reentrant=False
        )
        loss = found.loss + scale * divergence
    else:
        found = linear_cross_entropy(
            x, weight, wanted, soft=target, soft_weight=scale,
            temperature=distil.temperature, **rest,
        )  # fmt: skip
        # The teacher's entropy has no gradient; it makes the cross-entropy a divergence.
        entropy = -(torch.xlogy(target, target).sum(-1) * (wanted != IGNORE)).sum()
        loss = found.loss - scale * entropy
    return Sums(loss=loss, count=found.count, nll=found.nll, correct=found.correct)


def _reverse(
    x: Tensor, weight: Tensor, target: Tensor, labels: Tensor, temperature: float
) -> Tensor:
    """Sum KL(student ‖ teacher) over positions with a label; recomputed in the backward pass.

    Columns that the teacher gives nothing are left out of the student's softmax: they would cost
    without bound.
    """
    logits = (x @ weight.T).float() / temperature
    log_q = logits.masked_fill(target == 0, -torch.inf).log_softmax(-1)
    q = log_q.exp()
    each = torch.where(q > 0, q * (log_q - target.clamp_min(1e-38).log()), 0.0).sum(-1)
    return (each * (labels != IGNORE)).sum()
