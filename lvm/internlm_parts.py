"""The files of an InternLM checkpoint, as DeLVM's training writes them, and whole tensors of them.

A checkpoint is a folder with `model_config.pt` and a file `model_tp{T}_pp{P}.pt` for each part of
the network: tensor-parallel rank T has some heads and channels of every layer, pipeline stage P has
some layers, which it numbers from 0.

Files are read by torch's restricted loader. InternLM stores its settings as an object of a class of
its own, a dict: a plain dict is made of it, and none of InternLM's code is run or needed.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import safe_globals

from lvm.weights import UNUSED
from tokenizer.cli import InputError
from tokenizer.formats.checkpoint import globals_of, reason, some
from tokenizer.interop import read_tensors

SETTINGS = "model_config.pt"
SETTINGS_CLASS = "internlm.core.context.parallel_context.Config"  # a dict with attributes
PART = re.compile(r"model_tp(\d+)_pp(\d+)\.pt")
LAYER = re.compile(r"blocks\.(\d+)\.")
TOKENIZER = "embedding.vq_model."  # the whole VQ-GAN is stored with the model
CODEBOOK = "embedding.vq_model.quantize.embedding.weight"
PROJECTION = "embedding.embed_proj.weight"


def read_settings(path: Path) -> dict[str, Any]:
    """Return what `model_config.pt` says, none where there is no such file.

    Raises InputError where it cannot be read, asks for other classes than InternLM's dict, or says
    that the network is not one that is built here.
    """
    if not path.is_file():
        return {}
    try:
        if refused := set(globals_of(path)) - {SETTINGS_CLASS}:
            raise InputError(
                f"{path} cannot be read: it asks for {some(refused)}, which could run code. Save "
                "it again as a plain dict where you trust it, or take it away and give --heads"
            )
        with safe_globals([(dict, SETTINGS_CLASS)]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (InputError, OSError, MemoryError):
        raise
    except Exception as error:  # a broken pickle can fail at any instruction, in any way
        raise InputError(f"{path} cannot be read ({reason(error)}); copy it again") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}; wanted a dict of settings")
    wanted = {"norm_type": "rmsnorm", "use_swiglu": True, "apply_post_layer_norm": False}
    wanted |= {"num_chunks": 1}
    if faults := [
        f"{key} is {found[key]}; supported: {value}"
        for key, value in wanted.items()
        if found.get(key, value) != value
    ]:
        raise InputError(
            f"{path} describes another network than is built here: " + "; ".join(faults)
        )
    return found


def part_files(folder: Path) -> list[list[Path]]:
    """Return the files of a checkpoint, [rank][stage]; raises InputError where one is missing."""
    there = {}
    for path in folder.glob("model_tp*_pp*.pt"):
        if found := PART.fullmatch(path.name):
            there[int(found[1]), int(found[2])] = path
    if not there:
        raise InputError(
            f"{folder} is no checkpoint of InternLM; wanted model_tp0_pp0.pt and, where it was "
            "trained in parts, all the others"
        )
    ranks, stages = (1 + max(numbers) for numbers in zip(*there, strict=True))
    parts = [[(rank, stage) for stage in range(stages)] for rank in range(ranks)]
    lost = [f"model_tp{r}_pp{s}.pt" for line in parts for r, s in line if (r, s) not in there]
    if lost:
        raise InputError(
            f"{folder} lacks {some(lost)}: its files are of {ranks} tensor-parallel ranks and "
            f"{stages} pipeline stages; copy what is missing beside them"
        )
    return [[there[part] for part in line] for line in parts]


def read_ranks(folder: Path) -> list[dict[str, Tensor]]:
    """Return the tensors of each tensor-parallel rank, the layers of its stages counted through."""
    ranks: list[dict[str, Tensor]] = []
    for files in part_files(folder):
        rank: dict[str, Tensor] = {}
        first = 0
        for path in files:
            part = {}
            for name, tensor in read_tensors(path).items():
                name = name.removeprefix("model.")
                ours = name == CODEBOOK or not name.startswith(TOKENIZER)
                if ours and not name.endswith(UNUSED):
                    part[name] = tensor
            layers = {int(found[1]) for name in part if (found := LAYER.match(name))}
            if layers != set(range(len(layers))):
                raise InputError(
                    f"{path} has layers {', '.join(map(str, sorted(layers)))}; wanted them from 0 "
                    "without a gap, as each pipeline stage counts its own"
                )
            for name, tensor in part.items():
                found = LAYER.match(name)
                whole = (
                    LAYER.sub(f"blocks.{int(found[1]) + first}.", name, count=1) if found else name
                )
                if whole in rank:
                    raise InputError(
                        f"{path} holds {name}, as an earlier stage does; copy the folder again"
                    )
                rank[whole] = tensor
            first += len(layers)
        ranks.append(rank)
    return ranks


def _rows(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), 0)


def _columns(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), 1)


def _heads(parts: Sequence[Tensor]) -> Tensor:
    """Join Wqkv: of each rank the rows are (3, its heads, head_dim)."""
    return torch.cat([part.unflatten(0, (3, -1)) for part in parts], 1).flatten(0, 1)


CUT: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "mixer.Wqkv.weight": _heads,
    "mixer.Wqkv.bias": _heads,
    "mixer.out_proj.weight": _columns,
    "mlp.w1.weight": _rows,
    "mlp.w2.weight": _rows,
    "mlp.w3.weight": _columns,
    "head.weight": _rows,
}
"""How ranks share a tensor, by the end of its name; every rank has the others whole."""


def merge(ranks: Sequence[Mapping[str, Tensor]], source: Path) -> dict[str, Tensor]:
    """Return whole tensors of what tensor-parallel ranks hold; raises InputError where the parts do
    not fit each other."""
    if len(ranks) == 1:
        return dict(ranks[0])
    merged: dict[str, Tensor] = {}
    width = len(ranks[0].get("norm.weight", ()))
    for name in dict.fromkeys(name for rank in ranks for name in rank):
        parts = [rank[name] for rank in ranks if name in rank]
        join = next((how for end, how in CUT.items() if name.endswith(end)), None)
        if name == PROJECTION and len(parts[0]) * len(ranks) == width:
            join = _rows  # each rank projects to its part of the width
        # Only rank 0 has the bias that is added after the ranks have summed.
        whole = join is None and name.endswith("out_proj.bias")
        if len(parts) < len(ranks) and not whole:
            raise InputError(
                f"{source}: {name} is in the files of {len(parts)} of {len(ranks)} tensor-parallel "
                "ranks; wanted in all of them; copy the folder again"
            )
        if join is None:
            merged[name] = _same(parts, name, source)
            continue
        try:
            merged[name] = join(parts)
        except RuntimeError as error:
            shapes = ", ".join(str(list(part.shape)) for part in parts)
            raise InputError(
                f"{source}: the parts of {name} have shapes {shapes}, which do not make one "
                "tensor; are all files of one checkpoint?"
            ) from error
    return merged


def _same(parts: Sequence[Tensor], name: str, source: Path) -> Tensor:
    """Return what all ranks hold. Each updates its copy; a last bit may differ, a model may not."""
    first = parts[0]
    for other in parts[1:]:
        if other.shape != first.shape or not torch.allclose(
            other.float(), first.float(), rtol=0, atol=0.01 * float(first.abs().max())
        ):
            raise InputError(
                f"{source}: {name} is not the same in the files of all tensor-parallel ranks, "
                "which each have it whole; are all files of one checkpoint?"
            )
    return first
