"""Features of images: computed once and kept on disk, or anew each time they are wanted.

    pooled  [C, D]  the mean over positions of the mean of a set of blocks, for C such sets
    tokens  [N, D]  the mean of one set of blocks at every position

A cache is a folder whose name carries a hash of all that its features depend on: the weights, the
images and their order, how they are cut out, the blocks, the number types. It holds `features.json`
and parts `00000.npy`, …, each written whole or not at all, so any number of processes may fill it,
be killed, and fill it again.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from lvm.probing.data import Labelled
from lvm.probing.trunk import Trunk
from tokenizer.cli import CommandError, InputError, Progress
from tokenizer.files import atomic_write
from visual_sentences.augment import View
from visual_sentences.seeds import seeded

FORMAT, VERSION, META = "lvm-probe-features", 1, "features.json"
PART_BYTES = 1 << 28
SLACK = 1 << 26  # bytes of the disk that are left to others

Dtype = Literal["fp32", "fp16"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """Which features: pooled of each of `sets`, or, of a single set, those of all positions."""

    sets: tuple[tuple[int, ...], ...]
    tokens: bool = False
    precision: Precision = "fp32"
    """What the trunk computes in: bf16 is torch's autocast, as AIM trains."""

    def shape(self, trunk: Trunk) -> tuple[int, int]:
        """Shape of one image's features."""
        return (trunk.positions if self.tokens else len(self.sets), trunk.width)

    @torch.no_grad()
    def compute(self, trunk: Trunk, images: Tensor) -> Tensor:
        """Return fp32 [B, N, D] or [B, C, D] of images uint8 [B, 3, H, W]."""
        blocks = sorted(set().union(*self.sets))
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            streams = dict(zip(blocks, trunk.features(images, blocks), strict=True))
        if self.tokens:
            return mean_of([streams[i] for i in self.sets[0]])
        pooled = {i: stream.float().mean(1) for i, stream in streams.items()}
        return torch.stack([mean_of([pooled[i] for i in chosen]) for chosen in self.sets], 1)


def mean_of(streams: Sequence[Tensor]) -> Tensor:
    """Return the plain mean of blocks' outputs, fp32."""
    return torch.stack([stream.float() for stream in streams]).mean(0)


class Features(Protocol):
    """Features of the images of a split."""

    def __len__(self) -> int: ...

    def batch(self, rows: np.ndarray, epoch: int = 0) -> Tensor:
        """Return fp32 [b, …] of images `rows` [b] on the device; random views depend on `epoch`."""


class Pictures:
    """Batches of decoded images, the next read by threads while one is in use."""

    def __init__(
        self,
        data: Labelled,
        trunk: Trunk,
        *,
        workers: int,
        random: View | None = None,
        seed: int = 0,
    ) -> None:
        self.data, self.trunk, self.random, self.seed = data, trunk, random, seed
        self.pool = ThreadPoolExecutor(max(1, workers))

    def start(self, rows: Sequence[int] | np.ndarray, epoch: int = 0) -> list[Future[np.ndarray]]:
        seed = seeded(self.seed, "view", epoch) if self.random is not None else 0
        return [
            self.pool.submit(
                self.data.pixels,
                int(i),
                size=self.trunk.image_size,
                view=self.trunk.view,
                random=self.random,
                seed=seed,
            )
            for i in rows
        ]

    def batches(self, rows: np.ndarray, batch: int) -> Iterator[Tensor]:
        """Yield uint8 [b, 3, H, W] of `rows` in order."""
        cuts = [rows[i : i + batch] for i in range(0, len(rows), batch)]
        ahead = self.start(cuts[0])
        for i in range(len(cuts)):
            now, ahead = ahead, self.start(cuts[i + 1]) if i + 1 < len(cuts) else []
            yield stacked(now)


def stacked(futures: Sequence[Future[np.ndarray]]) -> Tensor:
    return torch.from_numpy(np.stack([f.result() for f in futures])).permute(0, 3, 1, 2)


class Streamed:
    """Features that are computed whenever they are wanted, of random views if `random` is given."""

    def __init__(
        self,
        trunk: Trunk,
        data: Labelled,
        form: Form,
        *,
        device: torch.device,
        batch: int,
        workers: int,
        random: View | None = None,
        seed: int = 0,
    ) -> None:
        self.trunk, self.form, self.device, self.step = trunk, form, device, batch
        self.pictures = Pictures(data, trunk, workers=workers, random=random, seed=seed)

    def __len__(self) -> int:
        return len(self.pictures.data)

    def batch(self, rows: np.ndarray, epoch: int = 0) -> Tensor:
        images = stacked(self.pictures.start(rows, epoch))
        parts = images.split(self.step)
        return torch.cat([self.form.compute(self.trunk, p.to(self.device)) for p in parts])


class Cache:
    """The features of a split on disk. Reading maps the parts; nothing is held in memory."""

    def __init__(
        self,
        folder: Path,
        trunk: Trunk,
        data: Labelled,
        form: Form,
        *,
        split: str,
        dtype: Dtype,
        device: torch.device,
    ) -> None:
        self.trunk, self.data, self.form, self.device = trunk, data, form, device
        self.type = np.dtype(np.float16 if dtype == "fp16" else np.float32)
        self.shape = form.shape(trunk)
        self.rows = max(1, min(4096, PART_BYTES // (self.row_bytes)))
        self.meta = {
            "format": FORMAT,
            "version": VERSION,
            "model": trunk.id,
            "data": data.id,
            "view": f"{trunk.view} {trunk.image_size}",
            "sets": [list(chosen) for chosen in form.sets],
            "tokens": form.tokens,
            "precision": form.precision,
            "dtype": dtype,
            "images": len(data),
            "shape": list(self.shape),
            "part_rows": self.rows,
        }
        key = hashlib.sha256(json.dumps(self.meta, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = folder / f"{split}-{'tokens' if form.tokens else 'pooled'}-{key}"
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.data)

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.type.itemsize

    @property
    def missing(self) -> list[int]:
        """Parts that are not there yet."""
        return [p for p in range(-(-len(self) // self.rows)) if not self._path(p).is_file()]

    @property
    def missing_bytes(self) -> int:
        rows = sum(min(self.rows, len(self) - p * self.rows) for p in self.missing)
        return rows * self.row_bytes

    def fill(
        self, *, batch: int, workers: int, rank: int = 0, world: int = 1, show: bool = False
    ) -> None:
        """Compute what is missing, of it every `world`-th part from part `rank` on.

        Raises InputError where the disk has no room, and where the folder holds other features.
        """
        self._claim()
        missing = self.missing
        if not missing:
            return
        have = shutil.disk_usage(self.folder).free
        if self.missing_bytes > max(0, have - SLACK):
            raise InputError(
                f"features of {len(self)} images take {size(self.missing_bytes)} more in "
                f"{self.folder.parent}, and {size(have)} are free; give --cache on a larger disk, "
                "--dtype fp16, or --stream, which keeps none for the attentive probe"
            )
        mine = [part for part in missing if part % world == rank]  # whenever the others began
        pictures = Pictures(self.data, self.trunk, workers=workers)
        total = sum(min(self.rows, len(self) - p * self.rows) for p in mine)
        with Progress(self.folder.name, total=total, unit="images", enabled=show) as progress:
            for part in mine:
                rows = np.arange(part * self.rows, min(len(self), (part + 1) * self.rows))
                found = []
                for images in pictures.batches(rows, batch):
                    features = self.form.compute(self.trunk, images.to(self.device))
                    found.append(self._stored(features))
                    progress.update(len(images))
                with atomic_write(self._path(part)) as file:
                    np.save(file, np.concatenate(found))

    def batch(self, rows: np.ndarray, epoch: int = 0) -> Tensor:
        out = np.empty((len(rows), *self.shape), self.type)
        part, inner = np.divmod(rows, self.rows)
        for p in np.unique(part):
            there = part == p
            out[there] = self._map(int(p))[inner[there]]
        return torch.from_numpy(out).to(self.device).float()

    def _path(self, part: int) -> Path:
        return self.folder / f"{part:05d}.npy"

    def _map(self, part: int) -> np.ndarray:
        if part not in self._maps:
            try:
                found = np.load(self._path(part), mmap_mode="r")
            except (FileNotFoundError, ValueError) as error:
                raise CommandError(
                    f"{self._path(part)} is missing or damaged ({error}); delete it and run the "
                    "command again"
                ) from error
            rows = min(self.rows, len(self) - part * self.rows)
            if found.shape != (rows, *self.shape) or found.dtype != self.type:
                raise CommandError(
                    f"{self._path(part)} holds {found.dtype} {list(found.shape)}, wanted "
                    f"{self.type} {[rows, *self.shape]}; delete it and run the command again"
                )
            self._maps[part] = found
        return self._maps[part]

    def _stored(self, features: Tensor) -> np.ndarray:
        with np.errstate(over="ignore"):  # an error of ours says more
            found = features.cpu().numpy().astype(self.type)
        if not np.isfinite(found).all():
            most = float(features.abs().max())
            raise CommandError(
                f"features of up to {most:.3g} do not fit {self.type}; use --dtype fp32"
                if np.isfinite(most)
                else "the model's features are not finite; its weights are damaged, or --precision "
                "fp32 is wanted"
            )
        return found

    def _claim(self) -> None:
        """Write what the folder holds, or compare: a cache of anything else is never read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / META
        if not path.is_file():
            with atomic_write(path, "w") as file:
                json.dump(self.meta, file, indent=1)
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found != self.meta:
            other = [k for k in self.meta if found.get(k) != self.meta[k]]
            raise InputError(
                f"{self.folder} holds features of another {', '.join(other) or 'kind'}; delete the "
                "folder, or give another --cache"
            )


def size(count: float) -> str:
    """Write bytes as 3.1 GiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
