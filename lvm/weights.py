"""The weight files of a model folder, in the layout that transformers and vLLM read and write.

    model.safetensors                                           or, above a size,
    model-00001-of-00003.safetensors, … and model.safetensors.index.json, which says what is where

Files are mapped, not read: memory is taken by what the caller makes of a tensor. They are written a
tensor at a time, converted on the way; safetensors' own `save_file` wants all of a file converted
first, a second copy of it. Older `pytorch_model*.bin` files are read too, by torch's restricted
loader.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizer.cli import InputError
from tokenizer.formats.checkpoint import some
from tokenizer.interop import read_tensors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
OLD_WEIGHTS, OLD_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
UNUSED = "rotary_emb.inv_freq"  # a buffer of old transformers, which the config says too


def read(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a model folder by the names in its files: safetensors, else `.bin`.

    Raises InputError where there are none, a shard is absent, damaged or outside the folder, or
    index and shards do not agree.
    """
    for whole, index in ((WEIGHTS, INDEX), (OLD_WEIGHTS, OLD_INDEX)):
        if (folder / whole).is_file():
            return used(read_tensors(folder / whole))
        if (folder / index).is_file():
            return read_shards(folder / index)
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("pytorch_model*.bin")):
        part = used(read_tensors(file))
        if twice := state.keys() & part.keys():
            raise InputError(f"{file} holds {some(twice)}, as another file of the folder does")
        state |= part
    if not state:
        raise InputError(f"{folder} holds no weights; wanted {WEIGHTS} or {INDEX} and its shards")
    return state


def read_shards(index: Path) -> dict[str, Tensor]:
    """Return the tensors of all shards that an index names; the two must agree on every tensor."""
    table = index_table(index)
    files = sorted(set(table.values()))
    if absent := [name for name in files if not (index.parent / name).is_file()]:
        raise InputError(
            f"{index} names {some(absent)}: not in the folder; copy what is missing beside it"
        )
    state: dict[str, Tensor] = {}
    for name in files:
        part = used(read_tensors(index.parent / name))
        wanted = {tensor for tensor, file in table.items() if file == name}
        if lost := wanted - part.keys():
            raise InputError(
                f"{index.parent / name} lacks {some(lost)}, which {index.name} says it holds; copy "
                "the folder again"
            )
        if surplus := part.keys() - wanted:
            raise InputError(
                f"{index.parent / name} holds {some(surplus)}, which {index.name} does not place "
                "there; copy the folder again, into an empty one"
            )
        state |= part
    return state


def index_table(index: Path) -> dict[str, str]:
    """Return file name by tensor name of an index; refuses names that lead out of its folder."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{index} is not JSON ({error}); copy it again from its source") from error
    table = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(table, dict) or not table:
        raise InputError(f"{index} has no weight_map; copy it again")
    for name in table.values():
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name:
            raise InputError(
                f"{index} names the file {name!r}; wanted a name in its own folder: the shards lie "
                "beside the index"
            )
    return {tensor: file for tensor, file in table.items() if not tensor.endswith(UNUSED)}


def used(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.endswith(UNUSED)}


def write(folder: Path, state: Mapping[str, Tensor], *, dtype: torch.dtype, limit: int) -> None:
    """Write tensors as one safetensors file, or as numbered ones of at most `limit` bytes of data.

    A tensor larger than `limit` gets a file of its own.
    """
    parts: list[list[str]] = [[]]
    filled = total = 0
    for name, tensor in state.items():
        size = tensor.numel() * dtype.itemsize
        if parts[-1] and filled + size > limit:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
        total += size
    table: dict[str, str] = {}
    for i, names in enumerate(parts, 1):
        file = WEIGHTS if len(parts) == 1 else f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        write_file(folder / file, {name: state[name] for name in names}, dtype=dtype)
        table.update(dict.fromkeys(names, file))
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": table}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(path: Path, state: Mapping[str, Tensor], *, dtype: torch.dtype) -> None:
    """Write one safetensors file: the header's length, the header as JSON, then the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name, tensor in state.items():
        begin, end = end, end + tensor.numel() * dtype.itemsize
        shape, place = list(tensor.shape), [begin, end]
        header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": place}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8, as the format advises
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in state.values():
            plain = tensor.detach().to("cpu", dtype).contiguous()
            file.write(plain.view(-1).view(torch.uint8).numpy().data)
