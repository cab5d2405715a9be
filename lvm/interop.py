"""Model folders: ours, Hugging Face's LLaMA (LVM), Qwen3 and InternLM (DeLVM), InternLM's own
checkpoints (`lvm.internlm`), and runs of `lvm.train`.

What a folder is stands in its `config.json`: ours has "format": "lvm", a run has "recipe", Hugging
Face's has "model_type"; InternLM's own have none. `lvm.json` beside it says what the model reads; a
folder without one is LVM's release (layout none, 8192 codes), or DeLVM's where it is of InternLM.
What a foreign config says of `eos_token_id` is not even read: the default of transformers is 2,
which is an ordinary code. Nothing is ever unpickled: `.bin` and `.pt` files are read by torch's
restricted loader.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lvm import weights
from lvm.config import ModelConfig, Reads
from lvm.model import Transformer, on_meta
from tokenizer.cli import InputError
from tokenizer.interop import check_tensors

FORMAT, VERSION = "lvm", 1
CONFIG = "config.json"
FOREIGN = ("llama", "qwen3", "internlm")  # model_type of Hugging Face: qwen3 has QK-norm
WANTED = (
    "a run of lvm.train, a folder of lvm.export, a LLaMA, Qwen3 or InternLM of Hugging Face "
    "(model_type llama, qwen3 or internlm), or InternLM's own (model_tp0_pp0.pt)"
)

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
QK_NORM = {
    "layers.{}.attn.q_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
    "layers.{}.attn.k_norm.weight": "model.layers.{}.self_attn.k_norm.weight",
}
BIASES = {
    f"layers.{{}}.attn.{part}.bias": f"model.layers.{{}}.self_attn.{part}_proj.bias"
    for part in "qkvo"
}
"""Our tensor names and Hugging Face's; shapes and the order of rows are the same in both."""


def load(path: Path | str, *, dtype: torch.dtype | None = None) -> Transformer:
    """Read the model in a folder of a known kind onto the CPU, in eval mode, `reads` set.

    Weights become `dtype`, or fp32. Raises InputError where the folder is of no known kind, asks
    for what is not built here, or holds other tensors than its config says.
    """
    folder = Path(path)
    if is_internlm(folder):
        from lvm import internlm  # imports this module

        return internlm.load(folder, dtype=dtype)
    found = read_json(folder / CONFIG)
    source = folder / CONFIG
    foreign = found.get("model_type") in FOREIGN
    if found.get("patches"):
        raise InputError(
            f"{folder} is a model of pixels, which has no codes to draw or to score; wanted a "
            "model of codes. `lvm.load` opens it, and `python -m lvm.probe` measures it"
        )
    if "recipe" in found:
        from lvm.checkpoint import load_model_state  # a heavy import, and runs alone need it

        config = model_config(found.get("model"), source)
        state = load_model_state(folder)
    elif found.get("format") == FORMAT:
        if found.get("version") != VERSION:
            raise InputError(
                f"{source} has version {found.get('version')}; this code reads {VERSION}: update "
                "the code, or export the model again"
            )
        config = model_config(found.get("model"), source)
        state = weights.read(folder)
    elif foreign:
        config = from_hf(found, source)
        state = weights.read(folder)
        if found.get("tie_word_embeddings") and NAMES["embed.weight"] in state:
            state[NAMES["head.weight"]] = state[NAMES["embed.weight"]].clone()
    else:
        kind = found.get("model_type") or found.get("_class_name") or found.get("format")
        raise InputError(f"{source} describes {kind or 'no known kind of model'}; wanted {WANTED}")
    model = on_meta(config)
    names = hf_names(config) if foreign else {k: k for k in model.state_dict()}
    check_tensors(state, {names[k]: v for k, v in model.state_dict().items()}, folder)
    fill(model, {ours: state.pop(names[ours]) for ours in names}, dtype=dtype)
    rows = found.get("max_position_embeddings")
    released = delvm_reads(config, row_len=rows) if found.get("model_type") == "internlm" else None
    model.reads = read_reads(folder, config, released=released)
    return model.eval()


def is_internlm(folder: Path) -> bool:
    """Say whether a folder is a checkpoint of InternLM, as DeLVM's training writes them."""
    return not (folder / CONFIG).exists() and any(folder.glob("model_tp*_pp*.pt"))


def delvm_reads(config: ModelConfig, *, row_len: Any = None) -> Reads:
    """Return what DeLVM's models read: bare codes, 256 an image, sentences apart in a row."""
    rows = row_len if isinstance(row_len, int) and row_len > 0 else 2048
    return Reads(layout="none", codes=config.vocab_size, codes_per_image=256, row_len=rows)


def fill(model: Transformer, state: dict[str, Tensor], *, dtype: torch.dtype | None = None) -> None:
    """Give a model the tensors of `state` as `dtype`, or fp32; empties `state`.

    A tensor is let go when it is converted, so that there are never two copies of a model.
    """
    kept = {name: state.pop(name).to(dtype or torch.float32) for name in list(state)}
    model.load_state_dict(kept, assign=True)


def read_reads(folder: Path, config: ModelConfig, *, released: Reads | None = None) -> Reads:
    """Return what a model of `folder` reads; refuses codes or specials that its table lacks.

    `released` is what it reads where there is no lvm.json, if that is not as LVM's release does.
    """
    if released is not None and not (folder / "lvm.json").is_file():
        return released
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
            f"{path.parent} is no model folder: it has no {path.name}; wanted {WANTED}"
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


def from_hf(found: Mapping[str, Any], source: Path) -> ModelConfig:
    """Return our config of a LlamaConfig, Qwen3Config or InternLMConfig, as a mapping; keys that
    say nothing of the network are passed over.

    Absent keys have transformers' defaults, but those that differ between any two models must be
    there. Rotary settings are read in the form of transformers 5 (`rope_parameters`) and in that of
    older ones (`rope_theta`, `rope_scaling`). Raises InputError that names each key that asks for
    what is not built here, its value, and what is.
    """
    qwen3 = found["model_type"] == "qwen3"
    needed = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
    needed += ["num_attention_heads"]
    needed += ["num_key_value_heads", "head_dim"] if qwen3 else []
    if missing := [key for key in needed if not isinstance(found.get(key), int)]:
        raise InputError(f"{source} lacks {', '.join(missing)}; the model cannot be known")
    check_supported(found, source)
    rope = found.get("rope_parameters") or {}
    theta = rope.get("rope_theta") or found.get("rope_theta")
    biased = found.get("attention_bias", False)
    if found["model_type"] == "internlm":
        theta = (found.get("rotary") or {}).get("base") or theta
        biased = found.get("bias", True)
    return ModelConfig(
        width=found["hidden_size"],
        layers=found["num_hidden_layers"],
        heads=found["num_attention_heads"],
        ffn=found["intermediate_size"],
        kv_heads=found.get("num_key_value_heads"),
        head_dim=found.get("head_dim"),
        vocab_size=found["vocab_size"],
        rope_theta=float(theta or 10_000.0),
        norm_eps=float(found.get("rms_norm_eps", 1e-6)),
        init_std=float(found.get("initializer_range", 0.02)),
        qk_norm=qwen3,
        attn_bias=bool(biased),
    )


def check_supported(found: Mapping[str, Any], source: Path) -> None:
    """Refuse what a Hugging Face config asks for and this model does not have."""
    faults = [
        f"{key} is {found[key]}; supported: {value}"
        for key, value in (("mlp_bias", False), ("hidden_act", "silu"))
        if (found.get(key) or value) != value
    ]
    if found["model_type"] == "internlm":  # dynamic differs only past max_position_embeddings
        rotary = found.get("rotary") or {}
        if not isinstance(rotary, dict) or rotary.get("type", "origin") not in (
            "origin",
            "dynamic",
        ):
            faults.append(f"rotary is {json.dumps(rotary)}; supported: type origin or dynamic")
    for key in ("rope_parameters", "rope_scaling"):
        rope = found.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
            faults.append(f"{key} is {json.dumps(rope)}; supported: null or rope_type default")
    if found["model_type"] == "qwen3":  # transformers' LLaMA passes over these
        if found.get("use_sliding_window"):
            faults.append("use_sliding_window is True; supported: False")
        if odd := sorted(set(found.get("layer_types") or ()) - {"full_attention"}):
            faults.append(f"layer_types has {', '.join(odd)}; supported: full_attention")
    if faults:
        raise InputError(
            f"{source} describes another network than is built here: " + "; ".join(faults)
        )


def to_hf(config: ModelConfig, reads: Reads, *, dtype: torch.dtype) -> dict[str, Any]:
    """Return the config.json of a model: of LlamaForCausalLM, or Qwen3ForCausalLM with QK-norm."""
    found = to_llama(config, reads, dtype=dtype)
    if config.qk_norm:
        found.pop("mlp_bias")
        found |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
        found |= {"use_sliding_window": False, "sliding_window": None}
        found |= {"max_window_layers": config.layers}
    return found


def to_llama(config: ModelConfig, reads: Reads, *, dtype: torch.dtype) -> dict[str, Any]:
    """Return the LlamaConfig of a model, with the keys of old and new transformers and of vLLM.

    QK-norm, which LLaMA has not, is left out; `to_hf` chooses by it.
    """
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
        "attention_bias": config.attn_bias,
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
    table = NAMES | (QK_NORM if config.qk_norm else {}) | (BIASES if config.attn_bias else {})
    return {ours: table[form].format(i) for ours, form, i in expand(table, config)}


def folded(
    config: ModelConfig, state: Mapping[str, Tensor]
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return config and tensors of the same network with a plain table [V, D] as its embedding.

    A codebook [V, E] times its projection, computed in fp32; others come back as they are.
    """
    plain = dict(state)
    if not config.codebook_dim:
        return config, plain
    codebook, proj = plain.pop("embed.codebook"), plain.pop("embed.proj.weight")
    table = codebook.float() @ proj.float().T
    return replace(config, codebook_dim=0), {"embed.weight": table, **plain}


def expand(table: Mapping[str, str], config: ModelConfig) -> Iterator[tuple[str, str, int]]:
    """Go through our tensor names: each with its entry of the table and the layer it is of."""
    for form in table:
        for i in range(config.layers) if "{}" in form else (0,):
            yield form.format(i), form, i


def native_config(config: ModelConfig) -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, "model": asdict(config)}
