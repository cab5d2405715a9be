"""VQModel of taming-transformers and of latent diffusion: Lightning checkpoints, our tensor names.

A file is {"state_dict": …}; beside the network it holds the losses with their discriminator and
perceptual net (`loss.*`) and latent diffusion's averages (`model_ema.*`), which are dropped. Pixels
are in [-1, 1]. The shape is told by the tensors; the YAML beside a checkpoint is not read. The
image size is 256, as of all published ones, unless Lightning's "hyper_parameters" say otherwise:
ours do.

The codes are those of the nearest vectors. A Gumbel VQGAN chooses by a classifier and is refused.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizer.cli import InputError
from tokenizer.config import VQGANConfig
from tokenizer.files import atomic_write
from tokenizer.formats.shapes import IMAGE_SIZE, SIGNED, check_holds, whole_multipliers
from tokenizer.vqgan import VQGAN

WEIGHTS = "model.ckpt"
DROPPED = ("loss.", "model_ema.")
GUMBEL = "quantize.embed.weight"


def read_tensors(state: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Return the tensors of the network alone."""
    if GUMBEL in state:
        raise InputError(
            f"{source} is a Gumbel VQGAN ({GUMBEL}): it chooses codes by a classifier, not by the "
            "nearest vector; wanted a VQModel"
        )
    return {name: tensor for name, tensor in state.items() if not name.startswith(DROPPED)}


def image_size(content: dict[str, Any]) -> int:
    """Return the side of the images that the checkpoint was made for, in pixels."""
    network = content.get("hyper_parameters")
    for name in ("ddconfig", "resolution"):
        network = network.get(name) if isinstance(network, dict) else None
    return network if isinstance(network, int) and network > 0 else IMAGE_SIZE


def to_config(config: VQGANConfig) -> dict[str, Any]:
    """Return the `model` entry of a taming config; raises InputError where it cannot hold ours.

    taming's network always has attention in the middle. Latent diffusion's copy of it can be
    without any, so such a tokenizer is described as one of that project.
    """
    check_holds(config, "taming", patch=1, normalize_codes=False, pixel_range=SIGNED)
    levels = any(map(config.has_attention, range(len(config.widths))))
    if levels and not config.mid_attention:
        raise InputError(
            "taming cannot hold this tokenizer: it has attention at its levels and none in the "
            "middle (mid_attention)"
        )
    network = {
        "double_z": False,
        "z_channels": config.latent_dim,
        "resolution": config.image_size,
        "in_channels": config.in_channels,
        "out_ch": config.in_channels,
        "ch": config.widths[0],
        "ch_mult": whole_multipliers(config, "taming"),
        "num_res_blocks": config.res_blocks,
        "attn_resolutions": list(config.attention_resolutions),
        "dropout": config.dropout,
    }
    target = "taming.models.vqgan.VQModel"
    if not config.mid_attention:
        target = "ldm.models.autoencoder.VQModel"
        network["attn_type"] = "none"
    params = {
        "embed_dim": config.code_dim,
        "n_embed": config.codebook_size,
        "ddconfig": network,
        "lossconfig": {"target": "torch.nn.Identity"},
    }
    return {"target": target, "params": params}


def write(model: VQGAN, folder: Path) -> None:
    """Write `model.ckpt`, and `config.yaml` in the part of YAML that is JSON."""
    raw = to_config(model.config)
    with atomic_write(folder / "config.yaml", "w") as file:
        file.write(json.dumps({"model": raw}, indent=2) + "\n")
    with atomic_write(folder / WEIGHTS) as file:
        content = {"state_dict": dict(model.tensors()), "hyper_parameters": raw["params"]}
        torch.save(content, file)
