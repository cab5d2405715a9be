"""DeLVM (Guo et al. 2024, "Data-efficient Large Vision Models through Sequential Autoregression").

Shapes, initialisation and optimiser of its released configurations, for InternLM: a LLaMA with
biases in its attention, whose embedding is the tokenizer's codebook, frozen, and a projection of
its 64 channels (give `--codebook`, the tokenizer that the data were built with); bare codes, rows
of 8 images (build the data with `row_len = 2048`, plan with `--row-len 2048`), sentences of a row
apart; 128 rows = 262,144 tokens an update, 40,000 updates = 10.5 B tokens; AdamW with decay on
every weight, 224 updates of warm-up to 1.5e-4, cosine to 1.5e-5.

Two things differ. Code 0 is predicted as any other; DeLVM's collation lost it as a label. And we
compute in bf16, where it had fp16 and a loss scale.

Expected results, as its poster gives them (loss, accuracy of the next code in %, perplexity); not
run here. Hardware there: A100s of 40 GB.
"""

from dataclasses import replace

from lvm.config import Distil, ModelConfig, Optim, Run


def _delvm(recipe: str, *, width: int, ffn: int, heads: int) -> Run:
    model = ModelConfig(
        width=width,
        ffn=ffn,
        layers=22,
        heads=heads,
        vocab_size=8192,
        norm_eps=1e-5,
        attn_bias=True,
        codebook_dim=64,
        init="delvm",
    )
    optim = Optim(lr=1.5e-4, final=0.1, warmup=224, weight_decay=0.1, decay_all=True)
    return Run(recipe=recipe, model=model, optim=optim, layout="none", steps=40_000, batch_rows=128)


def delvm_300m() -> Run:
    """291.2 M trained, 8 heads of 128.

    A tenth of SA-1B alone: 4.64 / 19.17 / 103.2; COCO-Pose alone: 4.97 / 20.46 / 144.1. All tasks:
    segmentation 4.68 / 18.79 / 107.8, pose 4.94 / 20.24 / 140.4, derain 5.63 / 11.57 / 271.4. 126 h
    on 16 GPUs there. Not run here.
    """
    return _delvm("delvm_300m", width=1024, ffn=2816, heads=8)


def delvm_300m_kd() -> Run:
    """The same with a teacher, which is to be given: `--distil.teacher` or `--distil.logits`.

    CE + KL(teacher, student) at temperature 1, with `delvm_1b` for a teacher. All tasks:
    segmentation 4.67 / 18.84 / 106.8, pose 4.93 / 20.32 / 139.3, derain 5.62 / 11.93 / 269.0: a
    tenth of the way to the teacher. 235 h on 16 GPUs there. Not run here.
    """
    run = _delvm("delvm_300m_kd", width=1024, ffn=2816, heads=8)
    return replace(run, distil=Distil(required=True))


def delvm_1b() -> Run:
    """1147.5 M trained, 16 heads of 128: the teacher of the others.

    A tenth of SA-1B alone: 4.50 / 20.18 / 90.0; COCO-Pose alone: 4.90 / 20.96 / 134.1. All tasks:
    segmentation 4.55 / 19.72 / 94.8, pose 4.86 / 20.77 / 130.0, derain 5.53 / 12.20 / 245.3. 324 h
    on 16 GPUs there. Not run here.
    """
    return _delvm("delvm_1b", width=2048, ffn=5632, heads=16)
