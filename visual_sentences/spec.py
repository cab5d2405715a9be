"""The mixture spec: which folders become which kind of visual sentence.

seed = 0
row_len = 4096                  # default: 16 images
image_size = 256                # default: the tokenizer's

[[source]]
name = "depth"
kind = "pair"
inputs = "frames"               # relative to this file
targets = "depth"
repeat = 2                      # or weight = 0.3, the share of tokens; or neither
splits = {val = 0.02}           # by hash of the pair's name; the rest is "train"
preprocess = "squash"           # or "crop"
license = "MIT"
note = "rendered"
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tokenizer.cli import InputError
from visual_sentences.toml_table import Table

Kind = Literal["image", "pair", "video"]
IMAGES_PER_ROW = 16  # LVM's 4096 positions at 256 codes an image
KINDS = ("image", "pair", "video")
LATER = ("category", "orbit", "colorize", "inpaint", "style", "annotated", "annotated_video")
TOP_KEYS = ("seed", "row_len", "image_size", "source")
COMMON_KEYS = ("name", "kind", "weight", "repeat", "splits", "preprocess", "license", "note")
KIND_KEYS = {"image": ("path",), "pair": ("inputs", "targets"), "video": ("path", "stride")}
ALL_KEYS = (*COMMON_KEYS, *dict.fromkeys(key for keys in KIND_KEYS.values() for key in keys))


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One `[[source]]` of the spec. `folders` has the role of each folder and where it is."""

    name: str
    kind: Kind
    folders: Mapping[str, Path]
    weight: float | None = None
    repeat: float | Literal["sqrt"] | None = None
    splits: Mapping[str, float] = field(default_factory=dict)
    preprocess: Literal["squash", "crop"] = "squash"
    stride: tuple[int, ...] = (1,)
    license: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """A whole spec; `raw` is the file's content as it was written, for comparisons."""

    seed: int
    row_len: int | None
    image_size: int | None
    sources: tuple[Source, ...]
    raw: Mapping[str, Any]

    def geometry(self, *, codes_per_image: int, image_size: int, tokenizer: str) -> tuple[int, int]:
        """Return (row_len, images_per_row) for a tokenizer, or say why it does not fit."""
        if self.image_size not in (None, image_size):
            raise InputError(
                f"the spec has image_size = {self.image_size}, but the tokenizer in {tokenizer} "
                f"reads {image_size} px; change the spec or choose a tokenizer of that size"
            )
        row_len = self.row_len or IMAGES_PER_ROW * codes_per_image
        images, rest = divmod(row_len, codes_per_image)
        if rest or not images:
            near = sorted({max(1, images) * codes_per_image, (images + 1) * codes_per_image})
            raise InputError(
                f"row_len = {row_len} does not hold whole images: the tokenizer in {tokenizer} "
                f"makes {codes_per_image} codes an image; wanted a multiple, such as "
                f"{' or '.join(map(str, near))}"
            )
        short = [s.name for s in self.sources if s.kind != "image"] if images < 2 else []
        if short:
            raise InputError(
                f'source "{short[0]}" needs rows of two images or more, but row_len = {row_len} '
                f"holds one image of {codes_per_image} codes; wanted {2 * codes_per_image} or more"
            )
        return row_len, images


def load_spec(path: Path | str) -> Spec:
    """Read and check a spec; raises InputError that names the key and what was wanted."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no spec file {path}")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML: {error}") from error
    table = Table(raw, where=str(path))
    table.refuse_unknown(TOP_KEYS)
    entries = raw.get("source")
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path} has no source; wanted at least one [[source]] table")
    sources = tuple(_source(entry, path, number) for number, entry in enumerate(entries, 1))
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f'{path}: two sources are called "{name}"; give each its own name')
    weights = [source.weight for source in sources if source.weight is not None]
    if len(weights) < len(sources) and sum(weights) >= 1:
        raise InputError(
            f"{path}: the weights add up to {sum(weights):g}, which leaves nothing for the sources "
            "without one; wanted a sum below 1, or a weight on every source"
        )
    return Spec(
        seed=table.integer("seed", least=0) or 0,
        row_len=table.integer("row_len", least=1),
        image_size=table.integer("image_size", least=1),
        sources=sources,
        raw=raw,
    )


def _source(entry: Any, path: Path, number: int) -> Source:
    where = f"{path}, source {number}"
    if not isinstance(entry, dict):
        raise InputError(f"{where} is {entry!r}; wanted a table: write [[source]]")
    table = Table(entry, where=where)
    name = table.text("name", required=True)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.]*(-[A-Za-z0-9_.]+)*", name):
        raise InputError(
            f'{where}: the name "{name}" becomes part of file names; wanted letters, digits, '
            '"_", "." and single "-"'
        )
    table = Table(entry, where=f'{path}, source "{name}"')
    kind = table.choice("kind", KINDS, later=LATER, required=True)
    if "augment" in entry:
        raise InputError(f"{table.where}: augment is not available yet; take it out")
    table.refuse_unknown((*COMMON_KEYS, *KIND_KEYS[kind]), elsewhere=ALL_KEYS, kind=kind)
    roles = [key for key in KIND_KEYS[kind] if key != "stride"]
    if "weight" in entry and "repeat" in entry:
        raise InputError(
            f"{table.where} has both weight (share of tokens) and repeat (passes an epoch); "
            "keep one of them"
        )
    return Source(
        name=name,
        kind=kind,
        folders={role: table.folder(role, base=path.parent) for role in roles},
        weight=table.number("weight"),
        repeat=table.repeat("repeat"),
        splits=table.splits("splits"),
        preprocess=table.choice("preprocess", ("squash", "crop")) or "squash",
        stride=table.strides("stride"),
        license=table.text("license"),
        note=table.text("note"),
    )
