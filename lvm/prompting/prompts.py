"""What a prompt is, and how files become one.

Every prompt is a sentence that stops where the answers begin:

    analogy      x1 y1 x2 y2 … q |            pairs of one task and a query
    composition  x1 d1 e1 x2 d2 e2 … q |      examples of several tasks on one image; d and e follow
    sequence     f1 f2 f3 … |                 frames
    inpainting   … p                          the first answer p is known down to a row of codes

The layouts are those of training: `pair`, `annotated`, `video` of visual_sentences.layouts.
S is the side of the tokenizer's images, k the images before the answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from lvm.prompting import frames
from tokenizer.cli import InputError
from tokenizer.images import BadImage, Preprocess


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The files of a prompt in the order of the sentence, and what is asked of them."""

    files: tuple[Path, ...]
    width: int = 0
    """Images of one example with its answers; 0: frames."""
    bare: int = 1
    """How many last images are the question itself, which stays where the examples are left out."""
    new: int = 1
    """Images to draw."""
    part: Path | None = None
    """Image whose upper part is the beginning of the first answer."""
    keep: float = 0.5
    """How much of its height is kept."""
    stride: int = 1
    count: int | None = None

    @property
    def clip(self) -> Path | None:
        """The one file or folder that stands for all frames, if it is one."""
        one = not self.width and len(self.files) == 1 and frames.is_clip(self.files[0])
        return self.files[0] if one else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt as the model is asked it."""

    images: np.ndarray  # uint8 [k, S, S, 3]
    width: int  # as Plan's
    part: np.ndarray | None = None  # uint8 [S, S, 3]: the first answer, mirrored below `height`
    height: int = 0  # pixels that are kept of it
    rows: int = 0  # rows of codes that are kept of it


def plan(
    *,
    pairs: Sequence[tuple[Path, Path]] = (),
    examples: Sequence[Sequence[Path]] = (),
    query: Sequence[Path] = (),
    sequence: Sequence[Path] = (),
    new: int | None = None,
    part: Path | None = None,
    keep: float = 0.5,
    stride: int = 1,
    count: int | None = None,
) -> Plan:
    """Put a prompt together; arguments are options of the command, which the errors name."""
    if not 0 < keep < 1:
        raise InputError(f"--keep {keep}: wanted a part of the height, more than 0, less than 1")
    wanted = 1 if new is None else new
    rest = partial(Plan, part=part, keep=keep)
    if sequence:
        if pairs or examples or query:
            raise InputError(
                "--frames is a prompt of its own: leave --pair, --example and --query out"
            )
        if stride < 1 or (count is not None and count < 1):
            raise InputError(f"--stride {stride}, --count {count}: wanted at least 1 of each")
        if len(sequence) > 1 and (folders := [p for p in sequence if frames.is_clip(p)]):
            raise InputError(
                f"--frames names {folders[0]} and {len(sequence) - 1} more: give one folder, video "
                "or GIF alone, or images"
            )
        found = rest(files=tuple(sequence), new=wanted, stride=stride, count=count)
        if found.clip is None and (stride, count) != (1, None):
            raise InputError(
                "--stride and --count choose frames of a folder, a video or a GIF; images given "
                "one by one are all taken"
            )
        return found
    if (stride, count) != (1, None):
        raise InputError("--stride and --count go with --frames")
    if pairs and examples:
        raise InputError("--pair x y is --example x y: give all of them as --example")
    shots = [tuple(shot) for shot in (pairs or examples)]
    widths = sorted({len(shot) for shot in shots})
    if widths and (len(widths) > 1 or widths[0] < 2):
        raise InputError(
            f"--example was given {' and '.join(map(str, widths))} images; wanted at least 2, in "
            "all examples the same images in the same order"
        )
    width = widths[0] if widths else 2
    if not query:
        if shots:
            raise InputError(
                "--query is missing: which image shall be answered as the others were?"
            )
        if part is None:
            raise InputError("give --pair … --query, --example … --query, --frames, or --image")
        return rest(files=(), bare=0, new=wanted)
    if len(query) >= width:
        raise InputError(
            f"--query has {len(query)} images and an example {width}: nothing is left to answer"
        )
    asked = width - len(query)
    if new not in (None, asked):
        raise InputError(
            f"--new {new}, but an example has {asked} images after the query; leave --new out, or "
            "give a sequence as --frames"
        )
    files = [image for shot in shots for image in shot] + list(query)
    return rest(files=tuple(files), width=width, bare=len(query), new=asked)


def read(
    plan: Plan, *, size: int, codes_per_image: int, room: int, preprocess: Preprocess
) -> Question:
    """Read the files of a prompt; raises InputError that names all bad ones.

    `room` is how many images a row of the model has. Of a clip without a count as many frames are
    taken as leave room for the answers.
    """
    if plan.clip is not None:
        count = plan.count or max(1, room - plan.new)
        images = frames.last_frames(
            plan.clip, count=count, stride=plan.stride, size=size, preprocess=preprocess
        )
    else:
        images = read_images(plan.files, size=size, preprocess=preprocess)
    part, height, rows = None, 0, 0
    if plan.part is not None:
        rows = kept_rows(plan.keep, codes_per_image)
        height = rows * size // side_of(codes_per_image)
        (image,) = read_images([plan.part], size=size, preprocess=preprocess)
        part = image[mirrored(height, size)]
    return Question(images=images, part=part, height=height, rows=rows, width=plan.width)


def read_images(files: Sequence[Path], *, size: int, preprocess: Preprocess) -> np.ndarray:
    """Read images to uint8 [k, size, size, 3]; raises InputError that names all bad files."""
    images, bad = [np.empty((0, size, size, 3), np.uint8)], []
    for file in files:
        try:
            images.append(frames.read_picture(file, size=size, preprocess=preprocess)[None])
        except BadImage as error:
            bad.append(f"{file} ({error.reason}{_more(error, file)})")
    if bad:
        raise InputError(f"these images cannot be used: {', '.join(bad)}")
    return np.concatenate(images)


def kept_rows(keep: float, codes_per_image: int) -> int:
    """Return how many whole rows of codes are in that part of the height; at least one, not all."""
    side = side_of(codes_per_image)
    rows = round(keep * side)
    if not 0 < rows < side:
        raise InputError(
            f"--keep {keep} is {'nothing' if not rows else 'all'} of an image of {side} rows of "
            f"codes; wanted 1 to {side - 1} rows, {1 / side:.3g} to {1 - 1 / side:.3g}"
        )
    return rows


def mirrored(height: int, size: int) -> np.ndarray:
    """Return the row of pixels, int [size], to show at each: the first `height`, then their mirror.

    The codes of an encoder depend on pixels far below them, so that what shall be drawn must not be
    there when the kept part is encoded. A mirror has no edge at the border, as a blank would.
    """
    return np.pad(np.arange(height), (0, size - height), mode="symmetric")


def side_of(codes_per_image: int) -> int:
    """Return the rows of codes of a square image."""
    side = round(codes_per_image**0.5)
    if side * side != codes_per_image:
        raise InputError(
            f"{codes_per_image} codes an image are no square; parts of images need one"
        )
    return side


def _more(error: BadImage, file: Path) -> str:
    """Return what is known beyond the reason, where the reader knows it best."""
    return error.detail.removeprefix(str(file)) if error.reason == "too large" else ""
