"""Random views of an image for training on pixels, as AIM trains: crop, mirror, colours.

The operations and their distributions are those of torchvision's RandomResizedCrop (bicubic),
RandomHorizontalFlip and ColorJitter on Pillow images, without torchvision. All randomness comes
from one generator a view, so a view depends on its seed alone.
"""

import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, UnidentifiedImageError

from tokenizer.images import FORMATS, BadImage
from visual_sentences.image_loader import View

RATIOS = (3 / 4, 4 / 3)  # width over height of a crop
TRIES = 10
EVAL = 0.875  # part of a resized shorter side that the centre crop of evaluation keeps


def random_view(file: bytes, view: View, random: np.random.Generator) -> np.ndarray:
    """Decode a JPEG to a random view, uint8 [size, size, 3]; raises BadImage."""
    with _opened(file) as image:
        width, height = image.size
        left, top, w, h = crop_box(width, height, least=view.least_crop, random=random)
        # Decode no finer than the crop needs: a JPEG comes at 1/2, 1/4 or 1/8 for less time.
        image.draft("RGB", (math.ceil(width * view.size / w), math.ceil(height * view.size / h)))
        part = image.convert("RGB")
    x, y = part.width / width, part.height / height
    box = (left * x, top * y, (left + w) * x, (top + h) * y)
    picture = part.resize((view.size, view.size), Image.Resampling.BICUBIC, box=box)
    if view.flip and random.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if any(view.jitter) and random.random() < view.jitter_chance:
        picture = jitter(picture, view.jitter, random)
    return np.asarray(picture)


def centre_view(file: bytes, size: int) -> np.ndarray:
    """Decode a JPEG for evaluation: shorter side to size / 0.875, bicubic, the centre cut out."""
    with _opened(file) as image:
        short = math.ceil(size / EVAL)
        image.draft("RGB", (short, short))
        part = image.convert("RGB")
    scale = short / min(part.size)
    resized = part.resize(
        (max(short, round(part.width * scale)), max(short, round(part.height * scale))),
        Image.Resampling.BICUBIC,
    )
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def crop_box(
    width: int, height: int, *, least: float, random: np.random.Generator
) -> tuple[int, int, int, int]:
    """Return left, top, width, height of a crop: area uniform in [least, 1], ratio log-uniform.

    After ten draws that do not fit, the largest centred crop of an allowed ratio.
    """
    for _ in range(TRIES):
        area = width * height * random.uniform(least, 1.0)
        ratio = math.exp(random.uniform(math.log(RATIOS[0]), math.log(RATIOS[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.integers(0, width - w + 1), random.integers(0, height - h + 1)
            return int(left), int(top), w, h
    w = min(width, round(height * RATIOS[1]))
    h = min(height, round(width / RATIOS[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def jitter(
    picture: Image.Image, most: tuple[float, float, float, float], random: np.random.Generator
) -> Image.Image:
    """Change brightness, contrast, saturation (factors in 1 ± most) and hue (shift within ± most
    of the circle), in a random order."""
    brightness, contrast, saturation, hue = most
    factors = [random.uniform(max(0.0, 1 - m), 1 + m) for m in (brightness, contrast, saturation)]
    shift = random.uniform(-hue, hue)
    steps: list[Callable[[Image.Image], Image.Image]] = [
        lambda p: ImageEnhance.Brightness(p).enhance(factors[0]),
        lambda p: ImageEnhance.Contrast(p).enhance(factors[1]),
        lambda p: ImageEnhance.Color(p).enhance(factors[2]),
        lambda p: _turn(p, shift),
    ]
    for i in random.permutation(4):
        if most[i]:
            picture = steps[i](picture)
    return picture


def _turn(picture: Image.Image, shift: float) -> Image.Image:
    """Turn the hue by a part of the circle; Pillow stores it in 256 steps."""
    hue, saturation, value = picture.convert("HSV").split()
    turned = (np.asarray(hue).astype(np.int16) + round(shift * 255)) % 256
    hue = Image.fromarray(turned.astype(np.uint8))
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _opened(file: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(file), formats=FORMATS)
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise BadImage("not an image", str(error)) from error
    return image
