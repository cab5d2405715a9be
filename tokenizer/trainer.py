"""One training step of a VQ-GAN after another, and the state that a checkpoint holds.

A run has two phases. For the first part (`plain`) it is an ordinary autoencoder; then the codes
start at a k-means of its latents and the decoder sees codes only. Quantising the latents of an
untrained encoder tends to leave most codes out of use for good. Learning rate and phases follow
the fraction of the run that is done, by steps or by time, whichever is further.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizer.codebook import CodebookStats
from tokenizer.files import atomic_write
from tokenizer.losses import reconstruction
from tokenizer.optim import MuonAdamW
from tokenizer.presets import Recipe
from tokenizer.vqgan import VQGAN

POINTS_PER_CODE = 32  # latents that the k-means start looks at, for each code


class Trainer:
    """The model, what moves it, and how far it is; everything that a checkpoint holds."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.device = recipe, device
        self.model = VQGAN(recipe.model).to(device).train()
        codes = self.model.quantize.embedding.weight
        codes.requires_grad_(recipe.codes == "gradient")
        self.stats = CodebookStats(self.model.quantize, decay=recipe.decay)
        self.optimizer = MuonAdamW(self.model, weight_decay=recipe.weight_decay)
        self.rate = 0.0
        self.step, self.elapsed, self.quantizing = 0, 0.0, False

    def fraction(self) -> float:
        """Return the part of the run that is done in the middle of the present step."""
        steps, seconds = self.recipe.steps, self.recipe.seconds
        return max(
            (self.step + 0.5) / steps if steps else 0.0, self.elapsed / seconds if seconds else 0.0
        )

    def scheduled(self, fraction: float) -> float:
        """Return the learning rate: up in a line, down in a cosine."""
        rise = min(1.0, fraction / max(self.recipe.warm_up, 1e-9))
        return self.recipe.lr * rise * 0.5 * (1.0 + math.cos(math.pi * min(1.0, fraction)))

    def generator(self) -> torch.Generator:
        """Return draws that depend on seed and step alone, so that a resumed run repeats them."""
        return torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)

    def start_codes(self, batches: Iterator[Tensor]) -> None:
        """Begin to quantise, with codes at the k-means of the latents of the next images."""
        self.model.eval()
        points: list[Tensor] = []
        per_batch = 0
        while sum(map(len, points)) < POINTS_PER_CODE * self.model.codebook_size:
            with torch.no_grad():
                latents = self.model.latents(self._floats(next(batches)))
            points.append(latents.movedim(1, -1).flatten(0, 2).float())
            per_batch = len(points[-1])
        self.model.train()
        self.stats.start(torch.cat(points), batch=per_batch, generator=self.generator())
        self.quantizing = True

    def learn(self, pixels: Tensor, fraction: float) -> dict[str, Tensor]:
        """Take one step on uint8 images [B, 3, H, W]; returns the parts of the loss, and codes."""
        recipe, codebook = self.recipe, self.model.quantize
        torch.manual_seed(recipe.seed * 1_000_003 + self.step)  # of dropout
        images = self._floats(pixels)
        bf16 = recipe.precision == "bf16"
        parts: dict[str, Tensor] = {}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            latents = codebook.scaled(self.model.latents(images).movedim(1, -1))  # [B, h, w, D]
            seen = latents
            if self.quantizing:
                points = latents.detach().flatten(0, 2)
                codes = codebook.search(latents.detach().movedim(-1, 1))
                chosen = codebook.lookup(codes).view_as(latents)
                parts["commit"] = F.mse_loss(latents, chosen.detach())
                if recipe.codes == "gradient":
                    parts["codes"] = F.mse_loss(chosen, latents.detach())
                seen = latents + (chosen - latents).detach()  # straight-through gradient
            restored = self.model.pixels(seen.movedim(-1, 1))
        parts["reconstruction"] = reconstruction(
            restored, images, l1=recipe.l1, l2=recipe.l2, edge=recipe.edge
        )
        weights = {"commit": recipe.model.commitment}
        loss = torch.stack([weights.get(k, 1.0) * v for k, v in parts.items()]).sum()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.rate = self.scheduled(fraction)
        self.optimizer.step(self.rate)
        self.step += 1
        if self.quantizing:
            self._care(points, codes.flatten(), fraction)
            parts["chosen"] = codes
        error = F.mse_loss(restored.detach().clamp(0, 1), images)
        return {k: v.detach() for k, v in parts.items()} | {"loss": loss.detach(), "mse": error}

    def _care(self, points: Tensor, codes: Tensor, fraction: float) -> None:
        self.stats.observe(points, codes)
        if self.recipe.codes == "ema":
            self.stats.move()
        if self.step % self.recipe.restart_every == 0 and fraction < self.recipe.restart_until:
            self.stats.restart(points, generator=self.generator())

    def _floats(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.device, non_blocking=True).float() / 255

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state(),
            "stats": self.stats.state(),
            "step": self.step,
            "elapsed": self.elapsed,
            "quantizing": self.quantizing,
        }
        with atomic_write(path) as file:
            torch.save(state, file)

    def restore(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.restore(state["optimizer"])
        self.stats.restore(state["stats"])
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.quantizing = state["quantizing"]
