"""Rows of shards to pictures: codes by the tokenizer that made them, JPEG files as they are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from tokenizer.cli import CommandError
from tokenizer.images import BadImage, encode_image, read_image
from visual_sentences.image_shards import open_images
from visual_sentences.manifest import Manifest
from visual_sentences.pack import Rows
from visual_sentences.page import Place
from visual_sentences.reading import Reader

if TYPE_CHECKING:
    from tokenizer.protocol import Tokenizer

CHUNK = 64  # images decoded at once
EXACT = 128  # pixels up to which pictures are PNG; 800 of 256 would be 100 MB, as JPEG 20 MB


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """A row as pictures: `counts` images a sentence; one key, PNG or JPEG file and array each."""

    counts: Sequence[int]
    keys: Sequence[str]
    files: Sequence[bytes]
    pixels: np.ndarray  # uint8 [images, H, W, 3]
    label: int = -1


def of_codes(
    folder: Path, manifest: Manifest, places: Sequence[Place], tok: "Tokenizer"
) -> Iterator[Decoded]:
    """Decode rows of codes one after another; memory is that of one row."""
    reader = Reader(folder, manifest, split=places[0].split, random=False)
    for place in places:
        rows = reader.read(np.array([place.source]), np.array([place.row]))
        pixels = decode_row(rows, tok, codes_per_image=manifest.codes_per_image)
        edges = [start for start in rows.starts[0].tolist() if start >= 0]
        edges.append(int(rows.length[0]))
        format = "PNG" if pixels.shape[1] <= EXACT else "JPEG"
        yield Decoded(
            counts=[(end - start) // manifest.codes_per_image for start, end in pairwise(edges)],
            keys=reader.keys(place.source, place.row),
            files=[encode_image(image, format=format) for image in pixels],
            pixels=pixels,
        )


def decode_row(rows: Rows, tok: "Tokenizer", *, codes_per_image: int) -> np.ndarray:
    """Return uint8 [images, H, W, 3] of the one row in `rows`."""
    codes = rows.tokens[0, : int(rows.length[0])].long().reshape(-1, codes_per_image)
    chunks = [
        tok.decode(chunk).mul(255).round().byte().permute(0, 2, 3, 1).cpu()
        for chunk in codes.split(CHUNK)
    ]
    return torch.cat(chunks).numpy()


def of_images(folder: Path, manifest: Manifest, places: Sequence[Place]) -> Iterator[Decoded]:
    """Read rows of JPEG files; the page gets them as they are stored."""
    opened = lru_cache(8)(open_images)
    for place in places:
        shard = opened(folder / place.shard.name)
        files = shard.jpegs(place.at)
        try:
            pixels = np.stack([read_image(file, size=manifest.image_size) for file in files])
        except BadImage as error:
            raise CommandError(
                f"row {place.at} of the shard {folder / place.shard.name} is damaged ({error}); "
                "delete it and run its build again"
            ) from error
        yield Decoded(
            counts=[len(files)],
            keys=shard.keys(place.at),
            files=files,
            pixels=pixels,
            label=int(shard.labels[place.at]),
        )
