"""Runs that fit a laptop: the code of the large ones, with the geometry that the data has."""

from lvm.config import ModelConfig, Optim, Run


def tiny() -> Run:
    """0.3 M in the blocks: seconds an experiment, for tests and first steps."""
    model = ModelConfig(width=64, ffn=176, layers=4, heads=2, kv_heads=1)
    optim = Optim(lr=3e-3, warmup=20, weight_decay=0.1)
    return Run(recipe="tiny", model=model, optim=optim, steps=200, batch_rows=8, save_every=100)


def demo() -> Run:
    """0.8 M in the blocks, heads of 32, Muon: the model of `make demo`; results in its report."""
    model = ModelConfig(width=128, ffn=352, layers=4, heads=4)
    optim = Optim(name="muon", lr=4e-3, muon_lr=4e-3, warmup=50, weight_decay=0.1)
    return Run(recipe="demo", model=model, optim=optim, steps=100_000, batch_rows=8, save_every=500)
