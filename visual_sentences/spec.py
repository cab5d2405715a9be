"""The mixture spec: where images are, and which kind of visual sentence they become.

seed = 0
row_len = 4096                  # default: 16 images
image_size = 256                # default: the tokenizer's; `--images` needs it

[[source]]
name = "depth"
kind = "pair"
inputs = "frames"               # a folder, relative to this file; or tars/rgb-*.tar,
targets = "depth"               # data/*.parquet, list.txt; "#" and a field behind tars or Parquet
repeat = 2                      # or weight = 0.3, the share of tokens; or neither
splits = {val = 0.02}           # by hash of the pair's name; the rest is "train"
preprocess = "squash"           # or "crop"
augment = 4                     # copies of each item: itself, and 3 random crops and flips
license = "MIT"
note = "rendered"

What else a kind takes:

image, colorize, inpaint   path
category                   path, classes = 1      classes shown in a sentence
video, orbit               path, stride = [1]     one pass over the clips for each
pair, style                inputs, targets
annotated                  path, annotations = {depth = "…", seg = "…"}
annotated_video            path, annotations, stride = [1]
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from tokenizer.cli import InputError
from visual_sentences.containers import recognise
from visual_sentences.containers.origin import Origin
from visual_sentences.toml_table import Table

Kind = Literal[
    "image",
    "category",
    "video",
    "orbit",
    "pair",
    "colorize",
    "inpaint",
    "style",
    "annotated",
    "annotated_video",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
CLIPS = ("video", "orbit", "annotated_video")  # kinds whose items are sequences of frames
IMAGES_PER_ROW = 16  # LVM's 4096 positions at 256 codes an image
TOP_KEYS = ("seed", "row_len", "image_size", "source")
MANIFEST_KEYS = ("weight", "repeat", "license", "note")  # change no byte of a shard
COMMON_KEYS = ("name", "kind", *MANIFEST_KEYS, "splits", "preprocess", "augment")
KIND_KEYS: Mapping[Kind, tuple[str, ...]] = {
    "image": ("path",),
    "category": ("path", "classes"),
    "video": ("path", "stride"),
    "orbit": ("path", "stride"),
    "pair": ("inputs", "targets"),
    "colorize": ("path",),
    "inpaint": ("path",),
    "style": ("inputs", "targets"),
    "annotated": ("path", "annotations"),
    "annotated_video": ("path", "annotations", "stride"),
}
MAIN_ROLE = {"annotated": "image", "annotated_video": "frames"}  # of `path` beside annotations
ALL_KEYS = (*COMMON_KEYS, *dict.fromkeys(key for keys in KIND_KEYS.values() for key in keys))


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One `[[source]]` of the spec: `paths` as written by role, `origins` what was found there."""

    name: str
    kind: Kind
    paths: Mapping[str, str] = field(default_factory=dict)
    origins: Mapping[str, Origin] = field(default_factory=dict)
    weight: float | None = None
    repeat: float | Literal["sqrt"] | None = None
    splits: Mapping[str, float] = field(default_factory=dict)
    preprocess: Literal["squash", "crop"] = "squash"
    stride: tuple[int, ...] = (1,)
    classes: int = 1
    augment: int = 1
    license: str = ""
    note: str = ""

    @property
    def least_images(self) -> int:
        """Places that a row must have, so that the shortest sentence of this kind fits."""
        if self.kind == "annotated":
            return len(self.paths)
        if self.kind == "annotated_video":
            return 2 * len(self.paths)
        return {"image": 1, "category": self.classes}.get(self.kind, 2)


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
        for source in self.sources:
            if source.least_images > images:
                raise InputError(
                    f'source "{source.name}" needs rows of {source.least_images} images or more, '
                    f"but row_len = {row_len} holds {images} of {codes_per_image} codes; wanted "
                    f"{source.least_images * codes_per_image} or more"
                )
        return row_len, images


def load_spec(path: Path | str) -> Spec:
    """Read a spec and find what its paths name; raises InputError for all that is not there."""
    path = Path(path)
    base = path.parent.absolute()  # for workers elsewhere
    spec = parse_spec(path)
    found, wrong = [], []
    for source in spec.sources:
        origins = {}
        for role, written in source.paths.items():
            where = f'{path}, source "{source.name}"'
            try:
                origins[role] = recognise(written, base=base, where=where, role=role)
            except InputError as error:
                wrong.append(str(error))
        found.append(replace(source, origins=origins))
    if wrong:
        raise InputError("\n  ".join(wrong))
    return replace(spec, sources=tuple(found))


def parse_spec(path: Path | str) -> Spec:
    """Read and check a spec without looking at its paths; raises InputError that names the key."""
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
    kind: Kind = table.choice("kind", KINDS, required=True)
    table.refuse_unknown((*COMMON_KEYS, *KIND_KEYS[kind]), elsewhere=ALL_KEYS, kind=kind)
    if "weight" in entry and "repeat" in entry:
        raise InputError(
            f"{table.where} has both weight (share of tokens) and repeat (passes an epoch); "
            "keep one of them"
        )
    return Source(
        name=name,
        kind=kind,
        paths=_paths(table, kind),
        weight=table.number("weight"),
        repeat=table.repeat("repeat"),
        splits=table.splits("splits"),
        preprocess=table.choice("preprocess", ("squash", "crop")) or "squash",
        stride=table.strides("stride"),
        classes=table.integer("classes", least=1) or 1,
        augment=table.integer("augment", least=1) or 1,
        license=table.text("license"),
        note=table.text("note"),
    )


def _paths(table: Table, kind: Kind) -> dict[str, str]:
    """Return the paths as written, by role."""
    if "annotations" not in KIND_KEYS[kind]:
        roles = [key for key in KIND_KEYS[kind] if key in ("path", "inputs", "targets")]
        return {role: table.text(role, required=True) for role in roles}
    main = MAIN_ROLE[kind]
    return {main: table.text("path", required=True)} | table.texts("annotations", besides=main)
