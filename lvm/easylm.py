"""Open weights of EasyLM, the JAX code that LVM was trained with, and write them as a model folder.

    python -m lvm.easylm state.npz --heads 32 --out LVM_7b

EasyLM turns neighbouring channels (2i, 2i+1) of a head; we turn i and i + C/2, as Hugging Face
does. Moving the rows of the q and k matrices makes the same network: a head's q and k move alike,
so that their product does not change. v and o stay. Its kernels are stored [in, out], transposed to
ours.

Read is a flat table of arrays, `.safetensors` or `.npz`, under EasyLM's names joined by "." or "/",
with or without "params" before them. EasyLM's own streamed checkpoints are flax's msgpack, which is
not read here; docs/interop.md shows how to save them as a table.
"""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from lvm import interop
from lvm.config import ModelConfig
from lvm.export import DTYPES, SHARD_GB, check_out, shard_bytes, write
from lvm.model import Transformer, on_meta
from tokenizer.cli import InputError, run
from tokenizer.interop import check_tensors, read_tensors

NAMES = {
    "embed.weight": "transformer.wte.embedding",
    "layers.{}.attn_norm.weight": "transformer.h.{}.attention_norm.kernel",
    "layers.{}.attn.q.weight": "transformer.h.{}.attention.wq.kernel",
    "layers.{}.attn.k.weight": "transformer.h.{}.attention.wk.kernel",
    "layers.{}.attn.v.weight": "transformer.h.{}.attention.wv.kernel",
    "layers.{}.attn.o.weight": "transformer.h.{}.attention.wo.kernel",
    "layers.{}.mlp_norm.weight": "transformer.h.{}.ffn_norm.kernel",
    "layers.{}.mlp.gate.weight": "transformer.h.{}.feed_forward.w1.kernel",
    "layers.{}.mlp.up.weight": "transformer.h.{}.feed_forward.w3.kernel",
    "layers.{}.mlp.down.weight": "transformer.h.{}.feed_forward.w2.kernel",
    "norm.weight": "transformer.ln_f.kernel",
    "head.weight": "lm_head.kernel",
}
"""Our tensor names and EasyLM's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Convert:
    """Write EasyLM's weights as a Hugging Face LLaMA folder, or in this project's own format."""

    state: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STATE")]
    """Flat table of arrays, .safetensors or .npz. An lvm.json beside it says what the model reads;
    without one it is LVM's release: no specials, 8192 codes."""
    heads: int
    """Query heads, which the tensors do not tell. LVM's: 100m 10, 300m 8, 600m 16, 1b 16, 3b 32, 7b
    32, 13b 40."""
    out: Path
    """Folder to write: new, empty, or an earlier export, which is replaced."""
    format: Literal["hf", "native"] = "hf"
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the stored weights."""
    shard_gb: float = SHARD_GB
    """Weights above this many GB (10^9 bytes) are split into numbered files and an index."""


def from_interleaved(weight: Tensor, *, heads: int) -> Tensor:
    """Return rows [heads·C, …] of EasyLM's q or k, moved from neighbouring pairs to halves."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def to_interleaved(weight: Tensor, *, heads: int) -> Tensor:
    """Return rows [heads·C, …] of our q or k, moved from halves to neighbouring pairs."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def easylm_names(config: ModelConfig) -> dict[str, str]:
    """Return EasyLM's name of each of our tensors, in the order of ours."""
    return {ours: NAMES[form].format(i) for ours, form, i in interop.expand(NAMES, config)}


def load(path: Path | str, *, heads: int, dtype: torch.dtype | None = None) -> Transformer:
    """Read EasyLM's weights from a table of arrays; the model is on the CPU, in eval mode.

    `heads` is the number of query heads. Weights become `dtype`, or fp32. Raises InputError where
    the file is none, or does not hold one whole LLaMA of so many heads.
    """
    path = Path(path)
    state = read_state(path)
    config = config_of(state, heads=heads, source=path)
    model, theirs = on_meta(config), easylm_names(config)
    wanted = {theirs[k]: _turned(k, v) for k, v in model.state_dict().items()}
    check_tensors(state, wanted, path, told_by=f"a LLaMA of EasyLM with {heads} heads")
    ours = {}
    for name, there in theirs.items():
        tensor = _turned(name, state.pop(there)).to(dtype or torch.float32)
        if name.endswith(("attn.q.weight", "attn.k.weight")):
            tensor = from_interleaved(tensor, heads=tensor.shape[0] // config.dim)
        ours[name] = tensor.contiguous()
    interop.fill(model, ours, dtype=dtype)
    model.reads = interop.read_reads(path.parent, config)
    return model.eval()


def _turned(name: str, tensor: Tensor) -> Tensor:
    """Return a matrix as the other side stores it; the embedding and norms are alike in both."""
    return tensor.T if tensor.ndim == 2 and name != "embed.weight" else tensor


def config_of(state: Mapping[str, Tensor], *, heads: int, source: Path) -> ModelConfig:
    """Return the shape that the tensors tell, for `heads` query heads."""
    embed, q, k, gate = (
        state.get(NAMES[name].format(0))
        for name in (
            "embed.weight",
            "layers.{}.attn.q.weight",
            "layers.{}.attn.k.weight",
            "layers.{}.mlp.gate.weight",
        )
    )
    if any(t is None or t.ndim != 2 for t in (embed, q, k, gate)):
        raise InputError(
            f"{source} holds no LLaMA of EasyLM: wanted matrices named {NAMES['embed.weight']}, "
            "transformer.h.0.attention.wq.kernel and so on (docs/interop.md lists them)"
        )
    assert embed is not None and q is not None and k is not None and gate is not None
    if heads < 1 or q.shape[1] % heads or k.shape[1] % (q.shape[1] // heads):
        raise InputError(
            f"--heads {heads}: the queries of {source} have {q.shape[1]} channels and the keys "
            f"{k.shape[1]}, which do not divide into so many heads; LVM's models have 8 to 40"
        )
    dim = q.shape[1] // heads
    blocks = [name.split(".")[2] for name in state if name.startswith("transformer.h.")]
    return ModelConfig(
        width=embed.shape[1],
        layers=1 + max(int(i) for i in blocks if i.isdecimal()),
        heads=heads,
        ffn=gate.shape[1],
        kv_heads=k.shape[1] // dim,
        head_dim=dim,
        vocab_size=embed.shape[0],
    )


def read_state(path: Path) -> dict[str, Tensor]:
    """Return a table of arrays by EasyLM's names, joined by dots, without "params" before them."""
    if not path.is_file():
        raise InputError(f"no file at {path}; wanted a .safetensors or .npz of EasyLM's arrays")
    if path.suffix == ".npz":
        table = read_npz(path)
    elif path.suffix == ".safetensors":
        table = read_tensors(path)
    else:
        raise InputError(
            f"{path} is neither .safetensors nor .npz; save EasyLM's checkpoint as one of them "
            "(docs/interop.md shows how)"
        )
    plain: dict[str, Tensor] = {}
    for name, tensor in table.items():
        parts = name.replace("/", ".").split(".")
        while parts[0] == "params":
            parts = parts[1:]
        plain[".".join(parts)] = tensor
    if len(plain) != len(table):
        raise InputError(f"{path} holds arrays whose names differ in nothing but their prefix")
    return plain


def read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found: dict[str, Any] = {name: arrays[name] for name in arrays.files}
        return {name: torch.from_numpy(array) for name, array in found.items()}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} cannot be read as a table of plain arrays ({error}); save it again"
        ) from error


def main(command: Convert) -> None:
    check_out(command.out)
    limit, dtype = shard_bytes(command.shard_gb), DTYPES[command.dtype]
    model = load(command.state, heads=command.heads, dtype=dtype)
    files = write(model, command.out, format=command.format, dtype=dtype, shard_bytes=limit)
    size = sum(f.stat().st_size for f in files)
    print(f"{command.out}: {len(files)} files, {size / 1e6:.1f} MB, {command.format}")


if __name__ == "__main__":
    run(Convert, main, prog="python -m lvm.easylm")
