"""What a visual sentence is, and how sentences fill rows.

The geometry is always (codes_per_image, row_len), from the tokenizer and the spec: a row holds
row_len / codes_per_image images. A sentence is never split over rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Sample:
    """The smallest thing that is used or dropped as a whole: an image, a pair, frames of a clip.

    `stem` names it for the split and for randomness; `keys` are its images in order.
    """

    stem: str
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sentence:
    """1 to `images_per_row` images that are read as one document; `keys` name them in order."""

    keys: tuple[str, ...]


def fill_rows(sentences: Sequence[Sentence], *, images_per_row: int) -> list[list[Sentence]]:
    """Put each sentence into the first row that has room for it.

    Sentences of 3, 2, 1 and 2 images in rows of 4:

        row 0   a a a c
        row 1   b b d d
    """
    rows: list[list[Sentence]] = []
    room: list[tuple[int, int]] = []  # (row, free images) of the rows that are not full, ascending
    for sentence in sentences:
        need = len(sentence.keys)
        assert 1 <= need <= images_per_row, f"a sentence of {need} images, rows of {images_per_row}"
        for i, (row, free) in enumerate(room):
            if free >= need:
                rows[row].append(sentence)
                if free > need:
                    room[i] = (row, free - need)
                else:
                    del room[i]
                break
        else:
            rows.append([sentence])
            if need < images_per_row:
                room.append((len(rows) - 1, images_per_row - need))
    return rows


def row_indices(
    rows: Sequence[Sequence[Sentence]], place: dict[str, int], *, images_per_row: int
) -> np.ndarray:
    """Return int64 [rows, images_per_row]: which encoded image stands where, -1 where none does."""
    table = np.full((len(rows), images_per_row), -1, np.int64)
    for row, sentences in enumerate(rows):
        found = [place[key] for sentence in sentences for key in sentence.keys]
        table[row, : len(found)] = found
    return table
