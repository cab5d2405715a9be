"""One training step of a VQ-GAN after another, and the state that a checkpoint holds.

A run has phases. For the first part (`plain`) it is an ordinary autoencoder; then the codes start
at a k-means of its latents and the decoder sees codes only. Quantising the latents of an untrained
encoder tends to leave most codes out of use for good. Later a discriminator may join. Learning rate
and phases follow the fraction of the run that is done, by steps or by time, whichever is further.

Each rank takes its slice of every batch. Whatever is computed from a batch, gradients, averages and
restarts, is computed from all slices, so ranks change results by rounding alone.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tokenizer import losses
from tokenizer.codebook import CodebookStats
from tokenizer.discriminator import Adversary
from tokenizer.files import atomic_write
from tokenizer.optim import MuonAdamW
from tokenizer.perceptual import load_perceptual
from tokenizer.presets import Recipe
from tokenizer.vqgan import VQGAN
from tokenizer.world import World

POINTS_PER_CODE = 32  # latents that the k-means start looks at, for each code
RISE = 0.05  # part of the run in which the adversarial term comes to its weight
ENTROPY_ENTRIES = 1 << 24  # of the table latents × codes that the entropy term may write


class Trainer:
    """The model, what moves it, and how far it is; everything that a checkpoint holds."""

    def __init__(self, recipe: Recipe, world: World) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.world = recipe, world
        self.model = VQGAN(recipe.model).to(world.device).train()
        codes = self.model.quantize.embedding.weight
        codes.requires_grad_(recipe.codes == "gradient")
        self.stats = CodebookStats(self.model.quantize, decay=recipe.decay)
        self.optimizer = MuonAdamW(
            self.model, muon=recipe.optimizer == "muon", weight_decay=recipe.weight_decay
        )
        self.perceptual = None
        if recipe.perceptual != "none":
            # In bf16 its distances stay within 1 %, at half the time on a CPU.
            kind = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
            found = load_perceptual(recipe.perceptual, recipe.lpips_heads)
            self.perceptual = found.to(world.device, kind)
        self.adversary: Adversary | None = None
        if recipe.adversarial:
            self.adversary = Adversary(
                world,
                image_size=recipe.model.image_size,
                in_channels=recipe.model.in_channels,
                layers=recipe.patch_layers,
                lr=recipe.judge_lr,
                lecam=recipe.lecam,
            )
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
            points.append(self.world.gather(latents.movedim(1, -1).flatten(0, 2).float()))
            per_batch = len(points[-1])
        self.model.train()
        self.stats.start(torch.cat(points), batch=per_batch, generator=self.generator())
        self.quantizing = True

    def learn(self, pixels: Tensor, fraction: float) -> dict[str, Tensor]:
        """Take one step on this rank's uint8 images [B, 3, H, W].

        Returns the parts of the loss, the mean squared error, and as `chosen` the codes.
        """
        recipe, codebook = self.recipe, self.model.quantize
        torch.manual_seed((recipe.seed * 1_000_003 + self.step) * 4099 + self.world.rank)  # dropout
        images = self._floats(pixels)
        bf16 = recipe.precision == "bf16"
        parts: dict[str, Tensor] = {}
        extra = []  # terms that do not go through the restored images
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=bf16):
            latents = codebook.scaled(self.model.latents(images).movedim(1, -1))  # [B, h, w, D]
            seen = latents
            if self.quantizing:
                points = latents.detach().flatten(0, 2)
                codes = codebook.search(latents.detach().movedim(-1, 1))
                chosen = codebook.lookup(codes).view_as(latents)
                parts["vq"] = self._vq(latents, chosen)
                extra.append(parts["vq"])
                if recipe.entropy:
                    parts["entropy"] = self._entropy(latents.flatten(0, 2))
                    extra.append(recipe.entropy * parts["entropy"])
                seen = latents + (chosen - latents).detach()  # straight-through gradient
            restored = self.model.pixels(seen.movedim(-1, 1))
        pull = self._compare(restored, images, parts, fraction=fraction)
        self.optimizer.zero_grad()
        torch.autograd.backward([*extra, restored], [None] * len(extra) + [pull])
        self.world.average([p.grad for p in self.model.parameters() if p.grad is not None])
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.rate = self.scheduled(fraction)
        self.optimizer.step(self.rate)
        if self.adversary and fraction >= recipe.adversarial_from:
            parts |= self.adversary.learn(images, restored.detach(), bf16=bf16)
        self.step += 1
        if self.quantizing:
            self._care(points, codes.flatten(), fraction)
            parts["chosen"] = codes
        parts["mse"] = (restored.detach().clamp(0, 1) - images).square().mean()
        return {k: v.detach() for k, v in parts.items()}

    def _vq(self, latents: Tensor, chosen: Tensor) -> Tensor:
        beta = self.recipe.model.commitment
        if self.recipe.codes == "ema":
            return beta * losses.commitment(latents, chosen)
        return losses.vq_loss(latents, chosen, beta=beta, legacy=self.recipe.legacy_beta)

    def _entropy(self, points: Tensor) -> Tensor:
        codebook = self.model.quantize
        every = -(-len(points) * codebook.embedding.num_embeddings // ENTROPY_ENTRIES)
        return losses.entropy(
            points[::every], codebook.vectors(), temperature=0.01, world=self.world
        )

    def _compare(
        self, restored: Tensor, images: Tensor, parts: dict[str, Tensor], *, fraction: float
    ) -> Tensor:
        """Add what the restored images are judged by to `parts`; return the gradient on them.

        Each network that judges is run backward once, down to the images. The adaptive weight then
        costs the last layer alone, and the decoder is run backward once for all.
        """
        recipe = self.recipe
        base = losses.reconstruction(restored, images, l1=recipe.l1, l2=recipe.l2, edge=recipe.edge)
        parts["reconstruction"] = base
        if self.perceptual is not None:
            parts["perceptual"] = self.perceptual(restored, images).mean()
            base = base + recipe.perceptual_weight * parts["perceptual"]
        (pull,) = torch.autograd.grad(base, restored)
        total = base
        if self.adversary and fraction >= recipe.adversarial_from:
            with torch.autocast(
                self.world.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"
            ):
                parts["deceive"] = self.adversary.deceive(restored)
            (lure,) = torch.autograd.grad(parts["deceive"], restored)
            weight = recipe.adversarial * min(1.0, (fraction - recipe.adversarial_from) / RISE)
            if recipe.adaptive:
                parts["adaptive"] = self._adaptive(restored, pull, lure)
                lure = parts["adaptive"] * lure
            pull = pull + weight * lure
            total = total + weight * parts.get("adaptive", 1.0) * parts["deceive"]
        parts["loss"] = total + parts.get("vq", 0.0) + recipe.entropy * parts.get("entropy", 0.0)
        return pull

    def _adaptive(self, restored: Tensor, pull: Tensor, lure: Tensor) -> Tensor:
        last = self.model.decoder.conv_out.weight
        at_last = [
            torch.autograd.grad(restored, last, gradient, retain_graph=True)[0]
            for gradient in (pull, lure)
        ]
        self.world.average(at_last)
        return losses.adaptive_weight(*at_last)

    def _care(self, points: Tensor, codes: Tensor, fraction: float) -> None:
        self.stats.observe(points, codes, self.world)
        if self.recipe.codes == "ema":
            self.stats.move()
        if self.step % self.recipe.restart_every == 0 and fraction < self.recipe.restart_until:
            self.stats.restart(self.world.gather(points), generator=self.generator())

    def _floats(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.world.device, non_blocking=True).float() / 255

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state(),
            "stats": self.stats.state(),
            "adversary": self.adversary.state() if self.adversary else None,
            "step": self.step,
            "elapsed": self.elapsed,
            "quantizing": self.quantizing,
        }
        with atomic_write(path) as file:
            torch.save(state, file)

    def restore(self, path: Path) -> None:
        state = torch.load(path, map_location=self.world.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.restore(state["optimizer"])
        self.stats.restore(state["stats"])
        if self.adversary:
            self.adversary.restore(state["adversary"])
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.quantizing = state["quantizing"]
