"""The page of `view`: rows of pictures in one HTML file without anything beside it."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tokenizer.files import atomic_write
from visual_sentences.edits import picture_of
from visual_sentences.manifest import Manifest, ShardEntry, SourceEntry

SMALLEST, LARGEST = 96, 160  # sides of a picture on the page, in CSS pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a row is: row `row` of its source in `split`, row `at` of its shard."""

    source: int
    split: str
    row: int
    shard: ShardEntry
    at: int
    sample: int | None = None  # of the training's order


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One picture: the file it was made from, what was done to it, and itself as a data URI."""

    key: str
    name: str
    edit: str
    uri: str

    @classmethod
    def of(cls, key: str, file: bytes) -> Self:
        kind = "png" if file.startswith(b"\x89PNG") else "jpeg"
        uri = f"data:image/{kind};base64,{base64.b64encode(file).decode()}"
        picture = picture_of(key)
        return cls(key=key, name=picture.name, edit=picture.edit, uri=uri)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOfPictures:
    place: Place
    source: SourceEntry
    label: str  # name of its class; "" where it has none
    sentences: Sequence[Sequence[Shown]]


def write_page(
    path: Path, rows: Sequence[RowOfPictures], *, manifest: Manifest, title: str, split: str
) -> None:
    """Write `rows` in their order to the file `path`, whole or not at all."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = list(dict.fromkeys(row.place.source for row in rows))
    sources = [manifest.sources[number] for number in shown]
    side = min(max(manifest.image_size, SMALLEST), LARGEST)
    page = environment.get_template("view.html.j2").stream(
        rows=rows,
        manifest=manifest,
        title=title,
        split=split,
        sources=sources,
        counts=manifest.rows(split),
        kinds=list(dict.fromkeys(source.kind for source in sources)),
        side=side,
    )
    with atomic_write(path, "w") as file:
        page.dump(file)
