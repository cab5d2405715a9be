"""Photographs out of the scikit-image package: crops, and a camera that glides over them.

Only pictures that lie in the package itself (nothing is fetched) and whose authors gave them free
or have no known rights in them, as the package's documentation states: see NOTICE.md.
"""

import importlib.util
import random
from pathlib import Path

import numpy as np
from PIL import Image

PICTURES = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png"),
    *("grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "retina.jpg", "rocket.jpg"),
)
HELD_OUT = frozenset({"coffee", "gravel", "rocket"})
FULL = 192  # side of a gliding camera's frames, as of the rendered ones


def folder() -> Path | None:
    """Return the folder of the package's pictures, without importing the package."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "data"


def names() -> list[str]:
    """Return the pictures that are there, without suffix."""
    place = folder()
    return [Path(p).stem for p in PICTURES if place is not None and (place / p).is_file()]


def load(name: str) -> Image.Image:
    place = folder()
    file = next(p for p in PICTURES if Path(p).stem == name)
    assert place is not None, "names() told that it is there"
    with Image.open(place / file) as image:
        return image.convert("RGB")


def crops(name: str, *, count: int, size: int, seed: int) -> np.ndarray:
    """Cut squares of all scales at random places, half of them mirrored: [count, size, size, 3]."""
    image, rng = load(name), random.Random(f"{seed} {name} crops")
    cut = []
    for _ in range(count):
        side = _side(image, rng, smallest=max(64, size))
        x, y = rng.uniform(0, image.width - side), rng.uniform(0, image.height - side)
        piece = _window(image, x, y, side, size)
        cut.append(piece[:, ::-1] if rng.random() < 0.5 else piece)
    return np.stack(cut)


def glide(name: str, *, frames: int, seed: int, clip: int) -> np.ndarray:
    """Move a square window steadily over a photograph and let it grow or shrink on the way.

    Returns clip number `clip` of the picture, uint8 [frames, FULL, FULL, 3].
    """
    image, rng = load(name), random.Random(f"{seed} {name} glide {clip}")
    first, last = (_side(image, rng, smallest=96) for _ in range(2))
    last = min(max(last, first * 0.7), first * 1.4)
    reach = 0.6 * max(first, last)  # so far that the end still shows a part of the beginning
    x, y = rng.uniform(0, image.width - first), rng.uniform(0, image.height - first)
    end_x = min(max(x + rng.uniform(-reach, reach), 0.0), image.width - last)
    end_y = min(max(y + rng.uniform(-reach, reach), 0.0), image.height - last)
    way = np.linspace(0.0, 1.0, frames)
    path = np.outer(1.0 - way, (x, y, first)) + np.outer(way, (end_x, end_y, last))
    return np.stack([_window(image, left, top, side, FULL) for left, top, side in path.tolist()])


def _side(image: Image.Image, rng: random.Random, *, smallest: int) -> float:
    largest = min(image.size)
    return min(smallest, largest) * (largest / min(smallest, largest)) ** rng.random()


def _window(image: Image.Image, x: float, y: float, side: float, size: int) -> np.ndarray:
    box = (x, y, min(x + side, image.width), min(y + side, image.height))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
