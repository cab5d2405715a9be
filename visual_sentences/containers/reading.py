"""One way to list and to read a part, whatever it is."""

import io
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from types import ModuleType

import numpy as np

from tokenizer.images import BadImage
from visual_sentences.containers import clips as video
from visual_sentences.containers import folder, lists, parquet, tar
from visual_sentences.containers.names import frame_of
from visual_sentences.containers.origin import Contents, Part

MODULES: dict[str, ModuleType] = {"folder": folder, "list": lists, "tar": tar, "parquet": parquet}
Read = Path | bytes | np.ndarray | BadImage


def contents(part: Part, *, clips: bool) -> Contents:
    """List a part without decoding anything; `clips`: with files of video.

    A part that cannot be read is one bad name, beside what stands before the damage.
    """
    found: Contents = MODULES[part.origin.kind].contents(part, clips=clips)
    return found


def read(part: Part, names: Sequence[str]) -> Iterator[tuple[str, Read]]:
    """Yield (name, what `tokenizer.images.open_image` takes, or what is wrong) in the given order.

    Cheap in storage order, the order of `contents`. Frames of a clip are uint8 [H, W, 3] arrays. No
    more than one image, frame or page of a Parquet file (at most its row group) is held at a time.
    """
    for clip, run in groupby(names, key=_clip_of):
        if clip:
            numbers = [int(name.rpartition("#")[2]) for name in run]
            yield from video.frames(_file_of_clip(part, clip), clip, numbers)
        else:
            yield from MODULES[part.origin.kind].read(part, list(run))


def frame_count(part: Part, name: str) -> int:
    """Return how many frames a file of video has; raises BadImage with the reason if none."""
    return video.frame_count(_file_of_clip(part, name), name)


def _clip_of(name: str) -> str:
    found = frame_of(name)
    return found[0] if found else ""


def _file_of_clip(part: Part, name: str) -> video.Source:
    if part.origin.kind == "tar":
        return lambda: tar.window(part, name)
    path = next(iter(MODULES[part.origin.kind].read(part, [name])))[1]
    return lambda: io.FileIO(path)
