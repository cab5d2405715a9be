"""Runs that fit a laptop: the code of the large ones, with the geometry that the data has."""

from lvm.config import ModelConfig, Optim, Run


def tiny() -> Run:
    """0.3 M in the blocks: seconds an experiment, for tests and first steps."""
    model = ModelConfig(width=64, ffn=176, layers=4, heads=2, kv_heads=1)
    optim = Optim(lr=3e-3, warmup=20, weight_decay=0.1)
    return Run(recipe="tiny", model=model, optim=optim, steps=200, batch_rows=8, save_every=100)


def demo() -> Run:
    """0.8 M in the blocks, heads of 32, Muon: the model of `make demo`; results in its report.

    Rates and batch were chosen by the training loss after 75 s on the demo's data (2026-11-22, two
    Xeon cores, torch 2.13, one seed, mean nll of the last 50 updates): batch 8 with both rates 4e-3
    4.56, Muon's 1.2e-2 4.21; batch 4 with Muon's 1.2e-2 4.14, 2.5e-2 and 8e-3 beside it 3.96, 4e-2
    4.00.
    """
    model = ModelConfig(width=128, ffn=352, layers=4, heads=4)
    optim = Optim(name="muon", lr=8e-3, muon_lr=2.5e-2, warmup=50, weight_decay=0.1)
    return Run(recipe="demo", model=model, optim=optim, steps=100_000, batch_rows=4, save_every=500)
