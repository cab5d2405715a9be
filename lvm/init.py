"""First values of weights: the same on any device and rank, whatever the parts of a model."""

import math
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lvm.config import ModelConfig

CODEBOOK = "embed.codebook"  # a stand-in is drawn until it is given: see `lvm.codebook`


def draw_weights(
    model: nn.Module, config: ModelConfig, *, seed: int
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield each parameter and its first values, on the CPU.

    Norms are 1 and biases 0; matrices are drawn as `config.init` says, each from a generator of its
    own. QK-norm, biases and a codebook change the draw of no other tensor: they are not counted.
    """
    index = -1
    for name, parameter in model.named_parameters():
        if name.endswith(CODEBOOK):
            generator = torch.Generator().manual_seed(seed * 100_003 + 100_002)
            yield parameter, torch.randn(parameter.shape, generator=generator)
            continue
        vector = name.endswith(("q_norm.weight", "k_norm.weight", ".bias"))
        index += not vector
        if name.endswith("norm.weight"):
            yield parameter, torch.ones(parameter.shape)
        elif name.endswith(".bias"):
            yield parameter, torch.zeros(parameter.shape)
        else:
            generator = torch.Generator().manual_seed(seed * 100_003 + index)
            if config.init == "xavier":
                bound = xavier_bound(parameter.shape)
                uniform = torch.rand(parameter.shape, generator=generator)
                yield parameter, (2 * uniform - 1) * bound
            else:
                noise = torch.randn(parameter.shape, generator=generator)
                yield parameter, noise * deviation(name, config)


def xavier_bound(shape: torch.Size) -> float:
    """Return sqrt(6 / (in + out)) of a matrix; a convolution is one of its flattened kernel."""
    return math.sqrt(6 / (shape[0] + math.prod(shape[1:])))


def deviation(name: str, config: ModelConfig) -> float:
    """Return the standard deviation of a matrix under init "normal" or "delvm".

    DeLVM (its InternLM): 0.006 for q, k, v and gate; the same over sqrt(2 (layer + 1)) for the
    attention's output and for *up*, not down, which is 0.0015; 0.0052 for the embedding's
    projection and the head.
    """
    if config.init == "normal":
        return config.init_std
    layer = re.search(r"layers\.(\d+)\.", name)
    if layer is None:
        return 0.0052
    part = name.split(".")[-2]
    if part == "down":
        return 0.0015
    return 0.006 / (math.sqrt(2 * (int(layer[1]) + 1)) if part in ("o", "up") else 1)
