"""Image files to uint8 arrays and back: one way to decode, resize and refuse, for every command.

`squash` resizes to a square and loses the aspect ratio (LVM: bicubic); `crop` resizes the shorter
side and cuts the centre (DeLVM: bilinear).
"""

import io
import os
import re
import struct
import threading
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

Preprocess = Literal["squash", "crop"]
MOST_PIXELS = 1 << 26  # of a resized image before the crop: 192 MiB, 64 × 1,048,576 for instance
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


class BadImage(Exception):
    """An image that cannot be used. `reason` is a short fixed phrase, to be counted by."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[type["BadImage"], tuple[str, str]]:
        return BadImage, (self.reason, self.detail)  # worker processes send it home


class _Silence:
    """Ignore warnings while any thread is inside; `warnings.catch_warnings` alone, entered by two
    threads, may leave them off for ever."""

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.caught = warnings.catch_warnings()
                self.caught.__enter__()
                warnings.simplefilter("ignore")
            self.inside += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.caught.__exit__(None, None, None)


_SILENCE = _Silence()  # Pillow warns of large images and odd EXIF blocks


def read_image(
    source: Path | str | bytes | np.ndarray,
    *,
    size: int,
    preprocess: Preprocess = "squash",
    most: int | None = None,
) -> np.ndarray:
    """Decode one image to uint8 [size, size, 3] RGB; raises BadImage with the reason."""
    return fit(open_image(source, size=size, most=most), size=size, preprocess=preprocess)


def open_image(
    source: Path | str | bytes | np.ndarray, *, size: int, most: int | None = None
) -> Image.Image:
    """Decode one image to RGB of its own shape; raises BadImage with the reason.

    `size` is the side in pixels at which the whole image will be needed, a cut-out's divided by its
    part of the shorter side; a JPEG may come smaller than it is, never smaller than that. An array
    is uint8 [H, W, 3]. More than `most` pixels are refused, by the header, but those of a JPEG.

    What becomes of an image that is not plain 8-bit RGB:
    - much larger JPEG: decoded at a reduced scale (Pillow's draft mode);
    - camera rotation: applied; colour profile: ignored;
    - grey, 1 bit, palette, YCbCr, CMYK (Adobe's inverted one too): converted to RGB;
    - transparency: dropped. Colours stay as stored, under clear pixels too, as `convert("RGB")` of
      LVM's and DeLVM's readers leaves them; nothing is laid over a background;
    - 16-bit grey (depth maps): scaled by 1/257, not clipped; 16-bit colour: its high bytes;
    - animated GIF, WEBP, PNG, many-page TIFF: the first frame;
    - 32-bit float, or 32-bit grey beyond 16 bits: refused, for its range is unknown;
    - formats beside those of `SUFFIXES`: refused, for Pillow starts other programs for some;
    - more than 179 million pixels, by the header, before any is decoded: refused.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            raise BadImage("unsupported mode", f"array {source.dtype} {list(source.shape)}")
        return Image.fromarray(source)
    name = "bytes" if isinstance(source, bytes) else str(source)
    try:
        if isinstance(source, bytes):
            data: io.BytesIO | Path = io.BytesIO(source)
            empty = not source
        else:
            data = Path(source)
            empty = os.path.getsize(data) == 0
        if empty:
            raise BadImage("empty file", name)
        with _SILENCE, Image.open(data, formats=FORMATS) as image:
            if most and image.format != "JPEG" and image.width * image.height > most:
                seen = f"{image.width * image.height / 1e6:.0f} megapixels"
                raise BadImage("too large", f"{name}: {seen}, at most {most / 1e6:.0f} are read")
            image.draft("RGB", (size, size))
            return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise BadImage("not an image", name) from error
    except Image.DecompressionBombError as error:
        raise BadImage("too large", name) from error
    except FileNotFoundError as error:
        raise BadImage("missing file", name) from error
    # What Pillow raises on damaged files; 40,000 of them in 16 formats raised nothing else.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        reason = "truncated" if "truncated" in str(error).lower() else "unreadable"
        raise BadImage(reason, f"{name}: {error}") from error


def fit(
    image: Image.Image,
    *,
    size: int,
    preprocess: Preprocess,
    box: tuple[float, float, float, float] | None = None,
    flip: bool = False,
) -> np.ndarray:
    """Bring an RGB image to uint8 [size, size, 3]; raises BadImage if it is too elongated to crop.

    `box` is the part to keep, first of all: left, top, width, height in parts of the image, rounded
    to whole pixels. `flip` swaps left and right in the end.
    """
    if box is not None:
        image = image.crop(_pixels(box, image.width, image.height))
    pixels = np.asarray(_resized(image, size, preprocess))
    return np.ascontiguousarray(pixels[:, ::-1]) if flip else pixels


def _pixels(
    box: tuple[float, float, float, float], width: int, height: int
) -> tuple[int, int, int, int]:
    """Return left, top, right, bottom inside the image, at least one pixel apart."""
    left = min(round(box[0] * width), width - 1)
    top = min(round(box[1] * height), height - 1)
    right = min(max(round((box[0] + box[2]) * width), left + 1), width)
    bottom = min(max(round((box[1] + box[3]) * height), top + 1), height)
    return left, top, right, bottom


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips at 255
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 0xFFFF:
            raise BadImage("unsupported mode", "32-bit grey image; store depth as 16-bit PNG")
        return Image.fromarray(np.rint(grey / np.float32(257)).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadImage("unsupported mode", "32-bit float image; store depth as 8 or 16-bit PNG")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _resized(image: Image.Image, size: int, preprocess: Preprocess) -> Image.Image:
    if preprocess == "squash":
        if image.size == (size, size):
            return image
        return image.resize((size, size), Image.Resampling.BICUBIC)
    width, height = image.size
    short = min(width, height)
    # The integer arithmetic of torchvision's Resize and CenterCrop, which DeLVM used.
    width, height = (
        (size, int(size * height / width)) if width == short else (int(size * width / height), size)
    )
    if width * height > MOST_PIXELS:
        raise BadImage("too elongated", f"{image.width}×{image.height}")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    return image.crop((left, top, left + size, top + size))


def natural_key(name: str) -> list[tuple[bool, int, str]]:
    """Sort key under which frame2 comes before frame10."""
    parts = re.split(r"(\d+)", name)  # what does not match and what does, in turn
    return [
        (True, int(part), part) if place % 2 else (False, 0, part)
        for place, part in enumerate(parts)
        if part
    ]


def list_images(folder: Path | str) -> list[Path]:
    """Return all image files below `folder` in natural order of their relative paths."""
    folder = Path(folder)
    files = (
        Path(root) / name
        for root, _, names in os.walk(folder, followlinks=True)
        for name in names
        if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
    )
    return sorted(files, key=lambda p: natural_key(p.relative_to(folder).as_posix()))


def save_image(path: Path | str, image: np.ndarray) -> None:
    """Write uint8 [H, W, 3] as the format that the suffix of `path` names."""
    Image.fromarray(image).save(path)


def encode_image(image: np.ndarray, *, format: str = "PNG", quality: int = 90) -> bytes:
    """Return uint8 [H, W, 3] as the bytes of a PNG, JPEG or WEBP file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=format, quality=quality)
    return buffer.getvalue()


def grid(images: np.ndarray, *, columns: int, gap: int = 2, scale: int = 1) -> np.ndarray:
    """Lay out uint8 [N, H, W, 3] row by row on white; `scale` enlarges pixels by repetition."""
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    n, h, w, _ = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = gap + (i // columns) * (h + gap), gap + (i % columns) * (w + gap)
        sheet[y : y + h, x : x + w] = image
    return sheet
