"""From what is found to what a model reads: items, samples of pictures, sentences, rows.

    Item      what a source holds: an image, a pair, a clip        by listing
    Sample    its pictures in one pass, drawn by seed              used or dropped as a whole
    Sentence  pictures that are read as one document               by the layout of the kind
    row       sentences, first fit

The geometry is always (codes_per_image, row_len), from the tokenizer and the spec: a row holds
row_len / codes_per_image images. A sentence is never split over rows.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

EDIT = "|"  # stands in a key between the name of a file and what was done to its pixels


@dataclass(frozen=True, slots=True)
class Picture:
    """One image that is encoded: where its pixels come from, and what is done to them.

    name  "3/17.jpg", "depth/0001.png" (the role in front where a source has several),
          "0017.tar/0001.jpg", "walk.mp4#000123"
    edit  "" or words that `edits` reads: "crop 0.1 0.2 0.7 0.7 flip", "gray", "hole 12 40 88"
    """

    name: str
    edit: str = ""

    @property
    def key(self) -> str:
        """How the shard names it: all that is needed to make it again."""
        return f"{self.name}{EDIT}{self.edit}" if self.edit else self.name


@dataclass(frozen=True, slots=True)
class Item:
    """The smallest thing that a source holds as a whole.

    `stem` names it for the split and for all randomness; `names` are its files, of a clip all
    frames or the one file of video, role by role where there are several roles; `group` is its
    class or style.
    """

    stem: str
    names: tuple[str, ...]
    group: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """The pictures of an item in one pass: `number` counts its passes, from 0.

    `width` pictures belong together wherever they stand: 2 for frames with one annotation each.
    `form` is what a kind with several layouts draws this pass for.
    """

    stem: str
    pictures: tuple[Picture, ...]
    group: str = ""
    number: int = 0
    width: int = 1
    form: str = ""


@dataclass(frozen=True, slots=True)
class Sentence:
    """1 to `images_per_row` pictures that are read as one document."""

    pictures: tuple[Picture, ...]


def fill_rows(sentences: Sequence[Sentence], *, images_per_row: int) -> list[list[Sentence]]:
    """Put each sentence into the first row that has room for it.

    Sentences of 3, 2, 1 and 2 images in rows of 4:

        row 0   a a a c
        row 1   b b d d
    """
    rows: list[list[Sentence]] = []
    free: list[list[int]] = [[] for _ in range(images_per_row + 1)]  # rows by room left, as heaps
    for sentence in sentences:
        need = len(sentence.pictures)
        assert 1 <= need <= images_per_row, f"a sentence of {need} images, rows of {images_per_row}"
        with_room = [
            (free[left][0], left) for left in range(need, images_per_row + 1) if free[left]
        ]
        if with_room:
            row, left = min(with_room)
            heapq.heappop(free[left])
            rows[row].append(sentence)
        else:
            row, left = len(rows), images_per_row
            rows.append([sentence])
        if left > need:
            heapq.heappush(free[left - need], row)
    return rows


def row_indices(
    rows: Sequence[Sequence[Sentence]], place: Mapping[Picture, int], *, images_per_row: int
) -> np.ndarray:
    """Return int64 [rows, images_per_row]: which encoded image stands where, -1 where none does."""
    table = np.full((len(rows), images_per_row), -1, np.int64)
    for row, sentences in enumerate(rows):
        found = [place[picture] for sentence in sentences for picture in sentence.pictures]
        table[row, : len(found)] = found
    return table
