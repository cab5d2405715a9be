"""What is in the folders of a source: which images, pairs and clips, and what cannot be used."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizer.cli import InputError
from tokenizer.images import list_images
from visual_sentences.layouts import SHORTEST_CLIP, seeded
from visual_sentences.sentence import Sample
from visual_sentences.spec import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The items of a source in seeded order, and the images that no item can use.

    `inputs` counts image files, `bad` has a key and a reason for each unusable one.
    """

    items: Sequence[Sample]
    inputs: int
    bad: Sequence[tuple[str, str]]

    def digest(self) -> str:
        """Return what changes when a file is added, taken away or renamed."""
        names = hashlib.sha256()
        for item in self.items:
            names.update(
                "\0".join((item.stem, *item.keys, "\n")).encode("utf-8", "surrogateescape")
            )
        for key, reason in self.bad:
            names.update(f"{key}\0{reason}\n".encode("utf-8", "surrogateescape"))
        return names.hexdigest()


def list_source(source: Source, *, seed: int) -> Listing:
    """List a source; raises InputError where a folder has no image in it.

    The seeded order depends on the seed and each item's name alone, so that an item which is added
    moves no other relative to its neighbours.
    """
    found = {role: _relative_names(folder) for role, folder in source.folders.items()}
    for role, names in found.items():
        if not names:
            raise InputError(
                f'source "{source.name}": there is no image file in {role} = '
                f"{source.folders[role]}; wanted .jpg, .png, .webp, … in it or below it"
            )
    if source.kind == "pair":
        items, bad = _pairs(found)
    elif source.kind == "video":
        items, bad = _clips(found["path"])
    else:
        items, bad = [Sample(_stem(name), (name,)) for name in found["path"]], []
    items.sort(key=lambda item: (seeded(seed, source.name, item.stem), item.keys))
    return Listing(items=items, inputs=sum(map(len, found.values())), bad=bad)


def path_of(source: Source, key: str) -> Path:
    """Return the file that a key of `source` names."""
    if source.kind == "pair":
        role, _, name = key.partition("/")
        return source.folders[role] / name
    return source.folders["path"] / key


def split_of(stem: str, splits: Mapping[str, float]) -> str:
    """Choose the split by the stem alone, so that an item is in the same split in every source."""
    place, edge = seeded("split", stem) / 2**64, 0.0
    for name, share in splits.items():
        edge += share
        if place < edge:
            return name
    return "train"


def _relative_names(folder: Path) -> list[str]:
    cut = len(str(folder)) + 1
    return [str(path)[cut:] for path in list_images(folder)]


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _pairs(found: Mapping[str, list[str]]) -> tuple[list[Sample], list[tuple[str, str]]]:
    """Match inputs and targets by relative path without suffix; keys carry the role in front."""
    bad = []
    keys: dict[str, dict[str, str]] = {role: {} for role in found}
    for role, names in found.items():
        for name in names:
            if _stem(name) in keys[role]:
                bad.append((f"{role}/{name}", "same name twice"))
            else:
                keys[role][_stem(name)] = f"{role}/{name}"
    inputs, targets = keys["inputs"], keys["targets"]
    bad += [(key, "missing target") for stem, key in inputs.items() if stem not in targets]
    bad += [(key, "missing input") for stem, key in targets.items() if stem not in inputs]
    both = [Sample(stem, (key, targets[stem])) for stem, key in inputs.items() if stem in targets]
    return both, bad


def _clips(names: list[str]) -> tuple[list[Sample], list[tuple[str, str]]]:
    """Make one clip of every folder that has images directly in it, frames in natural order."""
    clips: dict[str, list[str]] = {}
    for name in names:
        clips.setdefault(name.rpartition("/")[0] or ".", []).append(name)
    bad = [(f, "clip too short") for frames in clips.values() for f in _too_short(frames)]
    items = [Sample(clip, tuple(f)) for clip, f in clips.items() if not _too_short(f)]
    return items, bad


def _too_short(frames: list[str]) -> list[str]:
    return frames if len(frames) < SHORTEST_CLIP else []
