"""Next code: cross-entropy over the whole table at every position that has a label (LVM)."""

import torch.nn.functional as F
from torch import Tensor

from kernels.cross_entropy import linear_cross_entropy
from lvm.objectives import Sums
from visual_sentences.batch import IGNORE


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log p(label), fp32 [B, T], 0 where the label is IGNORE; logits [B, T, V]."""
    flat = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return flat.view_as(labels)


def next_code(features: Tensor, weight: Tensor, labels: Tensor, *, z_loss: float = 0.0) -> Sums:
    """Sum cross-entropy of the head weight [V, D] on features [B, T, D] and labels [B, T].

    Positions of IGNORE count nothing. `z_loss` adds z_loss · log²Z of the softmax normaliser at
    each position that counts. Logits [B, T, V] never exist at once: see kernels.cross_entropy.
    """
    found = linear_cross_entropy(
        features.flatten(0, 1), weight, labels.flatten(), ignore=IGNORE, z_loss=z_loss
    )
    return Sums(loss=found.loss, count=found.count, nll=found.nll, correct=found.correct)
