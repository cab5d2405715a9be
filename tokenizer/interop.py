"""Tokenizers in and out: ours, and those of muse, diffusers, taming-transformers and LlamaGen.

    tok = tokenizer.load("vqvae")                        # a folder
    tok = tokenizer.load("vq_ds16_c2i.pt")               # or a single file
    tok = tokenizer.load("net.pt", family="taming")      # where tensors alone do not tell

Ours is `config.json` ({"format": "vqgan", "version": 1, …fields of VQGANConfig}) beside
`model.safetensors`, always fp32. The others are in `tokenizer.formats`. A `config.json` in the
folder, or beside the file, decides what a checkpoint is and its shape; without one the tensors do.
Nothing is ever unpickled: pickles are read by torch's restricted loader.
"""

import difflib
import json
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors.torch import save as serialize
from torch import Tensor

from tokenizer.cli import InputError
from tokenizer.config import VQGANConfig
from tokenizer.files import atomic_write
from tokenizer.formats import diffusers, llamagen, muse, taming
from tokenizer.formats.checkpoint import SUFFIXES, plain_table, read_checkpoint, read_tensors, some
from tokenizer.formats.shapes import (
    SIGNED,
    UNIT,
    build_config,
    build_model,
    check_tensors,
    infer_config,
    own_names,
)
from tokenizer.vqgan import VQGAN

__all__ = ["Family", "check_tensors", "load", "read", "read_tensors", "save"]

Family = Literal["ours", "muse", "diffusers", "taming", "llamagen"]
FORMAT, VERSION = "vqgan", 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
PIPELINE = "model_index.json"  # of a diffusers pipeline
FILES: dict[str, tuple[str, ...]] = {
    "ours": (WEIGHTS,),
    "muse": muse.WEIGHTS,
    "diffusers": diffusers.WEIGHTS,
}


def load(path: Path | str, *, family: Family | None = None) -> VQGAN:
    """Read a tokenizer folder or file; returns the model on the CPU, fp32, in eval mode.

    `family` is needed only where tensors alone do not tell it: muse and taming name theirs alike
    but feed pixels in [0, 1] and [-1, 1]. Raises InputError where nothing is there, or it is
    damaged, of no known family, or does not hold what its config says.
    """
    return read(path, family=family)[1]


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


def read(path: Path | str, *, family: Family | None = None) -> tuple[Family, VQGAN]:
    """Read a tokenizer as `load` does; returns of which family it was, too."""
    path = Path(path)
    if family not in (None, *get_args(Family)):
        raise InputError(f"family {family!r}: wanted one of {', '.join(get_args(Family))}")
    if not path.exists():
        raise InputError(f"no tokenizer folder or file at {path}")
    config_file = (path if path.is_dir() else path.parent) / CONFIG
    raw = read_config(config_file) if config_file.is_file() else {}
    described = described_family(raw, config_file, strict=path.is_dir())
    if family and described and family != described:
        raise InputError(f"{config_file} is of {described}, not of {family}; leave the family out")
    weights = find_weights(path, described) if path.is_dir() else path
    content = read_checkpoint(weights)
    state = tensors_in(content, weights)
    found = family or described or family_of_tensors(content, state, weights)
    return found, model_of(found, content, state, raw if described else None, weights)


def model_of(
    family: Family,
    content: dict[str, Any],
    state: dict[str, Tensor],
    raw: dict[str, Any] | None,
    weights: Path,
) -> VQGAN:
    """Return the network of a checkpoint; its shape is that of the config `raw` if there is one."""
    names, source = own_names, weights.with_name(CONFIG)
    infer = partial(infer_config, source=weights)
    if raw is None and family in ("ours", "diffusers"):
        raise InputError(
            f"{weights} has no {CONFIG} of {family} beside it; put it there, for the tensors do "
            "not tell how pixels are scaled"
        )
    match family:
        case "ours":
            config = own_config(raw or {}, source)
        case "diffusers":
            names, state = diffusers.names, diffusers.read_tensors(state)
            config = diffusers.read_config(raw or {}, source)
        case "muse" if raw is not None:
            config = muse.read_config(raw, source)
        case "muse":
            config = infer(state, names, pixel_range=UNIT)
        case "taming":
            state, size = taming.read_tensors(state, weights), taming.image_size(content)
            config = infer(state, names, image_size=size, pixel_range=SIGNED)
        case "llamagen":
            names, state = llamagen.names, llamagen.read_tensors(state)
            config = infer(state, names, pixel_range=SIGNED, normalize_codes=True)
    told_by = f"its {CONFIG}" if raw else "the network that its encoder tells"
    return build_model(config, state, names, source=weights, told_by=told_by)


def read_config(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON ({error}); copy it again from its source") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path} holds a {type(raw).__name__}; wanted an object with the fields")
    return raw


def described_family(raw: dict[str, Any], source: Path, *, strict: bool) -> Family | None:
    """Return the family that a config states; None where it states none, or another if not strict.

    A config beside a single file may belong to something else; one in a folder describes it.
    """
    kind = raw.get("_class_name") or raw.get("format") or raw.get("model_type")
    known: dict[object, Family] = {
        muse.CLASS: "muse",
        diffusers.CLASS: "diffusers",
        FORMAT: "ours",
    }
    if strict and kind and kind not in known:
        raise InputError(
            f"{source} is of {kind}; wanted a tokenizer of ours (format {FORMAT}), of muse "
            f"(_class_name {muse.CLASS}) or of diffusers (_class_name {diffusers.CLASS})"
        )
    return known.get(kind)


def find_weights(folder: Path, family: Family | None) -> Path:
    """Return the file of a folder that holds the tensors."""
    if family in FILES:
        names = FILES[family]
        found = [folder / name for name in names if (folder / name).is_file()]
        if not found:
            raise InputError(f"{folder} has a {CONFIG} but no weights; wanted {' or '.join(names)}")
        return found[0]
    if (folder / PIPELINE).is_file():
        raise InputError(
            f"{folder} is a whole diffusers pipeline; name the folder of its VQModel, often vqvae"
        )
    files = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file())
    usual = [p for p in files if p.name in (taming.WEIGHTS, "last.ckpt")]
    if len(usual or files) != 1:
        seen = f"has {some([p.name for p in files])}" if files else "holds no checkpoint"
        raise InputError(
            f"{folder} is no tokenizer folder: it has no {CONFIG} and {seen}; name the file"
        )
    return (usual or files)[0]


def tensors_in(content: Any, source: Path) -> dict[str, Tensor]:
    """Return the table of tensors in a checkpoint: the whole, or one entry of a larger one."""
    for key in ("state_dict", "model"):  # of Lightning, of LlamaGen
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            return plain_table(content[key], source)
    return plain_table(content, source)


def family_of_tensors(content: dict[str, Any], state: dict[str, Tensor], source: Path) -> Family:
    """Return the family that the names of tensors tell; raises InputError where they do not."""

    def has(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in state)

    if has("encoder.down_blocks."):
        return "diffusers"
    if has("encoder.conv_blocks."):
        return "llamagen"
    if "state_dict" in content or has(*taming.DROPPED, taming.GUMBEL):
        return "taming"
    if has("encoder.down."):
        raise InputError(
            f"{source} has no {CONFIG} beside it, and its tensors are named alike by muse (pixels "
            "in [0, 1]), taming ([-1, 1]) and ours. Put its config there, or name the family: "
            'load(…, family="muse"), or --from muse of tokenizer.convert'
        )
    raise InputError(f"{source} holds no VQ-GAN of a known family; its tensors: {some(set(state))}")


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
