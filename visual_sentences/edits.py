"""The words of an edit: what was done to an image before it was encoded, as its key tells it.

    crop L T W H   this box of it alone: left, top, width, height in parts of the whole image
    flip           left and right exchanged
    gray           without colour
    hole X Y SIDE  a black square, in pixels of the resized image
    patches HEX    black but for some squares of an 8 × 8 grid

First the cut, then one of the other three, such as "crop 0.1 0 0.8 0.75 flip gray". The image is
cut, resized, then painted, so that a hole has a size of its own whatever the crop was. The same
words on the same file give the same pixels for ever: a key is enough to make its picture again.
"""

import re

import numpy as np

from visual_sentences.seeds import seeded
from visual_sentences.sentence import EDIT, Picture

HOLE_RATE = 0.3  # of the masks are one hole, the others patches; as LVM has it
GRID = 8  # patches a side: 32 px of LVM's 256
GRAY = (2989, 5870, 1140)  # ten-thousandths of red, green and blue, as LVM has them

AREA = (0.35, 1.0)  # of the image that a cut keeps
RATIO = (3 / 4, 4 / 3)  # of a cut's width to its height, as parts of the image's own
STEPS = 10_000  # a box is written with four decimals

_PART = r"(?:0|1|0\.\d{1,4})"
_FORM = re.compile(
    rf"(?:crop (?P<box>(?:{_PART} ){{4}}))?"
    r"(?P<flip>flip )?"
    r"(?:(?P<gray>gray )|hole (?P<hole>(?:\d+ ){3})|patches (?P<patches>[0-9a-f]{16}) )?"
)


def picture_of(key: str) -> Picture:
    """Split the key of a shard into the name and the edit.

    A name may itself have a "|" in it. It ends in a suffix or a number, which no edit does:

        "3/17.jpg|flip gray"  → "3/17.jpg",  "flip gray"
        "one|flip.jpg"        → "one|flip.jpg", ""
    """
    name, _, edit = key.rpartition(EDIT)
    return Picture(name, edit) if name and edit and _matched(edit) else Picture(key)


def name_of(key: str) -> str:
    """Return where the pixels of a picture come from."""
    return picture_of(key).name


def words_of(key: str) -> str:
    """Return what was done to them, "" for nothing."""
    return picture_of(key).edit


def joined(*edits: str) -> str:
    """Put edits behind one another; a cut has to be the first."""
    return " ".join(edit for edit in edits if edit)


def cut_of(edit: str) -> tuple[tuple[float, float, float, float] | None, bool]:
    """Return what precedes the resizing: the box (left, top, width, height) or None, and the flip.

    The box is in parts of the whole image, and within it: left + width ≤ 1, top + height ≤ 1.
    """
    words = _parsed(edit)
    if words["box"] is None:
        return None, words["flip"] is not None
    left, top, width, height = map(float, words["box"].split())
    return (left, top, width, height), words["flip"] is not None


def paint(pixels: np.ndarray, edit: str) -> np.ndarray:
    """Do what follows the resizing: uint8 [S, S, 3] to the same; the argument stays as it was.

    gray     0.2989 R + 0.587 G + 0.114 B, to the nearest whole number, in all three channels
    hole     black where X ≤ x < X + SIDE and Y ≤ y < Y + SIDE
    patches  the bits of HEX, row by row, 1 for a patch that is kept. 80c0000000000001 keeps

                 # . . . . . . .     80
                 # # . . . . . .     c0
                       ⋮
                 . . . . . . . #     01
    """
    words = _parsed(edit)
    if words["gray"]:
        # Whole numbers up to the last division: no machine rounds another way.
        gray = np.rint(pixels.astype(np.int32) @ np.array(GRAY, np.int32) / STEPS)
        return np.repeat(gray.astype(np.uint8)[:, :, None], 3, axis=2)
    if words["hole"]:
        x, y, side = map(int, words["hole"].split())
        pixels = pixels.copy()
        pixels[y : y + side, x : x + side] = 0
        return pixels
    if words["patches"]:
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(words["patches"]), np.uint8))
        kept = bits.reshape(GRID, GRID)
        for axis in (0, 1):
            edges = np.arange(GRID + 1) * pixels.shape[axis] // GRID
            kept = np.repeat(kept, np.diff(edges), axis=axis)
        return pixels * kept[:, :, None]
    return pixels


def random_cut(*parts: object) -> str:
    """Draw a crop, and a flip in half of the cases, from a seed made of `parts`.

    The area is uniform in 0.35 … 1 of the image, the ratio of the sides log-uniform in 3/4 … 4/3 of
    the image's own, as far as a box of this area fits: none is drawn twice or cut off. The place
    is uniform. DeLVM, which multiplied its small tasks 10 to 100 times by crops and flips, has
    released no parameters; the smallest area is larger than the 0.08 of classifiers, because a
    picture and its annotation have to stay readable together.
    """
    area = AREA[0] + (AREA[1] - AREA[0]) * _uniform(*parts, "area")
    low, high = max(RATIO[0], area), min(RATIO[1], 1 / area)
    ratio = low * (high / low) ** _uniform(*parts, "ratio")
    width = min(STEPS, round(STEPS * (area * ratio) ** 0.5))
    height = min(STEPS, round(STEPS * (area / ratio) ** 0.5))
    left = seeded(*parts, "left") % (STEPS - width + 1)
    top = seeded(*parts, "top") % (STEPS - height + 1)
    box = " ".join(f"{value / STEPS:g}" for value in (left, top, width, height))
    return joined(f"crop {box}", "flip" if seeded(*parts, "flip") % 2 else "")


def random_mask(size: int, *parts: object) -> str:
    """Draw what is hidden of an image of `size` pixels a side, from a seed made of `parts`.

    As LVM: with probability 0.3 one black square with a side of 10 % … 50 % of the image (25 … 127
    of 256 px) anywhere in it; otherwise each of 8 × 8 patches is kept with one probability, which
    is itself uniform in 0 … 1: in one case of 65 nothing is kept, in another nothing is hidden.
    """
    assert size >= GRID, f"no {GRID} × {GRID} patches in {size} px"
    if _uniform(*parts, "mask") < HOLE_RATE:
        shortest, limit = max(1, size // 10), size // 2
        side = shortest + seeded(*parts, "side") % (limit - shortest)
        x, y = (seeded(*parts, axis) % (size - side + 1) for axis in "xy")
        return f"hole {x} {y} {side}"
    keep = _uniform(*parts, "keep")
    bits = [_uniform(*parts, "patch", patch) < keep for patch in range(GRID * GRID)]
    return f"patches {np.packbits(bits).tobytes().hex()}"


def _uniform(*parts: object) -> float:
    return seeded(*parts) / 2**64


def _matched(edit: str) -> re.Match[str] | None:
    return _FORM.fullmatch(f"{edit} " if edit else "")


def _parsed(edit: str) -> dict[str, str | None]:
    words = _matched(edit)
    assert words, f"no edit: {edit!r}"
    return words.groupdict()
