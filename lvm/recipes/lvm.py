"""LVM (Bai et al. 2023, "Sequential Modeling Enables Scalable Learning for Large Vision Models").

`lvm_*` are ours: the paper's widths and depths with heads of 128 channels, a `bos` before each
sentence, sentences of a row apart from each other, 512 rows = 2 Mi tokens an update, 200 k updates
= 420 B tokens; QK-norm, z-loss (PaLM, section 5), Muon for the matrices of the blocks and AdamW for
the rest, and the schedule warm-up, stable, decay: 2000 updates up, the peak, and over the last
fifth a straight line to 0 (Hägele et al. 2024, "Scaling laws and compute-optimal training beyond
fixed training durations"). Until the rate falls, a run can be resumed with another `--steps`.

`lvm_*_paper` follow the released code: its heads, its table of 8292 rows, no specials, whole rows,
128 rows = 0.5 Mi tokens an update, AdamW with decay on every weight, 8000 updates of warm-up to
1.5e-4, cosine to 3e-5 at update 288 k.

Expected results, hardware and time: not run at scale, neither the ones nor the others. The peak
rates of `lvm_*` are starting values, not tuned: 1 to 1.5 times those of GPT-3's table 2.1 (Brown et
al. 2020) at the nearest size. Muon takes the same rate and decay, its updates scaled to the size of
AdamW's (Liu et al. 2025, "Muon is scalable for LLM training").
"""

from dataclasses import replace

from lvm.config import ModelConfig, Optim, Run


def _ours(name: str, model: ModelConfig, *, lr: float) -> Run:
    optim = Optim(
        name="muon",
        lr=lr,
        muon_lr=lr,
        muon_scale="match_rms_adamw",
        schedule="wsd",
        warmup=2000,
        final=0.0,
        weight_decay=0.1,
    )
    model = replace(model, qk_norm=True)
    return Run(recipe=name, model=model, optim=optim, steps=200_000, batch_rows=512, z_loss=1e-4)


def _paper(name: str, model: ModelConfig) -> Run:
    optim = Optim(
        lr=1.5e-4, final=0.2, warmup=8000, decay_steps=288_000, weight_decay=0.1, decay_all=True
    )
    return Run(
        recipe=name,
        model=model,
        optim=optim,
        layout="none",
        whole_rows=True,
        steps=288_000,
        batch_rows=128,
    )


def _shape(width: int, ffn: int, layers: int, heads: int, *, vocab: int = 8320) -> ModelConfig:
    return ModelConfig(width=width, ffn=ffn, layers=layers, heads=heads, vocab_size=vocab)


def lvm_100m() -> Run:
    """106 M in the blocks, 5 heads of 128. Not run at scale."""
    return _ours("lvm_100m", _shape(640, 1664, 22, 5), lr=6e-4)


def lvm_300m() -> Run:
    """274 M in the blocks, 8 heads of 128. Not run at scale."""
    return _ours("lvm_300m", _shape(1024, 2688, 22, 8), lr=4e-4)


def lvm_600m() -> Run:
    """623 M in the blocks, 12 heads of 128. Not run at scale."""
    return _ours("lvm_600m", _shape(1536, 4096, 22, 12), lr=3e-4)


def lvm_1b() -> Run:
    """1.11 B in the blocks, 16 heads of 128. Not run at scale."""
    return _ours("lvm_1b", _shape(2048, 5504, 22, 16), lr=2.5e-4)


def lvm_3b() -> Run:
    """3.22 B in the blocks, 25 heads of 128 (not divisible by 2, 4, 8). Not run at scale."""
    return _ours("lvm_3b", _shape(3200, 8640, 26, 25), lr=2e-4)


def lvm_7b() -> Run:
    """6.48 B in the blocks, 32 heads of 128. Not run at scale."""
    return _ours("lvm_7b", _shape(4096, 11008, 32, 32), lr=1.5e-4)


def lvm_13b() -> Run:
    """12.7 B in the blocks, 40 heads of 128. Not run at scale."""
    return _ours("lvm_13b", _shape(5120, 13824, 40, 40), lr=1.5e-4)


def lvm_100m_paper() -> Run:
    """10 heads of 64. Not run at scale."""
    return _paper("lvm_100m_paper", _shape(640, 1664, 22, 10, vocab=8292))


def lvm_300m_paper() -> Run:
    """8 heads of 128. Not run at scale."""
    return _paper("lvm_300m_paper", _shape(1024, 2688, 22, 8, vocab=8292))


def lvm_600m_paper() -> Run:
    """16 heads of 96. Not run at scale."""
    return _paper("lvm_600m_paper", _shape(1536, 4096, 22, 16, vocab=8292))


def lvm_1b_paper() -> Run:
    """16 heads of 128. Not run at scale."""
    return _paper("lvm_1b_paper", _shape(2048, 5504, 22, 16, vocab=8292))


def lvm_3b_paper() -> Run:
    """32 heads of 100. Not run at scale."""
    return _paper("lvm_3b_paper", _shape(3200, 8640, 26, 32, vocab=8292))


def lvm_7b_paper() -> Run:
    """The shape of the released weights, 32 heads of 128. Not run at scale."""
    return _paper("lvm_7b_paper", _shape(4096, 11008, 32, 32, vocab=8292))


def lvm_13b_paper() -> Run:
    """40 heads of 128. Not run at scale."""
    return _paper("lvm_13b_paper", _shape(5120, 13824, 40, 40, vocab=8292))
