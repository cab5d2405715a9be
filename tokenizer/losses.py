"""What a VQ-GAN is trained on, one term a function.

Shapes: images [B, C, H, W] in [0, 1]; latents and chosen codes [..., D]; logits of the
discriminator, one a patch, of any shape. Every term is a mean over equally many values a rank, so
the mean over ranks is that of one process.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizer.world import World


def edge_l1(images: Tensor, targets: Tensor) -> Tensor:
    """Return the mean absolute error of differences between neighbouring pixels.

    Plain L1 and L2 are content with a blur; this term asks for the edges to be where they were.
    """
    return sum(F.l1_loss(images.diff(dim=d), targets.diff(dim=d)) for d in (2, 3)) / 2  # type: ignore[return-value]


def reconstruction(images: Tensor, targets: Tensor, *, l1: float, l2: float, edge: float) -> Tensor:
    """Return the weighted sum of L1, L2 and edge terms."""
    loss = l1 * F.l1_loss(images, targets) + l2 * F.mse_loss(images, targets)
    return loss + edge * edge_l1(images, targets)


def commitment(latents: Tensor, chosen: Tensor) -> Tensor:
    """Return mean (z - sg[e])²: latents are drawn to the codes they chose."""
    return F.mse_loss(latents, chosen.detach())


def vq_loss(latents: Tensor, chosen: Tensor, *, beta: float, legacy: bool = False) -> Tensor:
    """Return mean (sg[z] - e)² + β mean (z - sg[e])² (van den Oord et al. 2017, equation 3).

    `legacy` puts β on the first term, the one that moves the codes, as the first quantiser of
    taming-transformers did and openMUSE after it.
    """
    codes, commit = F.mse_loss(chosen, latents.detach()), commitment(latents, chosen)
    return commit + beta * codes if legacy else codes + beta * commit


def entropy(points: Tensor, codes: Tensor, *, temperature: float, world: World) -> Tensor:
    """Return E[H(p)] - H(E[p]) of p = softmax(-|z - e|² / τ) over codes (Yu et al. 2024).

    Low where every latent [N, D] is sure of its code [K, D] and all codes are used alike. Writes an
    N × K table several times over: give it a sample of the latents.
    """
    affinity = torch.cdist(points, codes).square().div(-temperature)
    log_p = affinity.log_softmax(-1)
    p = log_p.exp()
    local = p.mean(0)
    # The value over all ranks, the gradient of this one: the mean of gradients is then right.
    mean = local + (world.total(local.detach()) / world.size - local.detach())
    sure = -(p * log_p).sum(-1).mean()
    return sure + (mean * mean.clamp(min=1e-12).log()).sum()


def hinge_judge(real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's loss, ½ (mean max(0, 1 - real) + mean max(0, 1 + fake))."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def hinge_deceive(fake: Tensor) -> Tensor:
    """Return the generator's side of it, -mean fake (Lim and Ye 2017)."""
    return -fake.mean()


def lecam(real: Tensor, fake: Tensor, *, real_mean: Tensor, fake_mean: Tensor) -> Tensor:
    """Return the regulariser of Tseng et al. 2021 (LeCam, equation 4, one-sided as they ran it).

    Logits may not run away from the moving averages of those of the other kind.
    """
    away = F.relu(real - fake_mean).square().mean()
    return away + F.relu(real_mean - fake).square().mean()


def adaptive_weight(base: Tensor, adversarial: Tensor) -> Tensor:
    """Return λ = |∇ base| / (|∇ adversarial| + 1e-4), at most 1e4 (Esser et al. 2021, equation 7).

    Of the gradients of both losses with respect to the decoder's last weight: with it the
    adversarial term pulls as hard there as the reconstruction does.
    """
    return (base.norm() / (adversarial.norm() + 1e-4)).clamp(max=1e4).detach()
