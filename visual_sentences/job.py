"""What all units of a build share, whoever runs them."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

from tokenizer.cli import InputError
from tokenizer.precision import Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Geometry, encoder and place of a build. Of form "images" it has no tokenizer.

    `precision` is never auto, which other machines may resolve otherwise. No byte depends on
    `device` of equal kind, nor on `threads`, with which a worker decodes ahead.
    """

    form: Literal["codes", "images"]
    tokenizer: str  # folder
    tokenizer_id: str
    codebook_size: int
    codes_per_image: int
    image_size: int
    images_per_row: int
    seed: int
    batch: int
    device: str
    precision: Precision
    out: str
    exclude: str = ""  # file of names and stems that are not used
    exclude_id: str = ""
    threads: int = 1
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)  # of each source, by label


def exclude_id(path: Path | None) -> str:
    """Return what tells the contents of an exclude file from others; "" where there is none."""
    return "" if path is None else hashlib.sha256(_content(path)).hexdigest()[:16]


@lru_cache(2)
def excluded_names(path: str, id: str) -> frozenset[str]:
    """Return the names and stems that a file lists, one a line; `id` tells its versions apart."""
    if not path:
        return frozenset()
    lines = _content(Path(path)).decode("utf-8", "replace").splitlines()
    return frozenset(line.strip() for line in lines)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"--exclude {path} cannot be read ({error.strerror}); wanted a text file with one name "
            "or stem a line, as the shards' keys have them"
        ) from error
