"""Sequences in and out: folders of frames, files of video, GIFs; GIF and MP4 written.

Files of video need PyAV, the extra `video`; the rest needs Pillow alone.
"""

import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from tokenizer.cli import InputError
from tokenizer.files import atomic_write
from tokenizer.images import (
    MOST_PIXELS,
    SUFFIXES,
    BadImage,
    Preprocess,
    fit,
    list_images,
    read_image,
)

ANIMATED = frozenset({".gif"})  # always a sequence; other formats may hold one and mostly do not
WRITTEN = (".gif", ".mp4")
SMALLEST = 96  # pixels; smaller frames are enlarged to about this in what is written


def is_clip(path: Path) -> bool:
    """Tell whether a path stands for many frames: a folder, a file of video, a GIF."""
    suffix = path.suffix.lower()
    return suffix in ANIMATED or path.is_dir() or (suffix not in SUFFIXES and _is_video(path))


def read_picture(path: Path, *, size: int, preprocess: Preprocess) -> np.ndarray:
    """Read an image of a prompt to uint8 [size, size, 3]; raises BadImage with the reason.

    Images beyond 67 megapixels that would have to be decoded whole are refused by their headers.
    """
    return read_image(path, size=size, preprocess=preprocess, most=MOST_PIXELS)


def last_frames(
    path: Path, *, count: int, stride: int, size: int, preprocess: Preprocess
) -> np.ndarray:
    """Return the last `count` frames of a clip, `stride` apart, uint8 [<= count, size, size, 3].

    They end with the clip's last frame, so that what is drawn after them is what comes next. Raises
    InputError with the reason where the clip is damaged, or has no second frame.
    """
    try:
        if path.is_dir():
            found: Iterator[Path | Image.Image] = _of_folder(path, count=count, stride=stride)
        elif _is_video(path):
            found = _of_video(path, count=count, stride=stride)
        else:
            found = _of_animation(path, count=count, stride=stride)
        return np.stack([
            read_picture(x, size=size, preprocess=preprocess)
            if isinstance(x, Path)
            else fit(x, size=size, preprocess=preprocess)
            for x in found
        ])  # fmt: skip
    except BadImage as error:
        raise InputError(f"{path} cannot be used as a sequence: {error}") from error


def numbers(total: int, *, count: int, stride: int) -> list[int]:
    """Return the numbers of at most `count` of `total` frames, `stride` apart, the last included.

    numbers(10, count=3, stride=2) → [5, 7, 9]
    """
    return list(range(total - 1, -1, -stride))[:count][::-1]


def write_frames(path: Path, images: np.ndarray, *, fps: float) -> None:
    """Write uint8 [k, H, W, 3] as GIF or MP4 by the suffix, atomically; small ones enlarged.

    A GIF repeats for ever, with 256 colours a frame. An MP4 needs PyAV; it has an even number of
    pixels each way, as its codec wants, the last row or column repeated.
    """
    scale = max(1, SMALLEST // images.shape[1])
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    data = _gif(images, fps) if path.suffix.lower() == ".gif" else _mp4(images, fps)
    with atomic_write(path) as file:
        file.write(data)


def require_video(path: Path) -> None:
    """Refuse a file of video, to be read or written, where PyAV is not installed."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise InputError(
            f'{path} is video, which needs PyAV: pip install "large-vision-models[video]"'
        ) from error


def _is_video(path: Path) -> bool:
    from visual_sentences.containers import is_clip  # which loads pyarrow

    return is_clip(path.name)


def _check_length(total: int) -> None:
    if total < 2:
        frames = "one frame" if total else "no frame"
        raise BadImage(
            f"it has {frames}, which is no sequence", "give a longer one, or images as PNG or JPEG"
        )


def _of_folder(path: Path, *, count: int, stride: int) -> Iterator[Path | Image.Image]:
    files = list_images(path)
    _check_length(len(files))
    yield from (files[i] for i in numbers(len(files), count=count, stride=stride))


def _of_video(path: Path, *, count: int, stride: int) -> Iterator[Path | Image.Image]:
    from visual_sentences.containers import clips

    require_video(path)

    def opened() -> io.FileIO:
        return io.FileIO(path, "rb")

    total = clips.frame_count(opened, path.name)
    _check_length(total)
    wanted = numbers(total, count=count, stride=stride)
    for _, frame in clips.frames(opened, path.name, wanted):
        if isinstance(frame, BadImage):
            raise frame
        yield Image.fromarray(frame)


def _of_animation(path: Path, *, count: int, stride: int) -> Iterator[Path | Image.Image]:
    try:
        with Image.open(path, formats=("GIF",)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise BadImage("too large", f"{image.width}×{image.height}")
            total = getattr(image, "n_frames", 1)
            _check_length(total)
            for number in numbers(total, count=count, stride=stride):
                image.seek(number)
                yield image.convert("RGB")
    except FileNotFoundError as error:
        raise BadImage("missing file") from error
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise BadImage("not an image", str(error)) from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise BadImage("unreadable", str(error)) from error


def _gif(images: np.ndarray, fps: float) -> bytes:
    buffer = io.BytesIO()
    first, *rest = [Image.fromarray(image) for image in images]
    milliseconds = max(20, round(1000 / fps))  # players slow down what is faster
    first.save(
        buffer, "GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0, disposal=1
    )
    return buffer.getvalue()


def _mp4(images: np.ndarray, fps: float) -> bytes:
    import av

    high, wide = images.shape[1] % 2, images.shape[2] % 2
    images = np.pad(images, ((0, 0), (0, high), (0, wide), (0, 0)), mode="edge")
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = *images.shape[1:3], "yuv420p"
        for image in images:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode())
    return buffer.getvalue()
