"""Apple's released AIM and AIMv2 weights: files and folders to our vision model.

    model = lvm.load("aim_600m_2bimgs_attnprobe_backbone.pth")
    model = lvm.load("aimv2-large-patch14-224")          # folder of safetensors

What a file is stands in its names and shapes; a head has 128 channels in every released model. Four
layouts are read (D width, I hidden width of the MLP):

    AIM v1     trunk.blocks.I.attn.qkv.weight [3D, D], LayerNorms with biases, fc1 and fc2
    its l3m    the same with attn.{q,k,v}_proj.weight, and a table of positions that is not needed
    AIM v2     trunk.blocks.I.attn.qkv.weight, RMSNorms, fc1 (gate), fc3 (up), fc2 (down)
    Hugging    encoder.layers.I.attention.{q,k,v,out}_proj.weight, ffn.{gate,up,down}_proj.weight
    Face's v2

A probe's head (`head.…`, released beside AIM v1) is given apart; the decoders were never released.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lvm import weights
from lvm.config import ModelConfig, Patches
from lvm.vision import VisionModel
from tokenizer.cli import InputError
from tokenizer.interop import check_tensors, read_tensors

HEAD_DIM = 128
EPS = {"layer": 1e-6, "rms": 1e-5}  # of AIM v1 (ml-aim) and v2

NAMES = (  # patterns of theirs, the layer as a group, and ours
    (r"preprocessor(?:\.blocks\.0)?\.patchifier\.proj\.(\w+)", r"embed.proj.\1"),
    (r"preprocessor(?:\.blocks\.0)?\.patchifier\.norm\.(\w+)", r"embed.norm.\1"),
    (r"preprocessor\.pos_embed", r"embed.pos"),
    (r"trunk\.blocks\.(\d+)\.norm_1\.(\w+)", r"layers.\1.attn_norm.\2"),
    (r"trunk\.blocks\.(\d+)\.norm_2\.(\w+)", r"layers.\1.mlp_norm.\2"),
    (r"trunk\.blocks\.(\d+)\.attn\.qkv\.weight", r"layers.\1.attn.qkv.weight"),
    (r"trunk\.blocks\.(\d+)\.attn\.([qkv])_proj\.weight", r"layers.\1.attn.\2.weight"),
    (r"trunk\.blocks\.(\d+)\.attn\.proj\.weight", r"layers.\1.attn.o.weight"),
    (r"trunk\.blocks\.(\d+)\.mlp\.fc(\d)\.weight", r"layers.\1.mlp.fc\2.weight"),
    (r"trunk\.post_trunk_norm\.(\w+)", r"norm.\1"),
    (r"embeddings\.patch_embed\.(\w+)", r"embed.proj.\1"),
    (r"embeddings\.rms_norm\.(\w+)", r"embed.norm.\1"),
    (r"embeddings\.position_embedding\.weight", r"embed.pos"),
    (r"encoder\.layers\.(\d+)\.attention\.([qkv])_proj\.weight", r"layers.\1.attn.\2.weight"),
    (r"encoder\.layers\.(\d+)\.attention\.out_proj\.weight", r"layers.\1.attn.o.weight"),
    (r"encoder\.layers\.(\d+)\.ffn\.(gate|up|down)_proj\.weight", r"layers.\1.mlp.\2.weight"),
    (r"encoder\.layers\.(\d+)\.rms_norm1\.weight", r"layers.\1.attn_norm.weight"),
    (r"encoder\.layers\.(\d+)\.rms_norm2\.weight", r"layers.\1.mlp_norm.weight"),
    (r"rms_norm\.weight", r"norm.weight"),
)
HEAD = "head."
UNUSED = (r"preprocessor\.blocks\.0\.pos_embed", r"trunk\.blocks\.\d+\.attn\.attn_mask")
WITNESS = ("embed.proj.weight", "norm.weight", "layers.0.attn_norm.weight")  # every layout has them


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """What a file or folder held: the model's shape and tensors by our names, and a probe's head by
    its own names, without `head.`."""

    config: ModelConfig
    patches: Patches
    state: dict[str, Tensor]
    head: dict[str, Tensor]


def is_apple(names: Iterator[str] | Mapping[str, object]) -> bool:
    """Say whether tensor names are of AIM or AIMv2."""
    return any(n.startswith(("preprocessor.", "embeddings.patch_embed.")) for n in names)


def read(path: Path) -> Released:
    """Read a `.pth`, `.pt` or `.safetensors` file, or a folder of safetensors; see the module.

    Raises InputError where names or shapes are not those of an AIM.
    """
    found = weights.read(path) if path.is_dir() else read_tensors(path)
    head = {k.removeprefix(HEAD): v for k, v in found.items() if k.startswith(HEAD)}
    trunk = {k: v for k, v in found.items() if not k.startswith(HEAD)}
    state = dict(_ours(trunk, path))
    if absent := [name for name in WITNESS if name not in state]:
        raise InputError(
            f"{path} is not a whole AIM: it lacks {', '.join(absent)}; wanted a released backbone. "
            "Heads of probes are files of their own, read by lvm.probe"
        )
    config, patches = shape_of(state, path)
    folder = path if path.is_dir() else path.parent
    return Released(config=config, patches=_normalised(patches, folder), state=state, head=head)


def shape_of(state: Mapping[str, Tensor], path: Path) -> tuple[ModelConfig, Patches]:
    """Return the shape of a model from its tensors by our names."""
    kernel = state["embed.proj.weight"]
    width, size = kernel.shape[0], kernel.shape[-1]
    layers = 1 + max(int(m[1]) for name in state if (m := re.match(r"layers\.(\d+)\.", name)))
    gated = "layers.0.mlp.gate.weight" in state
    norm = "layer" if "norm.bias" in state else "rms"
    if width % HEAD_DIM:
        raise InputError(f"{path} is {width} wide; an AIM has whole heads of {HEAD_DIM} channels")
    config = ModelConfig(
        width=width,
        layers=layers,
        heads=width // HEAD_DIM,
        ffn=state["layers.0.mlp.up.weight"].shape[0],
        rotary=False,
        norm="layer" if norm == "layer" else "rms",
        norm_eps=EPS[norm],
        mlp="swiglu" if gated else "gelu",
        init="xavier",
    )
    if (pos := state.get("embed.pos")) is None:
        return config, Patches(size=size, image_size=16 * size)
    side = round(len(pos) ** 0.5)
    return config, Patches(size=size, image_size=side * size, positions="learned")


def build(found: Released, path: Path, *, dtype: torch.dtype | None = None) -> VisionModel:
    """Return the model in eval mode; refuses missing, surplus and misshapen tensors by name."""
    with torch.device("meta"):
        model = VisionModel(found.config, found.patches)
    check_tensors(found.state, dict(model.state_dict()), path)
    kept = {name: tensor.to(dtype or torch.float32) for name, tensor in found.state.items()}
    model.load_state_dict(kept, assign=True)
    return model.eval()


def _ours(found: Mapping[str, Tensor], path: Path) -> Iterator[tuple[str, Tensor]]:
    """Go through the tensors by our names, fused ones cut apart."""
    gated = any(name.endswith(".mlp.fc3.weight") for name in found)
    fc = {"1": "gate", "3": "up", "2": "down"} if gated else {"1": "up", "2": "down"}
    for theirs, tensor in found.items():
        if any(re.fullmatch(pattern, theirs) for pattern in UNUSED):
            continue
        for pattern, form in NAMES:
            if match := re.fullmatch(pattern, theirs):
                name = match.expand(form)
                break
        else:
            raise InputError(f"{path} holds {theirs}, which no AIM has; wanted a released backbone")
        if name.endswith("attn.qkv.weight"):
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                yield name.replace("qkv", part), rows
        elif found_fc := re.search(r"fc(\d)", name):
            yield name.replace(found_fc[0], fc[found_fc[1]]), tensor
        else:
            yield name, tensor.reshape(-1, tensor.shape[-1]) if name == "embed.pos" else tensor


def _normalised(patches: Patches, folder: Path) -> Patches:
    """Return `patches` with the mean and deviation that a folder's image processor says."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return patches
    found = json.loads(path.read_text(encoding="utf-8"))
    mean, std = found.get("image_mean"), found.get("image_std")
    if not mean or not std:
        return patches
    return replace(patches, pixel_mean=tuple(mean), pixel_std=tuple(std))
