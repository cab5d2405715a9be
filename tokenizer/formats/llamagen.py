"""LlamaGen's VQ-8 and VQ-16 (Sun et al., "Autoregressive model beats diffusion", 2024).

A file is {"model": …}, in training checkpoints also "ema" and more; "model" is read, as by the
programs that made the codes for LlamaGen's own models. The network is taming's under other names.
Codes and latents are compared at unit length and pixels are in [-1, 1], which no tensor tells: a
checkpoint trained without the normalisation looks the same and would be read wrongly.
"""

import re

from torch import Tensor

MID = {"block_1": "0", "attn_1": "1", "block_2": "2"}
USE = "quantize.codebook_used"  # the latest codes, kept to report how many are in use


def names(name: str, levels: int) -> str:
    """Return LlamaGen's name of one of ours; it counts decoder levels from the lowest resolution.

    >>> names("decoder.up.0.block.2.conv1.bias", 5)
    'decoder.conv_blocks.4.res.2.conv1.bias'
    """
    name = re.sub(r"\.down\.(\d+)\.", r".conv_blocks.\1.", name)
    name = re.sub(r"\.up\.(\d+)\.", lambda m: f".conv_blocks.{levels - 1 - int(m[1])}.", name)
    name = re.sub(r"\.mid\.(block_1|attn_1|block_2)\.", lambda m: f".mid.{MID[m[1]]}.", name)
    return re.sub(r"\.block\.(\d+)\.", r".res.\1.", name)


def read_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the network alone."""
    return {name: tensor for name, tensor in state.items() if name != USE}
