"""Next code: cross-entropy over the whole table at every position that has a label (LVM)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lvm.objectives import Sums
from visual_sentences.batch import IGNORE


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log p(label), fp32 [B, T], 0 where the label is IGNORE; logits [B, T, V]."""
    flat = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return flat.view_as(labels)


def next_code(logits: Tensor, labels: Tensor, *, z_loss: float = 0.0) -> Sums:
    """Sum cross-entropy of logits [B, T, V] on labels [B, T]; positions of IGNORE count nothing.

    `z_loss` adds z_loss · log²Z of the softmax normaliser at each position that counts.
    """
    counts = labels != IGNORE
    nll = token_nll(logits, labels).sum()
    loss = nll
    if z_loss:
        loss = nll + z_loss * (logits.float().logsumexp(-1).square() * counts).sum()
    with torch.no_grad():
        correct = ((logits.argmax(-1) == labels) & counts).sum()
    return Sums(loss=loss, count=counts.sum(), nll=nll.detach(), correct=correct)
