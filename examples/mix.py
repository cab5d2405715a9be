"""Write the mixture spec of the demo: rendered folders -> sources of visual sentences."""

import json
import os
from pathlib import Path
from typing import Literal

from tokenizer.cli import InputError
from tokenizer.files import atomic_write

SHARES = {"pair": 0.80, "video": 0.15, "image": 0.05}  # of the tokens, all sources of a kind
LICENSES = {
    "vizdoom": "BSD-3-Clause",  # Freedoom's artwork
    "photographs": "public domain or CC0, see examples/NOTICE.md",
}


def write_mix(
    rendered: Path,
    out: Path,
    *,
    split: Literal["train", "heldout"],
    row_len: int,
    image_size: int,
    seed: int = 0,
) -> Path:
    """Write a spec for one half of a rendering to the file `out`; return `out`.

    One `pair` source a task, all of equal weight; the walks as `video`, in steps of one frame and
    of two; the photographs as single images. Kinds whose folders are not there leave their share
    to the others.
    """
    summary = rendered / "render.json"
    if not summary.is_file():
        raise InputError(f"{summary} is missing; render first: python -m examples.render --out DIR")
    info = json.loads(summary.read_text(encoding="utf-8"))
    half = rendered / split
    license = LICENSES[info["options"]["source"]]
    sources: list[dict[str, object]] = [
        {
            "name": task["name"],
            "kind": "pair",
            "inputs": half / task["inputs"],
            "targets": half / task["targets"],
            "license": license,
            "note": task["about"],
        }
        for task in info["tasks"]
    ]
    sources.append(
        {"name": "walk", "kind": "video", "path": half / "rgb", "stride": [1, 2]}
        | {"license": license, "note": "frames in time order"}
    )
    sources.append(
        {"name": "photo", "kind": "image", "path": half / "photos"}
        | {"license": LICENSES["photographs"], "note": "crops of photographs"}
    )
    sources = [s for s in sources if all(p.is_dir() for p in s.values() if isinstance(p, Path))]
    kinds = [source["kind"] for source in sources]
    whole = sum(share for kind, share in SHARES.items() if kind in kinds)
    for source in sources:
        kind = str(source["kind"])
        source["weight"] = round(SHARES[kind] / whole / kinds.count(kind), 6)
    lines = [f"seed = {seed}", f"row_len = {row_len}", f"image_size = {image_size}"]
    for source in sources:
        lines += ["", "[[source]]"]
        lines += [f"{key} = {_toml(value, out.parent)}" for key, value in source.items()]
    with atomic_write(out, "w") as file:
        file.write("\n".join(lines) + "\n")
    return out


def _toml(value: object, base: Path) -> str:
    """Write a number, a list of numbers, a text or a path (relative to the spec's folder)."""
    if isinstance(value, Path):
        value = Path(os.path.relpath(value, base)).as_posix()
    return json.dumps(value, ensure_ascii=False)  # these values look the same in TOML and JSON
