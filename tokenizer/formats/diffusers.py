"""diffusers' VQModel: `config.json` beside `diffusion_pytorch_model.safetensors` or `.bin`.

Its config has no pixel range. We write one as the extra field `pixel_range`, which diffusers
passes over with a warning. Where it is absent, `lookup_from_codebook` tells the two kinds of
published files apart: true is aMUSEd, fed [0, 1]; false, the default, is latent diffusion, fed
[-1, 1]. Likewise a `sample_size` of 32 without our field is diffusers' default that nobody
changed, and 256 is taken.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from tokenizer.cli import InputError
from tokenizer.config import GROUPS, VQGANConfig
from tokenizer.files import atomic_write
from tokenizer.formats.shapes import IMAGE_SIZE, SIGNED, UNIT, build_config, check_holds
from tokenizer.vqgan import VQGAN

CLASS = "VQModel"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
DOWN = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")  # without and with attention
UP = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
DEFAULTS: dict[str, Any] = {  # of the class, for fields that older files lack
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": [DOWN[0]],
    "up_block_types": [UP[0]],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 3,
    "sample_size": 32,
    "num_vq_embeddings": 256,
    "norm_num_groups": 32,
    "vq_embed_dim": None,
    "norm_type": "group",
    "mid_block_add_attention": True,
    "lookup_from_codebook": False,
}
FIXED = {"norm_type": ("group",), "act_fn": ("silu", "swish"), "norm_num_groups": (GROUPS,)}
RULES = (
    (r"\.down\.(\d+)\.", r".down_blocks.\1."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
)
# Names of attention's layers in files from before diffusers 0.17, which it still reads.
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def names(name: str, levels: int) -> str:
    """Return diffusers' name of one of ours; it counts decoder levels from the lowest resolution.

    >>> names("decoder.up.0.attn.2.q.bias", 3)
    'decoder.up_blocks.2.attentions.2.to_q.bias'
    """
    name = re.sub(r"\.up\.(\d+)\.", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.", name)
    for pattern, replacement in RULES:
        name = re.sub(pattern, replacement, name)
    return name


def read_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` with present names and attention's linear layers as 1×1 convolutions."""

    def present(name: str) -> str:
        return re.sub(
            r"(\.attentions\.\d+)\.(query|key|value|proj_attn)\.",
            lambda m: f"{m[1]}.{OLD[m[2]]}.",
            name,
        )

    def square(name: str, tensor: Tensor) -> Tensor:
        return tensor[..., None, None] if ".attentions." in name and tensor.ndim == 2 else tensor

    return {present(name): square(name, tensor) for name, tensor in state.items()}


def read_config(raw: dict[str, Any], source: Path) -> VQGANConfig:
    """Return our config of a VQModel's; unknown fields are passed over, other networks refused."""
    raw = DEFAULTS | raw
    for field, supported in FIXED.items():
        if raw[field] not in supported:
            raise InputError(f"{source} has {field} {raw[field]!r}; supported: {supported[0]!r}")
    if raw["in_channels"] != raw["out_channels"]:
        raise InputError(f"{source} has in_channels and out_channels that differ")
    down = attended(raw, "down_block_types", DOWN, source)
    if attended(raw, "up_block_types", UP, source) != down[::-1]:
        raise InputError(
            f"{source} has up_block_types with attention at other levels than down_block_types; "
            "only the same ones are supported"
        )
    widths = raw["block_out_channels"]
    if len(widths) != len(down) or not all(isinstance(w, int) and w > 0 for w in widths):
        raise InputError(f"{source} has block_out_channels {widths!r} for {len(down)} levels")
    channels = math.gcd(*widths)
    own = "pixel_range" in raw
    size = raw["sample_size"] if own or raw["sample_size"] != 32 else IMAGE_SIZE
    by_kind = UNIT if raw["lookup_from_codebook"] else SIGNED
    return build_config(
        {
            "image_size": size,
            "in_channels": raw["in_channels"],
            "channels": channels,
            "multipliers": [width // channels for width in widths],
            "res_blocks": raw["layers_per_block"],
            "attention_resolutions": [size // 2**i for i, has in enumerate(down) if has],
            "mid_attention": raw["mid_block_add_attention"],
            "latent_dim": raw["latent_channels"],
            "code_dim": raw["vq_embed_dim"] or raw["latent_channels"],
            "codebook_size": raw["num_vq_embeddings"],
            "pixel_range": raw["pixel_range"] if own else by_kind,
        },
        source,
    )


def attended(raw: dict[str, Any], field: str, kinds: tuple[str, str], source: Path) -> list[bool]:
    """Return for each level, in the order of `field`, whether it has attention."""
    if wrong := [kind for kind in raw[field] if kind not in kinds]:
        raise InputError(f"{source} has {wrong[0]!r} in {field}; supported: {' and '.join(kinds)}")
    return [kind == kinds[1] for kind in raw[field]]


def to_config(config: VQGANConfig) -> dict[str, Any]:
    """Return a VQModel's config of ours; raises InputError where diffusers has no such network."""
    check_holds(config, "diffusers", patch=1, normalize_codes=False)
    levels = [config.has_attention(level) for level in range(len(config.widths))]
    return DEFAULTS | {
        "_class_name": CLASS,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "down_block_types": [DOWN[has] for has in levels],
        "up_block_types": [UP[has] for has in reversed(levels)],
        "block_out_channels": config.widths,
        "layers_per_block": config.res_blocks,
        "latent_channels": config.latent_dim,
        "sample_size": config.image_size,
        "num_vq_embeddings": config.codebook_size,
        "vq_embed_dim": config.code_dim,
        "mid_block_add_attention": config.mid_attention,
        "lookup_from_codebook": True,  # so that VQModel.decode takes codes
        "pixel_range": config.pixel_range,
    }


def write(model: VQGAN, folder: Path) -> None:
    raw, levels, state = to_config(model.config), len(model.config.widths), {}
    for ours, tensor in model.tensors():
        name = names(ours, levels)
        linear = ".attentions." in name and tensor.ndim == 4
        state[name] = tensor[:, :, 0, 0].contiguous() if linear else tensor
    with atomic_write(folder / "config.json", "w") as file:
        file.write(json.dumps(raw, indent=2, sort_keys=True) + "\n")
    with atomic_write(folder / WEIGHTS[0]) as file:
        file.write(save(state, metadata={"format": "pt"}))
