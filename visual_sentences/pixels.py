"""Pictures to pixels: found in their parts, read in the order in which they are stored, decoded.

One thread reads; `threads` of them decode, resize and paint some batches ahead of the encoder. What
comes out, and in which order, does not depend on how many there are.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokenizer.images import BadImage, fit, open_image
from visual_sentences.containers import frame_count, frame_name, is_clip, read
from visual_sentences.containers.names import frame_of
from visual_sentences.containers.origin import Part
from visual_sentences.edits import cut_of, paint
from visual_sentences.sentence import Item, Picture
from visual_sentences.sources import Parts, role_of
from visual_sentences.spec import Source

AHEAD = 32  # files that are decoded ahead by each thread
Raw = Path | bytes | np.ndarray | BadImage


@dataclass(frozen=True, slots=True)
class Decoded:
    """A picture as uint8 [S, S, 3], or as what the caller made of it; the shape it had before."""

    picture: Picture
    value: Any
    shape: tuple[int, int] = (0, 0)


@dataclass(slots=True)
class Files:
    """Where the files of a unit are. `order` has the place of each name, where that is known."""

    source: Source
    listed: Parts | None = None  # of a folder or list: one part a role
    parts: dict[str, Part] = field(default_factory=dict)  # of tars and Parquet files: by name
    order: dict[str, int] = field(default_factory=dict)

    def part(self, name: str) -> tuple[Part, str]:
        """Return the part that holds a name, and the name in it."""
        role, inner = role_of(self.source, name)
        part = self.listed[role] if self.listed is not None else self.parts[base_name(name)]
        return part, inner

    def there(self, name: str) -> bool:
        """Say whether the file of a name, in a folder or list, can be found."""
        part, inner = self.part(name)
        found = next(iter(read(part, [inner])))[1]
        return isinstance(found, Path) and found.exists()

    def expand(self, item: Item) -> Item:
        """Return a clip with the names of its frames; raises BadImage where a video has none."""
        if not is_clip(item.names[0]):
            return item
        count = min(frame_count(*self.part(name)) for name in item.names)
        names = (frame_name(name, i) for name in item.names for i in range(count))
        return Item(item.stem, tuple(names), item.group)

    def stored(self, pictures: Iterable[Picture]) -> list[Picture]:
        """Sort by place in storage, frames of video by number."""
        pictures = list(pictures)
        order = dict(self.order)
        for picture in pictures:
            order.setdefault(base_name(picture.name), len(order))
        return sorted(pictures, key=lambda p: (order[base_name(p.name)], p.name, p.edit))


def base_name(name: str) -> str:
    """Return the file of a name: of a frame of video the file of video."""
    found = frame_of(name)
    return found[0] if found else name


def decode(
    files: Files,
    pictures: Iterable[Picture],
    *,
    size: int,
    threads: int,
    finish: Callable[[np.ndarray], Any] = lambda pixels: pixels,
) -> Iterator[Decoded]:
    """Yield every picture once, in stored order; `value` is a BadImage where it cannot be had.

    `finish` turns pixels into something else in the thread that decoded them.
    """
    preprocess = files.source.preprocess

    def one(raw: Raw, wanted: Sequence[Picture]) -> list[Decoded]:
        if isinstance(raw, BadImage):
            return [Decoded(picture, raw) for picture in wanted]
        opened: dict[int, Image.Image] = {}
        made = []
        try:
            for picture in wanted:
                box, flip = cut_of(picture.edit)
                # A part of an image is enlarged: it must not be read at a scale that fits the
                # whole. The whole must be, whatever parts are wanted beside it.
                scale = 1 if box is None else 2
                if scale not in opened:
                    opened[scale] = open_image(raw, size=scale * size)
                image = opened[scale]
                pixels = fit(image, size=size, preprocess=preprocess, box=box, flip=flip)
                value = finish(paint(pixels, picture.edit))
                made.append(Decoded(picture, value, (image.width, image.height)))
            return made
        except BadImage as error:
            return [Decoded(picture, error) for picture in wanted]

    jobs = _raw(files, pictures)
    if threads <= 1:
        for raw, wanted in jobs:
            yield from one(raw, wanted)
        return
    with ThreadPoolExecutor(threads) as pool:  # Pillow decodes and resizes outside the GIL
        running: deque[Future[list[Decoded]]] = deque()
        for raw, wanted in jobs:
            running.append(pool.submit(one, raw, wanted))
            if len(running) >= AHEAD * threads:
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()


def _raw(files: Files, pictures: Iterable[Picture]) -> Iterator[tuple[Raw, list[Picture]]]:
    """Read each file or frame once, with all the pictures that are made of it."""
    wanted = {name: list(same) for name, same in groupby(files.stored(pictures), lambda p: p.name)}
    for part, names in groupby(wanted, lambda name: files.part(name)[0]):
        full: Mapping[str, str] = {files.part(name)[1]: name for name in names}
        for inner, raw in read(part, list(full)):
            yield raw, wanted[full[inner]]
