"""DeLVM's weights in and out: checkpoints of InternLM, the framework that it was trained in.

    python -m lvm.internlm checkpoint/40000 --out delvm_300m                   # for transformers
    python -m lvm.internlm runs/delvm_300m --format internlm --out checkpoint  # and back

DeLVM embeds a code as its vector in the tokenizer's codebook, frozen, through a trained projection;
both are kept, and folded into one table where the folder is for transformers. Rotary positions turn
halves of a head, as ours: q and k are not permuted. How the parts of a checkpoint make whole
tensors stands in `lvm.internlm_parts`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from lvm import interop, models
from lvm.config import ModelConfig
from lvm.export import DTYPES, SHARD_GB, check_out, draft_of, shard_bytes, write
from lvm.internlm_parts import (
    CODEBOOK,
    LAYER,
    PROJECTION,
    SETTINGS,
    merge,
    read_ranks,
    read_settings,
)
from lvm.model import Transformer, on_meta
from lvm.vision import VisionModel
from tokenizer.cli import InputError, run
from tokenizer.formats.checkpoint import some
from tokenizer.interop import check_tensors

EPS = 1e-5  # that DeLVM trained with; its own export to Hugging Face writes 1e-6
NAMES = {
    "embed.codebook": CODEBOOK,
    "embed.proj.weight": PROJECTION,
    "layers.{}.attn_norm.weight": "blocks.{}.norm1.weight",
    "layers.{}.attn.o.weight": "blocks.{}.mixer.out_proj.weight",
    "layers.{}.attn.o.bias": "blocks.{}.mixer.out_proj.bias",
    "layers.{}.mlp_norm.weight": "blocks.{}.norm2.weight",
    "layers.{}.mlp.gate.weight": "blocks.{}.mlp.w1.weight",
    "layers.{}.mlp.up.weight": "blocks.{}.mlp.w2.weight",
    "layers.{}.mlp.down.weight": "blocks.{}.mlp.w3.weight",
    "norm.weight": "norm.weight",
    "head.weight": "head.weight",
}
"""Our tensor names and InternLM's, but for q, k and v, which are one matrix there: Wqkv, whose rows
are (3, heads, head_dim)."""
QKV = {
    f"layers.{{}}.attn.{{}}.{kind}": f"blocks.{{}}.mixer.Wqkv.{kind}" for kind in ("weight", "bias")
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Convert:
    """Write DeLVM's weights as a Hugging Face LLaMA folder, in this project's own format, or as a
    checkpoint of InternLM."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Checkpoint of InternLM; for --format internlm also a run or an export of this project. An
    lvm.json in it says what the model reads; a checkpoint without one reads as DeLVM's do."""
    out: Path
    """Folder to write: new, empty, or an earlier export, which is replaced."""
    format: Literal["hf", "native", "internlm"] = "hf"
    heads: int = 0
    """Query heads, where model_config.pt is missing. DeLVM's: 300m 8, 1b 16."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the stored weights."""
    shard_gb: float = SHARD_GB
    """Weights above this many GB (10^9 bytes) are split into numbered files and an index; those of
    --format internlm are one file."""


def load(path: Path | str, *, heads: int = 0, dtype: torch.dtype | None = None) -> Transformer:
    """Read a checkpoint of InternLM with DeLVM's embedding; the model is on the CPU, in eval mode.

    `heads` is wanted where there is no model_config.pt. Weights become `dtype`, or fp32. Raises
    InputError where files are missing, do not fit each other, or hold another network.
    """
    folder = Path(path)
    settings = read_settings(folder / SETTINGS)
    state = merge(read_ranks(folder), folder)
    config = config_of(state, settings, heads=heads, source=folder)
    ours = from_internlm(state, config)
    model = on_meta(config)
    check_tensors(ours, dict(model.state_dict()), folder, told_by="its tensors and settings")
    interop.fill(model, ours, dtype=dtype)
    model.reads = interop.read_reads(folder, config, released=interop.delvm_reads(config))
    return model.eval()


def config_of(
    state: Mapping[str, Tensor], settings: Mapping[str, Any], *, heads: int, source: Path
) -> ModelConfig:
    """Return the shape that the tensors tell and the settings must agree with."""
    wanted = {
        "embed.codebook": (2, NAMES["embed.codebook"]),
        "norm": (1, "norm.weight"),
        "gate": (2, NAMES["layers.{}.mlp.gate.weight"].format(0)),
        "qkv": (2, "blocks.0.mixer.Wqkv.weight"),
        "head": (2, "head.weight"),
    }
    found = {key: state.get(name) for key, (_, name) in wanted.items()}
    lost = [
        name
        for key, (ndim, name) in wanted.items()
        if (tensor := found[key]) is None or tensor.ndim != ndim
    ]
    if lost:
        raise InputError(
            f"{source} holds no model of DeLVM: it lacks {some(lost)}. Wanted a LLaMA whose "
            "embedding is a codebook and its projection (docs/interop.md lists the names)"
        )
    codebook, norm, gate, qkv, head = (tensor for tensor in found.values() if tensor is not None)
    given = settings.get("num_attention_heads", heads)
    if heads and given != heads:
        raise InputError(f"--heads {heads}: {source / SETTINGS} says {given}; leave --heads out")
    if not isinstance(given, int) or given < 1:
        raise InputError(
            f"{source} does not say how many heads its model has, which tensors do not tell; give "
            "--heads (DeLVM's 300m has 8, its 1b 16) or put its model_config.pt beside the weights"
        )
    if len(qkv) % (3 * given):
        raise InputError(
            f"{given} heads: Wqkv of {source} has {len(qkv)} rows, which do not divide into 3 "
            "times so many heads; DeLVM's models have 8 and 16"
        )
    layers = len({layer[1] for name in state if (layer := LAYER.match(name))})
    told = {"hidden_size": len(norm), "num_layers": layers, "vocab_size": len(head)}
    for key, value in told.items():
        if settings.get(key, value) not in (value, -1):  # -1: not known to InternLM
            raise InputError(
                f"{source / SETTINGS} says {key} {settings[key]}, the tensors {value}; are all "
                "files of one checkpoint?"
            )
    if len(codebook) != len(head):
        raise InputError(
            f"{source} has {len(codebook)} codes and a head of {len(head)} rows; wanted as many"
        )
    return ModelConfig(
        width=len(norm),
        layers=layers,
        heads=given,
        ffn=len(gate),
        head_dim=len(qkv) // 3 // given,
        vocab_size=len(head),
        norm_eps=float(settings.get("layer_norm_epsilon", EPS)),
        rope_theta=float(settings.get("rope_base", 10_000.0)),
        attn_bias="blocks.0.mixer.Wqkv.bias" in state,
        codebook_dim=codebook.shape[1],
        init="delvm",
    )


def from_internlm(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return whole tensors of InternLM by our names; the rest keeps its own. Empties `state`."""
    ours: dict[str, Tensor] = {}
    for name, form, i in interop.expand(NAMES, config):
        if (tensor := state.pop(NAMES[form].format(i), None)) is not None:
            ours[name] = tensor
    for form, theirs in QKV.items():
        for i in range(config.layers):
            if (tensor := state.pop(theirs.format(i), None)) is None:
                continue
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                ours[form.format(i, part)] = rows
    return ours | state


def to_internlm(model: Transformer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return settings and tensors of a model as one part of InternLM, which is all of it.

    Raises InputError where DeLVM's code could not build the network.
    """
    config, state = model.config, model.state_dict()
    plain = (
        config.qk_norm or config.groups != config.heads or config.dim * config.heads != config.width
    )
    if faults := [
        fault
        for fault, found in (
            ("its embedding is a table: codebook_dim 0", not config.codebook_dim),
            ("its attention has no biases: attn_bias False", not config.attn_bias),
            ("its heads have QK-norm, share keys or do not fill the width", plain),
            (f"its FFN, {config.ffn}, is no multiple of 256", config.ffn % 256),
            (f"its rope_theta is {config.rope_theta:g}, not 10000", config.rope_theta != 10_000),
        )
        if found
    ]:
        raise InputError(
            f"the model has no form in DeLVM's InternLM: {'; '.join(faults)}. Use --format hf or "
            "native"
        )
    found = {NAMES[form].format(i): state[name] for name, form, i in interop.expand(NAMES, config)}
    for form, theirs in QKV.items():
        for i in range(config.layers):
            found[theirs.format(i)] = torch.cat([state[form.format(i, part)] for part in "qkv"])
    embedding = {"vq_model_path": "", "embedding_dim": config.width, "freeze_vq_model": True}
    settings = {
        "checkpoint": False,
        "num_attention_heads": config.heads,
        "embed_split_hidden": True,
        "vocab_size": config.vocab_size,
        "embed_grad_scale": 1,
        "parallel_output": True,
        "hidden_size": config.width,
        "num_layers": config.layers,
        "mlp_ratio": config.ffn / config.width,  # rounded up to 256 there
        "apply_post_layer_norm": False,
        "norm_type": "rmsnorm",
        "layer_norm_epsilon": config.norm_eps,
        "use_flash_attn": True,
        "num_chunks": 1,
        "lvm_config": {"enable": True, "embedding_cfg": embedding},
    }
    return settings, {f"model.{name}": tensor for name, tensor in found.items()}


def write_internlm(
    model: Transformer, out: Path | str, *, dtype: torch.dtype = torch.float32
) -> list[Path]:
    """Write a checkpoint of InternLM, one part, to the folder `out`, whole or not at all; returns
    its files. Raises InputError as `to_internlm`, or where `out` holds anything but an export."""
    out = Path(out)
    settings, state = to_internlm(model)
    with draft_of(out) as draft:
        torch.save(settings | {"dtype": str(dtype)}, draft / SETTINGS)
        whole = {name: tensor.detach().to("cpu", dtype).clone() for name, tensor in state.items()}
        torch.save(whole, draft / "model_tp0_pp0.pt")
        if model.reads is not None:
            model.reads.save(draft)
    return sorted(out.iterdir())


def main(command: Convert) -> None:
    check_out(command.out)
    if command.out.resolve() == command.model.resolve():
        raise InputError(f"--out {command.out} is the folder that is read; name another")
    limit, dtype = shard_bytes(command.shard_gb), DTYPES[command.dtype]
    model: Transformer | VisionModel
    if interop.is_internlm(command.model) or not (command.model / interop.CONFIG).exists():
        model = load(command.model, heads=command.heads, dtype=dtype)
    elif command.heads:
        raise InputError(f"--heads {command.heads}: the config.json of {command.model} says it")
    else:
        model = models.load(command.model, dtype=dtype)
    if command.format != "internlm":
        files = write(model, command.out, format=command.format, dtype=dtype, shard_bytes=limit)
    elif isinstance(model, Transformer):
        files = write_internlm(model, command.out, dtype=dtype)
    else:
        raise InputError("a model of pixels has no form in InternLM; wanted one of codes")
    size = sum(f.stat().st_size for f in files)
    print(f"{command.out}: {len(files)} files, {size / 1e6:.1f} MB, {command.format}")


if __name__ == "__main__":
    run(Convert, main, prog="python -m lvm.internlm")
