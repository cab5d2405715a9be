"""openMUSE's VQGANModel, as LVM and DeLVM released it: our tensor names, its own config.

A folder is `config.json` beside `pytorch_model.bin` or `pytorch_model.safetensors`; pixels are in
[0, 1]. Written is the `.bin`: LVM's copy of the loader looks for that name alone.
"""

import json
from pathlib import Path
from typing import Any

import torch

from tokenizer.cli import InputError
from tokenizer.config import VQGANConfig
from tokenizer.files import atomic_write
from tokenizer.formats.shapes import UNIT, build_config, check_holds, whole_multipliers
from tokenizer.vqgan import VQGAN

CLASS = "VQGANModel"
WEIGHTS = ("pytorch_model.safetensors", "pytorch_model.bin")
# Names in a muse config of the fields of ours that have the same meaning.
FIELDS = {
    "image_size": "resolution",
    "in_channels": "num_channels",
    "channels": "hidden_channels",
    "multipliers": "channel_mult",
    "res_blocks": "num_res_blocks",
    "attention_resolutions": "attn_resolutions",
    "latent_dim": "z_channels",
    "code_dim": "quantized_embed_dim",
    "codebook_size": "num_embeddings",
    "commitment": "commitment_cost",
    "dropout": "dropout",
}


def read_config(raw: dict[str, Any], source: Path) -> VQGANConfig:
    """Return our config of a muse one; fields that say nothing of the network are passed over.

    A missing field is refused: the defaults of muse's class are those of another network than the
    one that was released.
    """
    wanted = [*FIELDS.values(), "no_attn_mid_block"]
    if missing := [name for name in wanted if name not in raw]:
        raise InputError(f"{source} lacks {', '.join(missing)}; the network cannot be known")
    if not raw.get("resample_with_conv", True):
        raise InputError(f"{source} has resample_with_conv false; only true is supported")
    config = build_config(
        {ours: raw[theirs] for ours, theirs in FIELDS.items()}
        | {"mid_attention": not raw["no_attn_mid_block"], "pixel_range": UNIT},
        source,
    )
    check_attention(config, source)
    return config


def check_attention(config: VQGANConfig, source: Path | str) -> None:
    """Refuse what muse's code computes otherwise; nobody released such weights.

    It leaves out the attention of a level that has a single one.
    """
    if config.res_blocks == 1 and any(map(config.has_attention, range(len(config.widths)))):
        raise InputError(
            f"{source} has attention levels with one residual block each, where muse leaves the "
            "encoder's attention out; its codes cannot be reproduced"
        )


def to_config(config: VQGANConfig) -> dict[str, Any]:
    """Return muse's config of ours; raises InputError where muse has no such network."""
    check_holds(config, "muse", patch=1, normalize_codes=False, pixel_range=UNIT)
    check_attention(config, "the tokenizer")
    values = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    return values | {
        "_class_name": CLASS,
        "_version": "0.0.1",
        "hidden_channels": config.widths[0],
        "channel_mult": whole_multipliers(config, "muse"),
        "no_attn_mid_block": not config.mid_attention,
        "resample_with_conv": True,
    }


def write(model: VQGAN, folder: Path) -> None:
    raw = to_config(model.config)
    with atomic_write(folder / "config.json", "w") as file:
        file.write(json.dumps(raw, indent=2, sort_keys=True) + "\n")
    with atomic_write(folder / "pytorch_model.bin") as file:
        torch.save(dict(model.tensors()), file)
