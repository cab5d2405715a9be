"""Training images: which are held out, in which order they come, how they get into memory.

Order is arithmetic: the batch of a step depends on seed and step alone, so a run that was killed
goes on with the very images it would have seen. Pixels are uint8 [N, C, H, W] throughout.
"""

import hashlib
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from tokenizer.cli import CommandError, InputError, Progress
from tokenizer.images import BadImage, Preprocess, list_images, read_image
from tokenizer.world import World

T = TypeVar("T")

IN_MEMORY_BYTES = 4 << 30  # more pixels than this are decoded anew in every pass
HELD_OUT_SHARE, HELD_OUT_MOST = 50, 512  # one image in 50, at most 512
AHEAD = 4  # batches being decoded while one is trained on


def find_images(folders: Sequence[Path]) -> list[tuple[str, Path]]:
    """Return (name, file) of all images below `folders`; names start with the folder's number."""
    if not folders:
        raise InputError("no image folder given; name at least one")
    found = []
    for number, folder in enumerate(folders):
        if not folder.is_dir():
            raise InputError(f"no image folder at {folder}")
        files = list_images(folder)
        if not files:
            raise InputError(f"{folder} has no images; wanted files such as .jpg, .png, .webp")
        found += [(f"{number}/{f.relative_to(folder).as_posix()}", f) for f in files]
    return found


def spread(items: Sequence[T], limit: int | None) -> list[T]:
    """Return at most `limit` of the items, evenly spread over their order; all for None."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


def fingerprint(named: Sequence[tuple[str, Path]]) -> str:
    """Return a hash of the names, which tells another set of images from the same one moved."""
    return hashlib.sha256("\n".join(name for name, _ in named).encode()).hexdigest()[:16]


def hold_out(named: Sequence[tuple[str, Path]]) -> tuple[list[Path], list[Path]]:
    """Split into (training, held-out) files by a hash of the name: no order, no seed matters."""
    if len(named) < 2:
        raise InputError("only one image; wanted at least one to learn from and one to measure on")
    ranked = sorted(named, key=lambda n: hashlib.sha256(n[0].encode()).digest())
    held = min(HELD_OUT_MOST, max(1, len(named) // HELD_OUT_SHARE))
    return [path for _, path in ranked[held:]], [path for _, path in ranked[:held]]


def decode(file: Path, size: int, preprocess: Preprocess) -> np.ndarray | BadImage:
    """Return uint8 [C, H, W], or what is wrong with the file."""
    try:
        return read_image(file, size=size, preprocess=preprocess).transpose(2, 0, 1)
    except BadImage as error:
        return error


def decode_all(
    files: Sequence[Path],
    *,
    size: int,
    preprocess: Preprocess,
    workers: int,
    label: str,
    progress: bool = True,
) -> tuple[Tensor, Counter[str]]:
    """Return the good images, uint8 [N, 3, size, size], and the counts of bad ones by reason."""
    pixels = np.empty((len(files), 3, size, size), np.uint8)
    good, bad = 0, Counter[str]()
    with (
        ThreadPoolExecutor(workers) as pool,  # Pillow decodes and resizes outside the GIL
        Progress(label, total=len(files), unit="images", enabled=progress) as bar,
    ):
        for image in pool.map(lambda f: decode(f, size, preprocess), files):
            if isinstance(image, BadImage):
                bad[image.reason] += 1
            else:
                pixels[good] = image
                good += 1
            bar.update(1, bad=bad.total())
    if not good:
        raise InputError(f"none of {len(files)} images can be read: {reasons(bad)}")
    return torch.from_numpy(pixels[:good]), bad


def reasons(bad: Counter[str]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in bad.most_common()) or "none"


@lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> Tensor:
    """Return a permutation of 0 … n-1 for one pass over the images."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator)


def picks(step: int, *, batch: int, n: int, seed: int) -> Tensor:
    """Return which of n images step `step` sees, int64 [batch]; passes follow without a gap."""
    places = torch.arange(step * batch, (step + 1) * batch)
    passes = places // n
    return torch.cat(
        [_order(n, seed, int(p))[places[passes == p] % n] for p in passes.unique()]  # ascending
    )


class Images:
    """The training images: in memory if they are small, else read by threads ahead of their use.

    A rank yields its slice of every batch; in memory it holds all images, as each may fall to it.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        size: int,
        preprocess: Preprocess,
        workers: int,
        world: World,
    ) -> None:
        self.files, self.size, self.preprocess, self.workers = files, size, preprocess, workers
        self.world, self.bad = world, Counter[str]()
        self.pixels: Tensor | None = None
        if len(files) * 3 * size * size <= IN_MEMORY_BYTES // world.size:
            self.pixels, self.bad = decode_all(
                files,
                size=size,
                preprocess=preprocess,
                workers=workers,
                label="read images",
                progress=world.main,
            )

    def batches(self, first: int, *, batch: int, seed: int) -> Iterator[Tensor]:
        """Yield this rank's part of the batches of steps `first`, `first` + 1, … without end.

        `batch` counts the images of all ranks; each part is uint8 [batch / ranks, 3, H, W].
        """
        own = batch // self.world.size
        mine = slice(self.world.rank * own, (self.world.rank + 1) * own)
        if self.pixels is not None:
            step = first
            while True:
                yield self.pixels[picks(step, batch=batch, n=len(self.pixels), seed=seed)[mine]]
                step += 1
        with ThreadPoolExecutor(self.workers) as pool:
            coming: deque[list[Future[np.ndarray | BadImage]]] = deque()
            step = first
            while True:
                while len(coming) < AHEAD:
                    chosen = picks(step, batch=batch, n=len(self.files), seed=seed)[mine]
                    coming.append(
                        [
                            pool.submit(decode, self.files[i], self.size, self.preprocess)
                            for i in chosen.tolist()
                        ]
                    )
                    step += 1
                yield self._whole([future.result() for future in coming.popleft()])

    def _whole(self, images: list[np.ndarray | BadImage]) -> Tensor:
        """Return a full batch; good images of it take the places of bad ones."""
        good = [image for image in images if not isinstance(image, BadImage)]
        self.bad.update(image.reason for image in images if isinstance(image, BadImage))
        if not good:
            raise CommandError(f"no image of a whole batch can be read: {reasons(self.bad)}")
        return torch.from_numpy(np.stack([good[i % len(good)] for i in range(len(images))]))


def default_workers() -> int:
    return min(8, os.cpu_count() or 1)
