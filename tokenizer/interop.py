"""Tokenizer folders in and out: ours, and openMUSE's as LVM and DeLVM released theirs.

Ours is `config.json` ({"format": "vqgan", "version": 1, …fields of VQGANConfig}) beside
`model.safetensors`, always fp32. A muse folder is `config.json` with `_class_name` VQGANModel
beside `pytorch_model.safetensors` or `pytorch_model.bin`; its tensors carry the names of ours.
Nothing is ever unpickled: `.bin` files are read by torch's restricted loader.
"""

import difflib
import json
import pickle
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from tokenizer.cli import InputError
from tokenizer.config import VQGANConfig
from tokenizer.files import atomic_write
from tokenizer.vqgan import VQGAN

FORMAT, VERSION = "vqgan", 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
MUSE_CLASS = "VQGANModel"
MUSE_WEIGHTS = ("pytorch_model.safetensors", "pytorch_model.bin")
# Names in a muse config of the fields of ours that have the same meaning.
MUSE_NAMES = {
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


def load(path: Path | str) -> VQGAN:
    """Read a tokenizer folder of a known format; returns the model on the CPU, fp32, in eval mode.

    Raises InputError where the folder is none, is damaged, or does not hold what its config says.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"no tokenizer folder at {folder}")
    raw = read_config(folder / CONFIG)
    names: tuple[str, ...]
    if raw.get("_class_name") == MUSE_CLASS:
        config, names = muse_config(raw, folder / CONFIG), MUSE_WEIGHTS
    elif raw.get("format") == FORMAT:
        config, names = own_config(raw, folder / CONFIG), (WEIGHTS,)
    else:
        kind = raw.get("_class_name") or raw.get("format") or raw.get("model_type")
        raise InputError(
            f"{folder / CONFIG} is of {kind or 'no known kind'}; wanted one of ours "
            f'("format": "{FORMAT}") or of muse ("_class_name": "{MUSE_CLASS}")'
        )
    weights = next((folder / n for n in names if (folder / n).is_file()), None)
    if weights is None:
        raise InputError(f"{folder} has a {CONFIG} but no weights; wanted {' or '.join(names)}")
    with torch.device("meta"):
        model = VQGAN(config)
    state = read_tensors(weights)
    check_tensors(state, model.state_dict(), weights)
    model.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
    return model.eval()


def save(model: VQGAN, folder: Path | str) -> None:
    """Write `model` to `folder`, made if need be; a crash leaves each file whole, old or new."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / CONFIG, "w") as file:
        config = {"format": FORMAT, "version": VERSION, **asdict(model.config)}
        json.dump(config, file, indent=2)
        file.write("\n")
    with atomic_write(folder / WEIGHTS) as file:
        file.write(serialize(dict(model.tensors()), metadata={"id": model.id}))


def read_config(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path.parent} is no tokenizer folder: it has no {path.name}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON ({error}); copy it again from its source") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path} holds a {type(raw).__name__}; wanted an object with the fields")
    return raw


def own_config(raw: dict[str, Any], source: Path) -> VQGANConfig:
    """Return the config of one of our files; a field it does not know is refused, not dropped."""
    if raw.get("version") != VERSION:
        raise InputError(
            f"{source} is of version {raw.get('version')}; this code reads version {VERSION}. "
            "Update the code, or save the tokenizer again with it"
        )
    known = [f.name for f in fields(VQGANConfig)]
    values = {k: v for k, v in raw.items() if k not in ("format", "version")}
    for name in values.keys() - set(known):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"{source} has an unknown field {name!r}{hint}")
    return build_config(values, source)


def muse_config(raw: dict[str, Any], source: Path) -> VQGANConfig:
    """Return our config of a muse one; fields that say nothing of the network are passed over.

    A missing field is refused: the defaults of muse's class are those of another network than the
    one that was released.
    """
    wanted = [*MUSE_NAMES.values(), "no_attn_mid_block"]
    if missing := [name for name in wanted if name not in raw]:
        raise InputError(f"{source} lacks {', '.join(missing)}; the network cannot be known")
    if not raw.get("resample_with_conv", True):
        raise InputError(f"{source} has resample_with_conv false; only true is supported")
    config = build_config(
        {ours: raw[theirs] for ours, theirs in MUSE_NAMES.items()}
        | {"mid_attention": not raw["no_attn_mid_block"]},
        source,
    )
    if config.res_blocks == 1 and any(map(config.has_attention, range(len(config.widths)))):
        # muse skips the attention of a level that has a single one; nobody released such weights.
        raise InputError(
            f"{source} has attention levels with one residual block each, where muse leaves the "
            "encoder's attention out; its codes cannot be reproduced"
        )
    return config


def build_config(values: dict[str, Any], source: Path) -> VQGANConfig:
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return VQGANConfig(**values)
    except (InputError, TypeError) as error:
        raise InputError(f"{source} describes no network: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} cannot be read ({reason}); copy it again") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path} holds no plain table of tensors")
    return state


def check_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor], source: Path) -> None:
    """Raise InputError that names what is missing, unexpected or of another shape."""
    faults = []
    if missing := wanted.keys() - found.keys():
        faults.append(f"missing: {some(missing)}")
    if unexpected := found.keys() - wanted.keys():
        faults.append(f"unexpected: {some(unexpected)}")
    shapes = [
        f"{name} {list(found[name].shape)}, wanted {list(wanted[name].shape)}"
        for name in wanted.keys() & found.keys()
        if found[name].shape != wanted[name].shape
    ]
    if shapes:
        faults.append(f"of another shape: {some(shapes)}")
    if faults:
        raise InputError(f"{source} does not fit its {CONFIG}; tensors " + "; ".join(faults))


def some(names: Iterable[str], limit: int = 5) -> str:
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
