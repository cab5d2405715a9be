"""Images in the mixture's order, for models that read pixels: the twin of `loader`.

Sample i of a run is one row of an image shard, one image of it, one random view of that and one
length of prefix: all by arithmetic and hashes of (seed, i). A run can go on anywhere, with any
number of ranks and workers, and sees the same pixels.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from tokenizer.cli import CommandError, InputError
from visual_sentences.image_shards import ImageShard, open_images
from visual_sentences.loader import check_batch, from_workers
from visual_sentences.manifest import Manifest
from visual_sentences.mixture import Mixture
from visual_sentences.sampler import Integers
from visual_sentences.seeds import seeded


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """B images and how they are read.

    pixels  [B, 3, H, W] uint8
    prefix  [B] int32   patches of each that all others read; 0 without a prefix
    label   [B] int32   class by the manifest's list of its source; -1 where it has none
    source  [B] int32   which source of the manifest
    places  patches of an image
    step    how many places ahead the predicted patch stands
    """

    pixels: Tensor
    prefix: Tensor
    label: Tensor
    source: Tensor
    places: int
    step: int

    @property
    def rows(self) -> int:
        return self.pixels.shape[0]

    @property
    def tokens(self) -> int:
        """Patches of all images: what the hardware computes."""
        return self.rows * self.places

    @property
    def predicted(self) -> Tensor:
        """How many patches are predicted, a scalar; images of source -1 count none."""
        each = self.places - self.prefix.clamp_min(self.step)
        return (each * (self.source >= 0)).sum()

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return self._map(lambda t: t.pin_memory())

    def split(self, rows: int) -> list[Self]:
        """Cut into micro-batches of at most `rows` images; the tensors are views."""
        return [
            self._map(lambda t, a=first: t[a : a + rows]) for first in range(0, self.rows, rows)
        ]

    def _map(self, change: Any) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {
            name: change(v) for name, v in values.items() if isinstance(v, Tensor)
        }
        return replace(self, **changed)


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """How random views are drawn; see lvm.config.Patches for the values."""

    size: int
    least_crop: float = 0.4
    flip: bool = True
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_chance: float = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What the loader has to know of how a model reads images."""

    view: View
    places: int
    step: int = 1
    prefix: bool = True


class ImageReader:
    """Images of one split by (source, row). Shards are opened on first use."""

    def __init__(self, folder: Path | str, manifest: Manifest, *, split: str, random: bool) -> None:
        require_images(manifest, folder)
        self.folder, self.random = Path(folder), random
        self._entries = [e for s in manifest.sources for e in manifest.shards_of(s.name, split)]
        self._ends = np.cumsum([entry.rows for entry in self._entries], dtype=np.int64)
        rows = np.array(list(manifest.rows(split).values()), np.int64)
        self._first = np.cumsum(rows) - rows
        self._open: dict[int, ImageShard] = {}

    def row(self, source: int, row: int) -> tuple[list[bytes], int, list[str]]:
        """Return the JPEG files of a row, its label and their keys."""
        place = int(self._first[source]) + row
        number = int(np.searchsorted(self._ends, place, side="right"))
        if number not in self._open:
            path = self.folder / self._entries[number].name
            self._open[number] = open_images(path, random=self.random)
        shard, inner = self._open[number], place - int(self._ends[number - 1] if number else 0)
        return shard.jpegs(inner), int(shard.labels[inner]), shard.keys(inner)


def require_images(manifest: Manifest, folder: Path | str) -> None:
    """Raise InputError where a build made codes, of which no pixel can be had."""
    if manifest.form != "images":
        raise InputError(
            f"{folder} holds {manifest.form}, wanted images: build it with --images and without "
            "--tokenizer"
        )


class ImageLoader:
    """An endless stream of `Images` of this rank, one for each step; arguments as `Loader`."""

    def __init__(
        self,
        folder: Path | str,
        *,
        cut: Cut,
        batch_rows: int,
        seed: int,
        split: str = "train",
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        workers: int = 0,
        mix: Mapping[str, float] | None = None,
    ) -> None:
        check_batch(batch_rows, world=world)
        self.manifest = Manifest.load(folder)
        require_images(self.manifest, folder)
        self.workers = workers
        self._steps = _Steps(
            folder=Path(folder),
            manifest=self.manifest,
            mixture=Mixture.of(self.manifest, split=split, seed=seed, mix=mix),
            split=split,
            cut=cut,
            seed=seed,
            first=start + rank * (batch_rows // world),
            local=batch_rows // world,
            stride=batch_rows,
        )

    def __iter__(self) -> Iterator[Images]:
        return from_workers(self._steps, self.workers) if self.workers else iter(self._steps)


@dataclass(frozen=True, kw_only=True)
class _Steps(IterableDataset[Images]):
    """The steps of a loader; of W worker processes, number w makes steps w, w + W, w + 2W, …"""

    folder: Path
    manifest: Manifest
    mixture: Mixture
    split: str
    cut: Cut
    seed: int
    first: int
    local: int
    stride: int

    def __iter__(self) -> Iterator[Images]:
        info = get_worker_info()
        step, workers = (info.id, info.num_workers) if info else (0, 1)
        reader = ImageReader(self.folder, self.manifest, split=self.split, random=True)
        while True:
            samples = self.first + step * self.stride + np.arange(self.local)
            sources, rows = self.mixture.rows(samples)
            yield self.images(reader, samples, sources, rows)
            step += workers

    def images(
        self, reader: ImageReader, samples: Integers, sources: Integers, rows: Integers
    ) -> Images:
        """Return random views of the rows; a file that cannot be decoded ends the run by name.

        The build has decoded every image, so a bad one is damage of the disk, not of the data.
        """
        from tokenizer.images import BadImage  # Pillow, which a model of codes runs without
        from visual_sentences.augment import random_view

        view, count = self.cut.view, len(samples)
        pixels = np.empty((count, view.size, view.size, 3), np.uint8)
        label, prefix = np.empty(count, np.int32), np.zeros(count, np.int32)
        for i, (sample, source, row) in enumerate(zip(samples, sources, rows, strict=True)):
            jpegs, label[i], keys = reader.row(int(source), int(row))
            random = np.random.Generator(np.random.Philox(seeded(self.seed, "view", int(sample))))
            chosen = int(random.integers(len(jpegs)))
            if self.cut.prefix:
                prefix[i] = random.integers(1, self.cut.places)
            try:
                pixels[i] = random_view(jpegs[chosen], view, random)
            except (BadImage, OSError) as error:
                raise CommandError(
                    f"{keys[chosen]} of {self.folder} cannot be decoded ({error}); run its build "
                    "again with --verify"
                ) from error
        return _images(pixels, label, prefix, np.asarray(sources), cut=self.cut)


def held_out_images(
    folder: Path | str,
    *,
    cut: Cut,
    rows: int,
    micro_rows: int,
    split: str = "val",
    rank: int = 0,
    world: int = 1,
) -> Iterator[Images]:
    """Yield the centres of `rows` images of a split, or of all if there are fewer, each once.

    Evenly spread and in order, with prefixes that depend on the place alone, so that validations
    can be compared. All ranks have as many steps; where rows run out, images of source -1 stand in,
    which count nothing.
    """
    from visual_sentences.augment import centre_view

    manifest = Manifest.load(folder)
    counts = np.array(list(manifest.rows(split).values()), np.int64)
    total = int(counts.sum())
    chosen = np.arange(min(rows, total)) * total // min(rows, total)
    sources = np.searchsorted(np.cumsum(counts), chosen, side="right")
    places = chosen - (np.cumsum(counts) - counts)[sources]
    reader = ImageReader(folder, manifest, split=split, random=False)
    size = cut.view.size
    for first in range(0, len(chosen), micro_rows * world):
        pixels = np.zeros((micro_rows, size, size, 3), np.uint8)
        label, prefix = np.full(micro_rows, -1, np.int32), np.zeros(micro_rows, np.int32)
        source = np.full(micro_rows, -1, np.int64)
        mine = range(first + rank, min(first + micro_rows * world, len(chosen)), world)
        for i, place in enumerate(mine):
            source[i] = sources[place]
            jpegs, label[i], _ = reader.row(int(source[i]), int(places[place]))
            pixels[i] = centre_view(jpegs[0], size)
            if cut.prefix:
                prefix[i] = 1 + seeded("held out", int(chosen[place])) % (cut.places - 1)
        yield _images(pixels, label, prefix, source, cut=cut)


def _images(
    pixels: np.ndarray, label: np.ndarray, prefix: np.ndarray, source: np.ndarray, *, cut: Cut
) -> Images:
    return Images(
        pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2),
        label=torch.from_numpy(label),
        prefix=torch.from_numpy(prefix),
        source=torch.from_numpy(source.astype(np.int32)),
        places=cut.places,
        step=cut.step,
    )
