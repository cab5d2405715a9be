"""What a reconstruction is trained on, one term a function; images [B, C, H, W] in [0, 1]."""

from torch import Tensor
from torch.nn import functional as F


def edge_l1(images: Tensor, targets: Tensor) -> Tensor:
    """Return the mean absolute error of differences between neighbouring pixels.

    Plain L1 and L2 are content with a blur; this term asks for the edges to be where they were.
    """
    return sum(F.l1_loss(images.diff(dim=d), targets.diff(dim=d)) for d in (2, 3)) / 2  # type: ignore[return-value]


def reconstruction(images: Tensor, targets: Tensor, *, l1: float, l2: float, edge: float) -> Tensor:
    """Return the weighted sum of L1, L2 and edge terms."""
    loss = l1 * F.l1_loss(images, targets) + l2 * F.mse_loss(images, targets)
    return loss + edge * edge_l1(images, targets)
