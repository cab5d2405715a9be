"""The demo's tasks: from what a renderer or a photograph gives to pairs of small pictures.

A task is a pair of folders, the question's and the answer's, with the same file names in both.
Most tasks ask about the same picture (`rgb`), and some differ in nothing but colours: from the
question alone nobody can tell which answer is wanted. That is what a prompt is for.

Everything here is a pure function of uint8 arrays; n frames, s pixels a side.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np
from PIL import Image, ImageFilter


class Kind(IntEnum):
    """What a pixel shows."""

    FLOOR = 0
    CEILING = 1
    WALL = 2
    SKY = 3
    OBJECT = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A pair of folders. Tasks of one family have answers for the same frames."""

    name: str
    family: str
    inputs: str  # folder of the questions
    targets: str  # folder of the answers
    about: str


def _ask(family: str, name: str, about: str) -> Task:
    return Task(name=name, family=family, inputs=questions(family), targets=name, about=about)


def questions(family: str) -> str:
    """Return the folder with the frames of `rgb` that a family has answers for."""
    return f"questions/{family}"


TASKS = (
    _ask("depth", "depth-warm", "near is bright, far is dark"),
    _ask("depth", "depth-cool", "near is dark, far is bright"),
    _ask("segment", "segment-a", "floor, ceiling, wall, sky, object in five colours"),
    _ask("segment", "segment-b", "the same colours, given to other kinds"),
    _ask("segment", "segment-c", "the same colours, given to other kinds again"),
    _ask("edges", "edges-white", "white lines on black"),
    _ask("edges", "edges-black", "black lines on white"),
    _ask("colours", "negative", "every channel inverted"),
    _ask("colours", "swap", "red and blue exchanged"),
    _ask("colours", "rotate", "green shown as red, blue as green, red as blue"),
    _ask("colours", "grey", "luminance"),
    Task(
        name="colorize",
        family="colours",
        inputs="grey",
        targets=questions("colours"),
        about="colours for a grey picture",
    ),
)
GEOMETRY = ("depth", "segment")  # families that only a renderer can answer

# Five colours far apart. A palette gives them to floor, ceiling, wall, sky and object in turn; the
# palettes share places, so one answer without sky or object does not yet tell which palette it is.
COLOURS = np.array(
    [(46, 139, 87), (72, 61, 160), (222, 135, 38), (150, 210, 245), (215, 30, 70)], np.uint8
)
PALETTES = {
    "segment-a": COLOURS[[0, 1, 2, 3, 4]],
    "segment-b": COLOURS[[0, 2, 1, 4, 3]],
    "segment-c": COLOURS[[3, 2, 0, 1, 4]],
}
WARM = ((255, 246, 190), (250, 160, 60), (200, 50, 80), (90, 20, 110), (10, 5, 30))
COOL = ((5, 20, 50), (10, 80, 120), (40, 160, 130), (170, 220, 110), (250, 255, 235))
FAR = 100.0  # in the engine's steps of 7.16 map units: where walls saturate at a height of 192
TONE = 0.55  # exponent of the tone curve: the game is dark


@dataclass(frozen=True, kw_only=True)
class Views:
    """n frames of one clip at full size, and what the tasks take from them at s x s.

    `rgb` is uint8 [n, H, W, 3]; `depth` and `kinds` are uint8 [n, H, W] or None for photographs.
    """

    size: int
    rgb: np.ndarray
    depth: np.ndarray | None = None
    kinds: np.ndarray | None = None

    def take(self, indices: list[int]) -> "Views":
        """Return the views of some of the frames."""
        depth = None if self.depth is None else self.depth[indices]
        kinds = None if self.kinds is None else self.kinds[indices]
        return Views(size=self.size, rgb=self.rgb[indices], depth=depth, kinds=kinds)

    @cached_property
    def small(self) -> np.ndarray:
        return shrink(self.rgb, self.size)

    @cached_property
    def grey(self) -> np.ndarray:
        weights = np.array([77, 150, 29], np.uint16)  # 0.299 0.587 0.114 of 256
        luminance = ((self.small.astype(np.uint16) * weights).sum(-1) >> 8).astype(np.uint8)
        return luminance[..., None].repeat(3, axis=-1)

    @cached_property
    def nearness(self) -> np.ndarray:
        """uint8 [n, s, s], 0 at the eye to 255 far off; the root gives near things more steps."""
        assert self.depth is not None
        steps = np.minimum(np.arange(256) / FAR, 1.0) ** 0.5
        return shrink(to_bytes(steps)[self.depth], self.size)

    @cached_property
    def classes(self) -> np.ndarray:
        """uint8 [n, s, s]: the kind with the largest share of each pixel's area."""
        assert self.kinds is not None
        shares = [shrink((self.kinds == kind).view(np.uint8) * 255, self.size) for kind in Kind]
        shares[Kind.OBJECT] = np.minimum(shares[Kind.OBJECT], 127) * 2  # thin things survive
        return np.argmax(np.stack(shares), axis=0).astype(np.uint8)

    @cached_property
    def lines(self) -> np.ndarray:
        return strokes(self.rgb, self.size)


def shrink(images: np.ndarray, size: int) -> np.ndarray:
    """Average areas of uint8 [n, H, W] or [n, H, W, 3] down to size x size.

    The frames are laid under one another and resized at once. Their seams fall between two output
    rows, and an area average does not look over them.
    """
    n = len(images)
    tall = Image.fromarray(images.reshape(n * images.shape[1], *images.shape[2:]))
    small = np.asarray(tall.resize((size, n * size), Image.Resampling.BOX, reducing_gap=1.0))
    return small.reshape(n, size, size, *images.shape[3:])


def to_bytes(values: np.ndarray) -> np.ndarray:
    """Scale [0, 1] to uint8 0..255."""
    return np.rint(np.clip(values, 0.0, 1.0) * 255.0).astype(np.uint8)


def tone_curve(exponent: float) -> np.ndarray:
    """Return the look-up table uint8 [256] of x ** exponent."""
    return to_bytes((np.arange(256) / 255.0) ** exponent)


def ramp(colours: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    """Return the look-up table uint8 [256, 3] that runs evenly through `colours`."""
    stops = np.linspace(0, 255, len(colours))
    channels = [np.interp(np.arange(256), stops, [c[i] for c in colours]) for i in range(3)]
    return np.rint(np.stack(channels, axis=1)).astype(np.uint8)


def strokes(rgb: np.ndarray, size: int) -> np.ndarray:
    """Draw the edges of uint8 [n, H, W, 3] as uint8 [n, s, s], 255 on a line.

    Gradients (Sobel, strongest channel) at twice the wanted size after a slight blur, thinned to
    their crests, cut relative to the picture's own strong edges, and averaged down: lines about a
    pixel wide, with grey where they run between pixels. The blur removes the texture of walls.
    """
    fine = shrink(rgb, size * 2)
    return np.stack([_strokes(image, size) for image in fine])  # one at a time stays in the cache


def _strokes(fine: np.ndarray, size: int) -> np.ndarray:
    blurred = np.asarray(Image.fromarray(fine).filter(ImageFilter.GaussianBlur(1.0)))
    x = np.empty((2 * size + 2, 2 * size + 2, 3), np.int16)  # with its border repeated
    x[1:-1, 1:-1] = blurred
    x[0], x[-1] = x[1], x[-2]
    x[:, 0], x[:, -1] = x[:, 1], x[:, -2]
    columns, rows = x[:-2] + 2 * x[1:-1] + x[2:], x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]
    across, down = np.abs(columns[:, 2:] - columns[:, :-2]), np.abs(rows[2:] - rows[:-2])
    across = np.maximum(np.maximum(across[..., 0], across[..., 1]), across[..., 2])
    down = np.maximum(np.maximum(down[..., 0], down[..., 1]), down[..., 2])
    around = np.zeros((2 * size + 2, 2 * size + 2), np.float32)
    strength = around[1:-1, 1:-1]
    np.hypot(across, down, out=strength, dtype=np.float32)
    crest = np.where(
        across >= down,
        (strength >= around[1:-1, :-2]) & (strength > around[1:-1, 2:]),
        (strength >= around[:-2, 1:-1]) & (strength > around[2:, 1:-1]),
    )
    rank = strength.size * 92 // 100
    strong = np.partition(strength, rank, axis=None)[rank]
    line = np.clip(strength * crest * (2.0 / (strong + 64.0)) - 0.6, 0.0, 1.0)  # quiet ones: blank
    halves = line[::2, ::2] + line[1::2, ::2] + line[::2, 1::2] + line[1::2, 1::2]
    return to_bytes(halves / 2.0)


def negative(rgb: np.ndarray) -> np.ndarray:
    return 255 - rgb


def swap(rgb: np.ndarray) -> np.ndarray:
    """Exchange red and blue."""
    return rgb[..., ::-1]


def rotate(rgb: np.ndarray) -> np.ndarray:
    """Let green stand in red's place, blue in green's, red in blue's."""
    return rgb[..., [1, 2, 0]]


def as_rgb(grey: np.ndarray) -> np.ndarray:
    return grey[..., None].repeat(3, axis=-1)


PAINT: dict[str, Callable[[Views], np.ndarray]] = {
    "rgb": lambda v: v.small,
    "grey": lambda v: v.grey,
    "depth-warm": lambda v: ramp(WARM)[v.nearness],
    "depth-cool": lambda v: ramp(COOL)[v.nearness],
    "segment-a": lambda v: PALETTES["segment-a"][v.classes],
    "segment-b": lambda v: PALETTES["segment-b"][v.classes],
    "segment-c": lambda v: PALETTES["segment-c"][v.classes],
    "edges-white": lambda v: as_rgb(v.lines),
    "edges-black": lambda v: as_rgb(255 - v.lines),
    "negative": lambda v: negative(v.small),
    "swap": lambda v: swap(v.small),
    "rotate": lambda v: rotate(v.small),
}


def paint(folder: str, views: Views) -> np.ndarray:
    """Return the pictures of one folder, uint8 [n, s, s, 3]."""
    return PAINT[folder](views)


def tasks_for(*, geometry: bool) -> list[Task]:
    """Return the tasks that can be posed with, or without, depth and kinds."""
    return [task for task in TASKS if geometry or task.family not in GEOMETRY]
