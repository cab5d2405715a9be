"""Look at what a build made: its sentences as pictures, on one page and as contact sheets.

The page shows some rows of each source, of one shard, or the rows that training sees one after
another. It is a single file that needs no network, with a filter by source, kind and name; beneath
each picture is what it was made from, and a click says where it stands.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import tyro

from tokenizer.cli import InputError, Progress, run
from tokenizer.files import atomic_write
from tokenizer.images import encode_image, grid
from visual_sentences.manifest import Manifest
from visual_sentences.mixture import Mixture
from visual_sentences.page import Place, RowOfPictures, Shown, write_page
from visual_sentences.pictures import Decoded, of_codes, of_images
from visual_sentences.sampler import permute
from visual_sentences.seeds import seeded

if TYPE_CHECKING:
    from tokenizer.protocol import Tokenizer

EMPTY = 240  # light grey: a place of a contact sheet that holds no image
SIDE_BY_SIDE = 16  # pictures of a contact sheet's line, where rows hold one


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Show visual sentences as pictures, on a page that needs no other file.

    Beside it a contact sheet for each source.
    """

    data: Annotated[Path, tyro.conf.Positional]
    """Folder that `python -m visual_sentences.build` made, or one shard file in it."""
    tokenizer: Path | None = None
    """Folder of the tokenizer it was built with; shards of images need none."""
    out: Path | None = None
    """The page; by default view.html in the data folder."""
    rows: int = 8
    """Rows of each source, chosen by the seed; with --mixture, rows in all."""
    split: str = "train"
    """Which split to look at; of a shard file, its own."""
    mixture: bool = False
    """Show rows in the order in which training with the same --seed reads them."""
    mix: dict[str, float] | None = None
    """With --mixture, weights by source as lvm.train takes them: --mix depth 0.7 clips 0.3."""
    first: int = 0
    """With --mixture, the sample to begin with: finished steps × rows of a batch."""
    seed: int = 0
    """Another seed shows other rows."""


def main(command: View) -> None:
    page = view(command)
    print(f"{page} shows the sentences; contact sheets are beside it")


def view(command: View) -> Path:
    """Write the page and the sheets; returns the page."""
    if command.rows < 1 or command.first < 0:
        raise InputError("wanted --rows of 1 or more, and --first of 0 or more")
    if not command.mixture and (command.first or command.mix is not None):
        raise InputError("--first and --mix are of the training's order; give --mixture too")
    shard = command.data if command.data.is_file() else None
    folder = command.data.parent if shard else command.data
    manifest = Manifest.load(folder)
    tok = _tokenizer(command.tokenizer, manifest, folder)
    split = _split(manifest, shard) if shard else command.split
    if not any(manifest.rows(split).values()):
        raise InputError(
            f'there are no rows of split "{split}"; wanted one of '
            f"{', '.join(manifest.splits) or 'none: the data is empty'}"
        )
    page = command.out or folder / "view.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    if command.mixture:
        if shard:
            raise InputError(f"--mixture is of a whole build; give the folder {folder}")
        groups = {"mixture": _mixed(manifest, split, command)}
    else:
        groups = _some_of_each(manifest, split, shard, command)
    rows = []
    total = sum(map(len, groups.values()))
    with Progress("read", total=total, unit="rows") as progress:
        for name, places in groups.items():
            pixels = []
            for place, decoded in zip(places, _decoded(folder, manifest, places, tok), strict=True):
                rows.append(_row(place, decoded, manifest))
                pixels.append(decoded.pixels)
                progress.update()
            with atomic_write(page.with_name(f"{page.stem}-{name}.png")) as file:
                file.write(encode_image(_sheet(pixels, width=manifest.images_per_row)))
    write_page(page, rows, manifest=manifest, title=command.data.resolve().name, split=split)
    return page


def _tokenizer(path: Path | None, manifest: Manifest, folder: Path) -> "Tokenizer | None":
    if manifest.form == "images":
        return None
    if path is None:
        raise InputError(f"{folder} holds codes; give the --tokenizer that it was built with")
    import tokenizer

    tok = tokenizer.load(path)
    if manifest.tokenizer and tok.id != manifest.tokenizer:
        raise InputError(
            f"{folder} was built with tokenizer {manifest.tokenizer[:12]}…, but "
            f"{path} holds {tok.id[:12]}…: its codes would show something else"
        )
    seen = (tok.codebook_size, tok.codes_per_image)
    if seen != (manifest.codebook_size, manifest.codes_per_image):
        raise InputError(
            f"{folder} has images of {manifest.codes_per_image} codes out of "
            f"{manifest.codebook_size}; the tokenizer in {path} makes {seen[1]} out of {seen[0]}"
        )
    return tok


def _split(manifest: Manifest, shard: Path) -> str:
    for entry in manifest.shards:
        if entry.name == shard.name:
            return entry.split
    raise InputError(f"{shard} is no shard of the manifest beside it")


def _some_of_each(
    manifest: Manifest, split: str, shard: Path | None, command: View
) -> dict[str, list[Place]]:
    """Choose rows by the seed, in the order of the shards."""
    groups = {}
    for number, source in enumerate(manifest.sources):
        entries = manifest.shards_of(source.name, split)
        first = 0
        if shard:
            names = [entry.name for entry in entries]
            if shard.name not in names:
                continue
            at = names.index(shard.name)
            first = sum(entry.rows for entry in entries[:at])
            entries = [entries[at]]
        count = sum(entry.rows for entry in entries)
        if count:
            shown = np.arange(min(command.rows, count))
            chosen = permute(shown, count, seeded(command.seed, "view", source.name))
            groups[source.name] = [
                _place(manifest, split, number, first + int(row)) for row in np.sort(chosen)
            ]
    return groups


def _mixed(manifest: Manifest, split: str, command: View) -> list[Place]:
    mixture = Mixture.of(manifest, split=split, seed=command.seed, mix=command.mix)
    samples = command.first + np.arange(command.rows)
    return [
        _place(manifest, split, int(source), int(row), sample=int(sample))
        for sample, source, row in zip(samples, *mixture.rows(samples), strict=True)
    ]


def _place(
    manifest: Manifest, split: str, source: int, row: int, *, sample: int | None = None
) -> Place:
    """Find the shard of row `row` of a source."""
    left = row
    for entry in manifest.shards_of(manifest.sources[source].name, split):
        if left < entry.rows:
            return Place(source=source, split=split, row=row, shard=entry, at=left, sample=sample)
        left -= entry.rows
    raise AssertionError(f"row {row} of source {source} is beyond its shards")


def _decoded(
    folder: Path, manifest: Manifest, places: Sequence[Place], tok: "Tokenizer | None"
) -> Iterator[Decoded]:
    if tok is None:
        return of_images(folder, manifest, places)
    return of_codes(folder, manifest, places, tok)


def _row(place: Place, decoded: Decoded, manifest: Manifest) -> RowOfPictures:
    source = manifest.sources[place.source]
    label = "" if decoded.label < 0 else str(decoded.label)
    if source.classes and label:
        label = source.classes[decoded.label]
    keys, files = iter(decoded.keys), iter(decoded.files)
    return RowOfPictures(
        place=place,
        source=source,
        label=label,
        sentences=[
            [Shown.of(next(keys), next(files)) for _ in range(count)] for count in decoded.counts
        ],
    )


def _sheet(rows: Sequence[np.ndarray], *, width: int) -> np.ndarray:
    """Lay out rows of pictures, each uint8 [images, H, W, 3], with grey in the places left over.

    `width` 0 is that of the longest row; rows of one picture are laid side by side.
    """
    width = width or max(map(len, rows))
    if width == 1:
        return grid(np.concatenate(rows), columns=min(len(rows), SIDE_BY_SIDE))
    filled = np.full((len(rows), width, *rows[0].shape[1:]), EMPTY, np.uint8)
    for row, pixels in zip(filled, rows, strict=True):
        row[: len(pixels)] = pixels
    return grid(filled.reshape(-1, *filled.shape[2:]), columns=width)


if __name__ == "__main__":
    run(View, main, prog="python -m visual_sentences.view")
