"""Model folders: ours, Hugging Face's LLaMA (LVM's release among them), and runs of `lvm.train`.

What a folder is stands in its `config.json`: ours has "format": "lvm", a run has "recipe", Hugging
Face's has "model_type". `lvm.json` beside it says what the model reads; a folder without one is
LVM's release (layout none, 8192 codes). What a foreign config says of `eos_token_id` is not even
read: the default of transformers is 2, which is an ordinary code. Nothing is ever unpickled: `.bin`
files are read by torch's restricted loader.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lvm.config import ModelConfig, Reads
from lvm.model import Transformer, on_meta
from tokenizer.cli import InputError
from tokenizer.interop import check_tensors, read_tensors

FORMAT, VERSION = "lvm", 1
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
OLD_WEIGHTS, OLD_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "layers.{}.attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.attn.q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.attn.k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.attn.v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.attn.o.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.mlp_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.mlp.gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.mlp.up.weight": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.mlp.down.weight": "model.layers.{}.mlp.down_proj.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
"""Our tensor names and Hugging Face's; shapes and the order of rows are the same in both."""


def load(path: Path | str, *, dtype: torch.dtype | None = None) -> Transformer:
    """Read the model in a folder of a known kind onto the CPU, in eval mode, `reads` set.

    Weights become `dtype`, or fp32. Raises InputError where the folder is of no known kind, asks
    for what is not built here, or holds other tensors than its config says.
    """
    folder = Path(path)
    found = read_json(folder / CONFIG)
    if "recipe" in found:
        from lvm.checkpoint import load_model_state  # a heavy import, and runs alone need it

        config = model_config(found.get("model"), folder / CONFIG)
        state = load_model_state(folder)
    elif found.get("format") == FORMAT:
        if found.get("version") != VERSION:
            raise InputError(
                f"{folder / CONFIG} has version {found.get('version')}; this code reads {VERSION}: "
                "update the code, or export the model again"
            )
        config = model_config(found.get("model"), folder / CONFIG)
        state = read_tensors(folder / WEIGHTS) if (folder / WEIGHTS).is_file() else {}
    elif found.get("model_type") == "llama":
        config = from_llama(found, folder / CONFIG)
        state = read_weights(folder)
        state = {k: v for k, v in state.items() if not k.endswith("rotary_emb.inv_freq")}
        if found.get("tie_word_embeddings") and NAMES["embed.weight"] in state:
            state[NAMES["head.weight"]] = state[NAMES["embed.weight"]].clone()
    else:
        kind = found.get("model_type") or found.get("_class_name") or found.get("format")
        raise InputError(
            f"{folder / CONFIG} describes {kind or 'no known kind of model'}; wanted a run of "
            "lvm.train, a folder of lvm.export, or a LLaMA of Hugging Face (model_type llama)"
        )
    names = hf_names(config) if found.get("model_type") == "llama" else None
    model = on_meta(config)
    wanted = {names[k] if names else k: v for k, v in model.state_dict().items()}
    check_tensors(state, wanted, folder)
    kept = {ours: state[names[ours] if names else ours] for ours in model.state_dict()}
    dtype = dtype or torch.float32
    model.load_state_dict({k: v.to(dtype) for k, v in kept.items()}, assign=True)
    model.reads = read_reads(folder, config)
    return model.eval()


def read_reads(folder: Path, config: ModelConfig) -> Reads:
    """Return what a model of `folder` reads; refuses codes or specials that its table lacks."""
    try:
        reads = Reads.load(folder)
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder / 'lvm.json'} cannot be read: {error}") from error
    need = reads.vocab.bos + 1 if reads.layout == "bos" else reads.codes
    if config.vocab_size < need:
        given = "lvm.json says" if (folder / "lvm.json").is_file() else "without an lvm.json it has"
        raise InputError(
            f"the model in {folder} has a table of {config.vocab_size} ids, but {given} "
            f"{reads.codes} codes in layout {reads.layout}, which needs {need}"
        )
    return reads


def read_json(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise InputError(f"no model folder at {path.parent}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{path.parent} is no model folder: it has no {path.name}; wanted a run of lvm.train, "
            "a folder of lvm.export, or a LLaMA of Hugging Face"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON ({error}); copy it again from its source") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}; wanted an object")
    return found


def model_config(found: Any, source: Path) -> ModelConfig:
    try:
        return ModelConfig(**found)
    except TypeError as error:
        raise InputError(f"{source} describes no model of this version: {error}") from error


def from_llama(found: Mapping[str, Any], source: Path) -> ModelConfig:
    """Return our config of a LlamaConfig; keys that say nothing of the network are passed over.

    Absent keys have transformers' defaults, but those that differ between any two models must be
    there. Rotary settings are read in the form of transformers 5 (`rope_parameters`) and in that of
    older ones (`rope_theta`, `rope_scaling`).
    """
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    if missing := [k for k in (*sizes, "num_attention_heads") if not isinstance(found.get(k), int)]:
        raise InputError(f"{source} lacks {', '.join(missing)}; the model cannot be known")
    rope = found.get("rope_parameters") or {}
    scaling = found.get("rope_scaling") or {}
    kinds = {r.get("rope_type", r.get("type", "default")) for r in (rope, scaling)}
    refused = {
        "attention_bias": bool(found.get("attention_bias")),
        "mlp_bias": bool(found.get("mlp_bias")),
        f"hidden_act {found.get('hidden_act')}": found.get("hidden_act", "silu") != "silu",
        f"rotary scaling {', '.join(sorted(kinds))}": kinds != {"default"},
    }
    if wrong := [name for name, is_there in refused.items() if is_there]:
        raise InputError(
            f"{source} asks for {', '.join(wrong)}, which this model does not have: it is LLaMA "
            "without biases, with SwiGLU and unscaled rotary positions"
        )
    return ModelConfig(
        width=found["hidden_size"],
        layers=found["num_hidden_layers"],
        heads=found["num_attention_heads"],
        ffn=found["intermediate_size"],
        kv_heads=found.get("num_key_value_heads"),
        head_dim=found.get("head_dim"),
        vocab_size=found["vocab_size"],
        rope_theta=float(rope.get("rope_theta") or found.get("rope_theta") or 10_000.0),
        norm_eps=float(found.get("rms_norm_eps", 1e-6)),
        init_std=float(found.get("initializer_range", 0.02)),
    )


def to_llama(config: ModelConfig, reads: Reads, *, dtype: torch.dtype) -> dict[str, Any]:
    """Return the LlamaConfig of a model, with the keys of old and new transformers and of vLLM."""
    specials = reads.vocab
    kind = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.groups,
        "head_dim": config.dim,
        "hidden_act": "silu",
        "max_position_embeddings": reads.row_len,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": specials.bos if reads.layout == "bos" else None,
        "eos_token_id": None,  # the default, 2, is a code: generation would end inside an image
        "pad_token_id": specials.pad if specials.pad < config.vocab_size else None,
        "torch_dtype": kind,
        "dtype": kind,
        "use_cache": True,
    }


def hf_names(config: ModelConfig) -> dict[str, str]:
    """Return Hugging Face's name of each of our tensors, in the order of ours."""
    return {
        ours.format(i): theirs.format(i)
        for ours, theirs in NAMES.items()
        for i in (range(config.layers) if "{}" in ours else (0,))
    }


def native_config(config: ModelConfig) -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, "model": asdict(config)}


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a Hugging Face folder: safetensors, else `.bin`; one file or shards."""
    for whole, index in ((WEIGHTS, INDEX), (OLD_WEIGHTS, OLD_INDEX)):
        if (folder / whole).is_file():
            return read_tensors(folder / whole)
        if (folder / index).is_file():
            table = read_json(folder / index).get("weight_map")
            if not isinstance(table, dict) or not table:
                raise InputError(f"{folder / index} has no weight_map; copy it again")
            files = [folder / Path(name).name for name in sorted(set(table.values()))]
            if absent := [file.name for file in files if not file.is_file()]:
                raise InputError(f"{folder / index} names {', '.join(absent)}: not in the folder")
            break
    else:
        files = sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise InputError(f"{folder} has a {CONFIG} but no weights; wanted {WEIGHTS} or {INDEX}")
    state: dict[str, Tensor] = {}
    for file in files:
        state.update(read_tensors(file))
    return state
