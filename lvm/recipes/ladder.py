"""A ladder of sizes to fit a scaling law to: the same everything but width, depth and rate.

Each rung is trained at several lengths (`--steps`), and `python -m lvm.scaling` reads the final
losses. The schedule ends at 0 over the last fifth whatever the length, so that final losses of
different lengths compare (Hägele et al. 2024, "Scaling laws and compute-optimal training beyond
fixed training durations"); batch, warm-up and decay are those of every rung. Layers grow with the
width, and heads are of 32, 64 or 128 channels. The rungs above are lvm_300m and up, which have
another batch.

Expected results: not run as a whole. Rates fall with the root of the width from that of `tiny`,
and were not tuned by rung, so neither were the losses: a law of rungs is one of these rates.
"""

from lvm.config import ModelConfig, Optim, Run


def _rung(name: str, width: int, ffn: int, layers: int, heads: int) -> Run:
    lr = 3e-3 * (64 / width) ** 0.5
    optim = Optim(
        name="muon",
        lr=lr,
        muon_lr=lr,
        muon_scale="match_rms_adamw",
        schedule="wsd",
        warmup=50,
        final=0.0,
        weight_decay=0.1,
    )
    model = ModelConfig(width=width, ffn=ffn, layers=layers, heads=heads, qk_norm=True)
    return Run(
        recipe=name,
        model=model,
        optim=optim,
        steps=1000,
        batch_rows=32,
        eval_every=1000,
        eval_rows=256,
        z_loss=1e-4,
    )


def ladder_200k() -> Run:
    """0.2 M in the blocks: minutes on a laptop."""
    return _rung("ladder_200k", 64, 176, 4, 2)


def ladder_1m() -> Run:
    """1.0 M in the blocks: within a laptop's reach."""
    return _rung("ladder_1m", 128, 352, 5, 4)


def ladder_4m() -> Run:
    """4.7 M in the blocks."""
    return _rung("ladder_4m", 256, 688, 6, 4)


def ladder_14m() -> Run:
    """14 M in the blocks."""
    return _rung("ladder_14m", 384, 1024, 8, 6)


def ladder_38m() -> Run:
    """38 M in the blocks."""
    return _rung("ladder_38m", 512, 1376, 12, 8)


def ladder_99m() -> Run:
    """99 M in the blocks."""
    return _rung("ladder_99m", 768, 2048, 14, 6)
