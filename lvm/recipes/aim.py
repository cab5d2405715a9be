"""AIM (El-Nouby et al. 2024, "Scalable Pre-training of Large Autoregressive Image Models").

Shapes, patches and head as published (table 1, section 3) and as in Apple's ml-aim and ml-l3m; the
optimiser is that of the paper: AdamW 1e-3, betas 0.9 and 0.95, decay 0.05, clip 1.0, bf16. Its
batch is 4096 images. None of these was run at scale here: expected are the paper's figures, an
attentive probe of ImageNet-1k at 78.5, 80.6, 82.2 and 82.4 % from the last blocks, after 2 (600M)
and 5 billion images of DFN-2B+, which nobody hosts.
"""

from lvm.config import ModelConfig, Optim, Patches, Run

BATCH = 4096


def _aim(recipe: str, *, width: int, layers: int, heads: int, steps: int) -> Run:
    return Run(
        recipe=recipe,
        model=_trunk(width=width, layers=layers, heads=heads),
        optim=Optim(lr=1e-3, weight_decay=0.05, final=0.0, warmup=31_250),
        patches=Patches(jitter=(0.0, 0.0, 0.0, 0.0)),
        steps=steps,
        batch_rows=BATCH,
        micro_rows=64,
        recompute="full",
        workers=6,
        save_every=2500,
    )


def _trunk(*, width: int, layers: int, heads: int) -> ModelConfig:
    return ModelConfig(
        width=width,
        ffn=4 * width,
        layers=layers,
        heads=heads,
        rotary=False,
        norm="layer",
        norm_eps=1e-6,
        mlp="gelu",
        init="xavier",
    )


def aim_600m() -> Run:
    """680 M: 24 x 1536, 12 heads; 500,000 updates, 2 billion images. The head adds 60 % to the
    trunk's FLOPs."""
    return _aim("aim_600m", width=1536, layers=24, heads=12, steps=500_000)


def aim_1b() -> Run:
    """1.21 B: 24 x 2048, 16 heads; 1.2 million updates, 5 billion images. Head: 34 %."""
    return _aim("aim_1b", width=2048, layers=24, heads=16, steps=1_200_000)


def aim_3b() -> Run:
    """2.72 B: 24 x 3072, 24 heads; 1.2 million updates. Head: 15 %."""
    return _aim("aim_3b", width=3072, layers=24, heads=24, steps=1_200_000)


def aim_7b() -> Run:
    """6.44 B: 32 x 4096, 32 heads; 1.2 million updates. Head: 6 %."""
    return _aim("aim_7b", width=4096, layers=32, heads=32, steps=1_200_000)


def aim_b() -> Run:
    """85 M: 12 x 768, a head 512 wide, ImageNet-1k for 800 passes of 1.28 million images.

    Others report 67.4 % (linear) and 73.5 % (attentive) for a run of this size and length (Amrani
    et al. 2024, their baseline). Not run here.
    """
    return Run(
        recipe="aim_b",
        model=_trunk(width=768, layers=12, heads=12),
        optim=Optim(lr=1e-3, weight_decay=0.05, final=0.0, warmup=6250),
        patches=Patches(image_size=224, size=16, head_width=512),
        steps=250_000,
        batch_rows=BATCH,
        micro_rows=128,
        workers=6,
        save_every=2500,
    )


def aim_tiny() -> Run:
    """1.8 M and a head of 128: images of 32 pixels, patches of 4; minutes on a laptop."""
    return Run(
        recipe="aim_tiny",
        model=_trunk(width=192, layers=4, heads=3),
        optim=Optim(lr=1e-3, weight_decay=0.05, final=0.0, warmup=50),
        patches=Patches(image_size=32, size=4, head_width=128, head_depth=4),
        steps=1000,
        batch_rows=64,
        micro_rows=64,
        precision="fp32",
        save_every=500,
    )
