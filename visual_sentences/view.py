"""Look at what a build made: sentences decoded back to pictures, on one page and as sheets."""

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import jinja2
import numpy as np
import torch
import tyro

import tokenizer
from tokenizer.cli import InputError, Progress, run
from tokenizer.files import atomic_write
from tokenizer.images import encode_image, grid
from visual_sentences.loader import Reader
from visual_sentences.manifest import Manifest, SourceEntry
from visual_sentences.pack import Rows
from visual_sentences.sampler import key_of, permute

if TYPE_CHECKING:
    from tokenizer.protocol import Tokenizer

CHUNK = 64  # images decoded at once
SHOWN = 96  # pixels below which an image is enlarged on the page

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Visual sentences: {{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 100rem; padding: 0 1rem }
h2 { margin: 2rem 0 0 } p { margin: .2rem 0 .6rem; color: #555 }
.row { display: flex; flex-wrap: wrap; gap: .5rem; margin: .5rem 0 }
figure { margin: 0; border: 1px solid #bbb; border-radius: 4px; overflow: hidden }
figure img { display: block; max-width: 100%; image-rendering: pixelated }
</style>
<h1>Visual sentences: {{ title }}</h1>
<p>{{ manifest.images_per_row }} images of {{ manifest.codes_per_image }} codes a row, split
"{{ split }}", tokenizer {{ manifest.tokenizer[:12] }}. A frame is one sentence, a line is one row;
hold the pointer over a frame to read the names of its images.</p>
{% for part in parts %}
<h2>{{ part.source.name }}</h2>
<p>{{ part.source.kind }} · {{ part.count }} rows · {{ part.source.good }} of
{{ part.source.inputs }} files used
{%- for reason, count in part.source.bad.items() %} · {{ reason }} {{ count }}{% endfor %}
{%- if part.source.license %} · {{ part.source.license }}{% endif %}
{%- if part.source.note %} · {{ part.source.note }}{% endif %}</p>
{% for row in part.rows %}
<div class="row">
{%- for strip in row %}
<figure title="{{ strip.keys | join(' · ') }}"><img alt="{{ strip.keys | length }} images"
src="data:image/png;base64,{{ strip.png }}"></figure>
{%- endfor %}
</div>
{%- endfor %}
{%- endfor %}
</html>
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Decode a few visual sentences of each source back to pictures.

    Writes one HTML page that needs no other file, and beside it a contact sheet for each source.
    """

    data: Annotated[Path, tyro.conf.Positional]
    """Folder that `python -m visual_sentences.build` made."""
    tokenizer: Path
    """Folder of the tokenizer it was built with."""
    out: Path | None = None
    """The page; by default view.html in the data folder."""
    rows: int = 8
    """Rows of each source, chosen by the seed."""
    split: str = "train"
    """Which split to look at."""
    seed: int = 0
    """Another seed shows other rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """One sentence: its images side by side as a base64 PNG, and their names."""

    png: str
    keys: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    source: SourceEntry
    count: int
    rows: Sequence[Sequence[Strip]]


def main(command: View) -> None:
    page = view(command)
    print(f"{page} shows the sentences; contact sheets are beside it")


def view(command: View) -> Path:
    """Write the page and the sheets; returns the page."""
    manifest = Manifest.load(command.data)
    tok = tokenizer.load(command.tokenizer)
    if tok.id != manifest.tokenizer:
        raise InputError(
            f"{command.data} was built with tokenizer {manifest.tokenizer[:12]}…, but "
            f"{command.tokenizer} holds {tok.id[:12]}…: its codes would show something else"
        )
    if command.rows < 1:
        raise InputError(f"--rows {command.rows}: wanted 1 or more")
    counts = manifest.rows(command.split)
    if not any(counts.values()):
        raise InputError(
            f'there are no rows of split "{command.split}"; wanted one of '
            f"{', '.join(manifest.splits) or 'none: the data is empty'}"
        )
    page = command.out or command.data / "view.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    reader = Reader(command.data, manifest, split=command.split, random=False)
    parts = []
    total = sum(min(command.rows, count) for count in counts.values())
    with Progress("decode", total=total, unit="rows") as progress:
        for number, source in enumerate(manifest.sources):
            count = counts[source.name]
            shown = np.arange(min(command.rows, count))
            if not count:
                continue
            key = key_of(command.seed, "view", source.name)
            chosen = np.sort(permute(shown, count, key))
            rows = reader.read(np.full(len(chosen), number), chosen)
            images = decode_rows(rows, tok, codes_per_image=manifest.codes_per_image)
            keys = [reader.keys(number, int(row)) for row in chosen]
            strips = [list(_strips(*row)) for row in zip(images, _bounds(rows), keys, strict=True)]
            parts.append(Part(source=source, count=count, rows=strips))
            sheet = grid(images.reshape(-1, *images.shape[2:]), columns=manifest.images_per_row)
            with atomic_write(page.with_name(f"{page.stem}-{source.name}.png")) as file:
                file.write(encode_image(sheet))
            progress.update(len(chosen))
    template = jinja2.Environment(autoescape=True).from_string(PAGE)
    with atomic_write(page, "w") as file:
        file.write(
            template.render(
                title=command.data.resolve().name,
                manifest=manifest,
                split=command.split,
                parts=parts,
            )
        )
    return page


def decode_rows(rows: Rows, tok: "Tokenizer", *, codes_per_image: int) -> np.ndarray:
    """Return uint8 [rows, images, H, W, 3]; places that hold no image are light grey."""
    codes = rows.tokens.long().reshape(-1, codes_per_image)
    pixels = torch.cat([tok.decode(chunk) for chunk in codes.split(CHUNK)])
    images = pixels.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    images = images.reshape(rows.rows, -1, *images.shape[1:]).copy()
    place = np.arange(images.shape[1]) * codes_per_image
    images[place[None, :] >= rows.length.numpy()[:, None]] = 240
    return images


def _bounds(rows: Rows) -> list[list[tuple[int, int]]]:
    """Return [start, end) of each row's documents, in codes."""
    bounds = []
    for starts, length in zip(rows.starts.tolist(), rows.length.tolist(), strict=True):
        edges = [start for start in starts if start >= 0] + [length]
        bounds.append(list(pairwise(edges)))
    return bounds


def _strips(
    images: np.ndarray, bounds: Sequence[tuple[int, int]], keys: Sequence[str]
) -> Iterator[Strip]:
    codes = bounds[-1][1] // len(keys)
    for start, end in bounds:
        chosen = slice(start // codes, end // codes)
        scale = max(1, -(-SHOWN // images.shape[1]))
        strip = grid(images[chosen], columns=(end - start) // codes, scale=scale)
        png = base64.b64encode(encode_image(strip)).decode()
        yield Strip(png=png, keys=keys[chosen])


if __name__ == "__main__":
    run(View, main, prog="python -m visual_sentences.view")
