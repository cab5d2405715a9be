"""Load a model of either kind: of codes (`lvm.model`) or of pixels (`lvm.vision`)."""

import json
from pathlib import Path
from typing import Any

import torch

from lvm import apple, interop, weights
from lvm.config import Patches
from lvm.model import Transformer
from lvm.vision import VisionModel
from tokenizer.cli import InputError
from tokenizer.interop import check_tensors

AIMV2 = ("aimv2", "aimv2_vision_model")  # model_type of Apple's folders and of transformers


def load(path: Path | str, *, dtype: torch.dtype | None = None) -> Transformer | VisionModel:
    """Read the model of a run, an export, a released folder or an Apple file; see each reader.

    Returns it on the CPU in eval mode, fp32 or of `dtype`. Raises InputError where it is none.
    """
    path = Path(path)
    if path.is_file() or is_vision(path):
        return load_vision(path, dtype=dtype)
    return interop.load(path, dtype=dtype)


def is_vision(folder: Path) -> bool:
    """Say whether the config of a folder is of a model that reads pixels."""
    try:
        found = json.loads((folder / interop.CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return not (folder / interop.CONFIG).exists() and (folder / weights.WEIGHTS).is_file()
    if not isinstance(found, dict):
        return False
    return bool(found.get("patches")) or found.get("model_type") in AIMV2


def load_vision(path: Path, *, dtype: torch.dtype | None = None) -> VisionModel:
    """Read a model of pixels: a run of AIM, its export, or Apple's AIM and AIMv2.

    Raises InputError where it is none of these, or holds other tensors than its config says.
    """
    if path.is_file() or "patches" not in (found := _config(path)):
        return apple.build(apple.read(path), path, dtype=dtype)
    config = interop.model_config(found.get("model"), path / interop.CONFIG)
    try:
        patches = Patches.from_json(found["patches"])
    except (TypeError, AttributeError) as error:
        raise InputError(f"{path / interop.CONFIG} describes no patches: {error}") from error
    if "recipe" in found:
        from lvm.checkpoint import load_model_state  # a heavy import, and runs alone need it

        state = load_model_state(path)
    else:
        state = weights.read(path)
    with torch.device("meta"):
        model = VisionModel(config, patches)
    check_tensors(state, dict(model.state_dict()), path)
    kept = {name: state.pop(name).to(dtype or torch.float32) for name in list(state)}
    model.load_state_dict(kept, assign=True)
    return model.eval()


def _config(folder: Path) -> dict[str, Any]:
    config = folder / interop.CONFIG
    return interop.read_json(config) if config.exists() else {}
