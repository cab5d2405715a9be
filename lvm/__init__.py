"""Large vision models: autoregressive transformers over visual sentences.

    model = lvm.load("folder or run")
    frames = lvm.complete(model, tok, images, new=1, candidates=4)

Importing the package costs nothing, not even torch; the rest is imported when it is first used.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    import torch
    from torch import Tensor

    from lvm.model import Transformer
    from lvm.vision import VisionModel
    from tokenizer.protocol import Tokenizer

__all__ = ["complete", "load"]


def load(path: Path | str, *, dtype: "torch.dtype | None" = None) -> "Transformer | VisionModel":
    """Read a model: a run folder, one of `lvm.export`, a LLaMA or Qwen3 of Hugging Face (LVM),
    InternLM's checkpoint or its Hugging Face form (DeLVM), or Apple's AIM (`.pth` file) and AIMv2
    (folder).

    Returns it on the CPU in eval mode, fp32 or of `dtype`: a Transformer with `.reads` set, or of
    AIM a VisionModel, whose `block_outputs(images, blocks)` are the features of each block. Raises
    tokenizer.cli.InputError where it is none of these, or does not hold what it says.
    """
    from lvm import models

    return models.load(path, dtype=dtype)


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
    min_p: float = 0.0,
    guidance: float = 1.0,
    bare: int = 1,
    seed: int = 0,
    part: "Tensor | None" = None,
    keep: float = 0.5,
    rank: "Literal['likelihood', 'gain'] | None" = None,
) -> "Tensor":
    """Continue a visual sentence; returns float images [candidates, new, 3, H, W] in [0, 1].

    `images` is float [k, 3, H, W] in [0, 1], or a list of such [3, H, W], of the tokenizer's size.
    An analogy prompt is x1, y1, x2, y2, …, query. Temperature 0 takes the most likely codes; top_k
    0, top_p 1 and min_p 0 keep all of them. Candidate i is the same whatever the number of
    candidates.

    guidance  above 1 pushes away from what would be drawn after the last `bare` images alone
    part      float [3, H, W], of which the upper part `keep` begins the first answer (inpainting);
              what is below is never looked at
    rank      puts the best candidate first: the likeliest, or the one that the images before the
              last have made likelier most (gain)

    Raises tokenizer.cli.InputError where the tokenizer is not the model's, the images have another
    size, or there are more of them than a row of the model has room for.
    """
    from lvm.generate import Sampling
    from lvm.prompting import answers

    sampling = Sampling(
        new=new,
        candidates=candidates,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        guidance=guidance,
        bare=bare,
        seed=seed,
    )
    return answers.complete(model, tok, images, sampling, part=part, keep=keep, by=rank)
