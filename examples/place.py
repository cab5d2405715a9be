"""One map of the game, or one photograph: its frames, painted for every task, as PNG files."""

import hashlib
import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from examples import photos, tasks, walk

LEAST = 32  # frames worth starting an engine for: fewer frames in all take fewer maps


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What decides the bytes of a picture besides its place."""

    size: int
    share: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A map, or a photograph to glide over, and how many frames are wanted from it."""

    name: str
    split: str
    frames: int
    map: walk.Map | None


def places(frames: int, *, rendered: bool) -> list[Place]:
    """Share the frames out evenly over maps, or over photographs; every eighth map is held out.

    Few frames take few maps, but at least eight, so that one is held out.
    """
    maps = {m.name: m for m in walk.all_maps()} if rendered else {}
    names = list(maps)[: max(frames // LEAST, 8)] if rendered else photos.names()
    n = len(names)
    held_out = set(names[7::8]) if rendered else photos.HELD_OUT
    return [
        Place(
            name=name,
            split="heldout" if name in held_out else "train",
            frames=frames * (i + 1) // n - frames * i // n,
            map=maps.get(name),
        )
        for i, name in enumerate(names)
    ]


def drawn(key: str, family: str, look: Look) -> bool:
    """Tell by a hash whether frame `key` has answers to the tasks of a family."""
    # Not a checksum such as crc32: its values for two families differ by a constant.
    digest = hashlib.blake2b(f"{look.seed} {family} {key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < look.share * 2**64


def render(place: Place, look: Look, folder: Path) -> dict[str, Any]:
    """Write FOLDER/NAME-WALK/FRAME.png below `folder` for all walks of a place; return counts.

    The same arguments give the same bytes. The engine leaves its own files in the working folder.
    """
    dropped: Counter[str] = Counter()
    pictures: Counter[str] = Counter()
    walks = 0
    for views in _views(place, look, dropped):
        walks += 1
        clip = f"{place.name}-{walks:02d}"
        frames = [f"{i:03d}.png" for i in range(len(views.rgb))]
        rgb = [png(picture) for picture in tasks.paint("rgb", views)]
        pictures["rgb"] += _write(folder / "rgb" / clip, dict(zip(frames, rgb, strict=True)))
        answers: dict[str, set[str]] = {}
        for task in tasks.tasks_for(geometry=views.depth is not None):
            answers.setdefault(task.family, set()).update({task.inputs, task.targets})
        for family, names in answers.items():
            chosen = [i for i, frame in enumerate(frames) if drawn(f"{clip}/{frame}", family, look)]
            if not chosen:
                continue
            part = views.take(chosen)
            for name in sorted(names):
                asked = name == tasks.questions(family)
                if asked:
                    data = [rgb[i] for i in chosen]
                else:
                    data = [png(picture) for picture in tasks.paint(name, part)]
                files = {frames[i]: file for i, file in zip(chosen, data, strict=True)}
                twin = folder / "rgb" / clip if asked else None
                pictures[name] += _write(folder / name / clip, files, twin=twin)
    return {
        "split": place.split,
        "walks": walks,
        "frames": pictures["rgb"],
        "pictures": dict(pictures),
        "dropped": dict(dropped),
    }


def _write(folder: Path, files: dict[str, bytes], *, twin: Path | None = None) -> int:
    """Write files into a new folder, as hard links where `twin` has the same ones and links go."""
    folder.mkdir(parents=True)
    for name, data in files.items():
        path = os.path.join(folder, name)
        if twin is not None:
            try:
                os.link(os.path.join(twin, name), path)
                continue
            except OSError:
                twin = None  # a file system without links
        with open(path, "wb") as file:
            file.write(data)
    return len(files)


def _views(place: Place, look: Look, dropped: Counter[str]) -> Iterator[tasks.Views]:
    if place.map is None:
        for clip, start in enumerate(range(0, place.frames, walk.LONGEST)):
            frames = min(walk.LONGEST, place.frames - start)
            rgb = photos.glide(place.name, frames=frames, seed=look.seed, clip=clip)
            yield tasks.Views(size=look.size, rgb=rgb)
        return
    tone = tasks.tone_curve(tasks.TONE)
    for w in walk.walks(place.map, frames=place.frames, seed=look.seed, dropped=dropped):
        yield tasks.Views(size=look.size, rgb=tone[w.rgb], depth=w.depth, kinds=w.kinds)


def png(picture: np.ndarray) -> bytes:
    """Return uint8 [h, w, 3] as a PNG file, compressed fast.

    A third of the time that Pillow takes for pictures of 32 x 32, where starting up outweighs the
    work (0.1 against 0.3 ms); there are some 80,000 of them.
    """
    h, w, _ = picture.shape
    rows = np.zeros((h, 1 + 3 * w), np.uint8)  # a zero before each row: no filter
    rows[:, 1:] = picture.reshape(h, 3 * w)
    header = struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)  # 8 bits, RGB, not interlaced
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 1)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
