"""The adversary: a PatchGAN that tells real patches from restored ones, and its side of training.

After Isola et al. 2017 and Esser et al. 2021, with GroupNorm where they have BatchNorm: no image is
then judged by the others of its batch, and ranks and batch sizes change no number.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.cli import InputError
from tokenizer.losses import hinge_deceive, hinge_judge, lecam
from tokenizer.world import World

GROUPS = 32
LECAM_DECAY = 0.999


class PatchGAN(nn.Module):
    """Images [B, C, H, W] in [-1, 1] to logits [B, 1, h, w], positive for real.

    Three layers see patches of 70 pixels, two 34, one 16. Layers are `main.N`, as in pix2pix.
    """

    def __init__(self, *, in_channels: int = 3, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [channels * min(2**n, 8) for n in range(layers + 1)]
        stack: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for n in range(1, layers + 1):
            stride = 2 if n < layers else 1
            stack += [
                nn.Conv2d(widths[n - 1], widths[n], 4, stride, 1, bias=False),
                nn.GroupNorm(GROUPS, widths[n]),
                nn.LeakyReLU(0.2),
            ]
        stack.append(nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.main = nn.Sequential(*stack)
        for module in stack:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images)


class Adversary:
    """A discriminator, its optimiser, and the moving averages of its logits."""

    def __init__(
        self,
        world: World,
        *,
        image_size: int,
        in_channels: int,
        layers: int,
        lr: float,
        lecam: float,
    ) -> None:
        if image_size // 2**layers < 3:
            raise InputError(
                f"--patch-layers {layers} on images of {image_size} pixels leaves no patch to "
                "judge; give fewer"
            )
        self.world, self.lecam, self.steps = world, lecam, 0
        self.net = PatchGAN(in_channels=in_channels, layers=layers).to(world.device)
        self.means = torch.zeros(2, device=world.device)  # of logits of real and restored patches
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=lr, betas=(0.5, 0.9), weight_decay=0.0, fused=True
        )

    def deceive(self, restored: Tensor) -> Tensor:
        """Return the generator's term for images in [0, 1]; no gradient reaches the judge."""
        self.net.requires_grad_(False)
        loss = hinge_deceive(self.net(restored * 2.0 - 1.0).float())
        self.net.requires_grad_(True)
        return loss

    def learn(self, images: Tensor, restored: Tensor, *, bf16: bool) -> dict[str, Tensor]:
        """Take one step on real and restored images in [0, 1]; returns what to log.

        `judged` is the share of patches that were judged rightly: at ½ the restored ones cannot be
        told from real ones, near 1 the judge has won and teaches nothing.
        """
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            both = self.net(torch.cat([images, restored]) * 2.0 - 1.0).float()
        real, fake = both.chunk(2)
        loss = hinge_judge(real, fake)
        parts = {"judge": loss.detach()}
        seen = self.world.total(torch.stack([real.detach().mean(), fake.detach().mean()]))
        share = max(1.0 / (self.steps + 1), 1.0 - LECAM_DECAY)  # a plain mean at first
        self.means.lerp_(seen / self.world.size, share)
        if self.lecam:
            penalty = lecam(real, fake, real_mean=self.means[0], fake_mean=self.means[1])
            loss = loss + self.lecam * penalty
            parts["lecam"] = penalty.detach()
        self.optimizer.zero_grad()
        loss.backward()
        self.world.average([p.grad for p in self.net.parameters() if p.grad is not None])
        self.optimizer.step()
        self.steps += 1
        parts["judged"] = (((real > 0).float().mean() + (fake < 0).float().mean()) / 2).detach()
        return parts

    def state(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "means": self.means,
            "steps": self.steps,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.means.copy_(state["means"])
        self.steps = state["steps"]
