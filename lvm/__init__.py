"""Large vision models: autoregressive transformers over visual sentences.

    model = lvm.load("folder or run")
    frames = lvm.complete(model, tok, images, new=1, candidates=4)

Importing the package costs nothing, not even torch; the rest is imported when it is first used.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from lvm.model import Transformer
    from tokenizer.protocol import Tokenizer

__all__ = ["complete", "load"]


def load(path: Path | str, *, dtype: "torch.dtype | None" = None) -> "Transformer":
    """Read a model: a run folder, one of `lvm.export`, or a LLaMA or Qwen3 of Hugging Face.

    Returns it on the CPU in eval mode, fp32 or of `dtype`, with `.reads` set. Raises
    tokenizer.cli.InputError where the folder is none of these, or does not hold what it says.
    """
    from lvm import interop

    return interop.load(path, dtype=dtype)


def complete(
    model: "Transformer",
    tok: "Tokenizer",
    images: "Tensor | Sequence[Tensor]",
    *,
    new: int = 1,
    candidates: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> "Tensor":
    """Continue a visual sentence; returns float images [candidates, new, 3, H, W] in [0, 1].

    `images` is float [k, 3, H, W] in [0, 1], or a list of such [3, H, W], of the tokenizer's size.
    An analogy prompt is x1, y1, x2, y2, …, query. Temperature 0 takes the most likely codes; top_k
    0 and top_p 1 keep all of them. Candidate i is the same whatever the number of candidates.
    """
    from lvm import generate

    return generate.complete(
        model,
        tok,
        images,
        new=new,
        candidates=candidates,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
