"""Labelled images: image shards with classes, or a tree split/CLASS/picture.

A picture's label is its class in the manifest, or its folder, or what `label_by` finds in its key.
n images, K classes.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lvm.evaluation.in_context import group_keys
from lvm.probing.trunk import View
from tokenizer.cli import CommandError, InputError
from tokenizer.images import BadImage, list_images, read_image
from visual_sentences import augment
from visual_sentences.image_loader import ImageReader
from visual_sentences.image_shards import open_images
from visual_sentences.manifest import FILE, Manifest
from visual_sentences.seeds import seeded


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """The images of one split."""

    read: Callable[[int], bytes]
    labels: np.ndarray  # int64 [n], 0 … K - 1
    keys: Sequence[str]
    classes: tuple[str, ...]
    id: str  # changes with any image, their order or their number; not with labels

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(
        self,
        index: int,
        *,
        size: int,
        view: View,
        random: augment.View | None = None,
        seed: int = 0,
    ) -> np.ndarray:
        """Return an image as uint8 [size, size, 3]; `random` draws a view of it by `seed`.

        centre: shorter side to size / 0.875, the centre cut out, as AIM is evaluated. squash: the
        whole picture, its sides made equal, as LVM's tokenizers read. Raises CommandError for a
        file that cannot be decoded.
        """
        file = self.read(index)
        try:
            if random is not None:
                draw = np.random.Generator(np.random.Philox(seeded(seed, self.keys[index])))
                return augment.random_view(file, random, draw)
            if view == "centre":
                return augment.centre_view(file, size)
            return read_image(file, size=size, preprocess="squash")
        except (BadImage, OSError, SyntaxError, ValueError) as error:
            raise CommandError(
                f"{self.keys[index]} cannot be decoded ({error}); take it out, or mend it, and run "
                "the command again"
            ) from error


def open_split(folder: Path | str, split: str, *, source: str = "", label_by: str = "") -> Labelled:
    """Read keys and labels of a split; images are read when they are asked for.

    Raises InputError where there is no such split, or no image of it has a label.
    """
    folder = Path(folder)
    if (folder / FILE).is_file():
        found = _shards(folder, split, source)
    else:
        if source:
            raise InputError(f"--source {source}: {folder} has no {FILE}, so it has no sources")
        found = _tree(folder, split)
    return _labelled_by(found, label_by, split) if label_by else _with_label(found, split)


def same_classes(train: Labelled, val: Labelled) -> tuple[Labelled, Labelled]:
    """Number the classes of both splits alike; refuses a class that training never shows."""
    names = sorted({train.classes[k] for k in np.unique(train.labels).tolist()})
    if train.classes == val.classes:
        names = [n for n in train.classes if n in set(names)]
    shown = {val.classes[k] for k in np.unique(val.labels).tolist()}
    if missing := sorted(shown - set(names)):
        raise InputError(
            f"{len(missing)} classes of the probed split have no image to learn from, such as "
            f"{missing[0]}; wanted splits of the same classes"
        )
    if len(names) < 2:
        raise InputError(f"there is one class, {names[0]}: nothing to tell apart")
    number = {name: i for i, name in enumerate(names)}
    return _renumbered(train, number), _renumbered(val, number)


def _renumbered(data: Labelled, number: dict[str, int]) -> Labelled:
    new = np.array([number.get(name, -1) for name in data.classes], np.int64)
    return _replaced(data, labels=new[data.labels], classes=tuple(number))


def _replaced(data: Labelled, *, labels: np.ndarray, classes: tuple[str, ...]) -> Labelled:
    return Labelled(read=data.read, labels=labels, keys=data.keys, classes=classes, id=data.id)


def _labelled_by(data: Labelled, pattern: str, split: str) -> Labelled:
    try:
        names = group_keys(data.keys, pattern)
    except InputError as error:
        raise InputError(str(error).replace("--group-by", "--label-by")) from error
    classes, labels = np.unique(names, return_inverse=True)
    return _replaced(data, labels=labels.astype(np.int64), classes=tuple(map(str, classes)))


def _with_label(data: Labelled, split: str) -> Labelled:
    """Leave out the images without a label; refuses a split of such images alone."""
    keep = np.flatnonzero(data.labels >= 0)
    if not len(keep):
        raise InputError(
            f"no image of split {split} has a label; wanted image shards of sources whose folders "
            "are classes, a tree SPLIT/CLASS/picture, or --label-by"
        )
    if len(keep) == len(data):
        return data
    digest = hashlib.sha256(data.id.encode() + keep.tobytes()).hexdigest()
    read = data.read
    return Labelled(
        read=lambda i: read(int(keep[i])),
        labels=data.labels[keep],
        keys=[data.keys[i] for i in keep.tolist()],
        classes=data.classes,
        id=digest,
    )


def _shards(folder: Path, split: str, source: str) -> Labelled:
    manifest = Manifest.load(folder)
    names = [s.name for s in manifest.sources]
    if source and source not in names:
        raise InputError(f"--source {source}: {folder} has {', '.join(names)}")
    if not source and len(names) > 1:
        raise InputError(
            f"{folder} has several sources, each with classes of its own ({', '.join(names)}): "
            "choose one by --source"
        )
    place = names.index(source or names[0])
    reader = ImageReader(folder, manifest, split=split, random=False)
    labels, keys = [], []
    for entry in manifest.shards_of(names[place], split):
        shard = open_images(folder / entry.name)
        labels.append(shard.labels)
        keys += [row[0] for row in shard.names.to_pylist()]
    if not keys:
        raise InputError(
            f'there are no images of split "{split}"; {folder} has {", ".join(manifest.splits)}: '
            "build it with splits, as splits = {val = 0.1}"
        )
    found = np.concatenate(labels).astype(np.int64)
    classes = manifest.sources[place].classes or tuple(map(str, range(int(found.max()) + 1)))
    return Labelled(
        read=lambda i: reader.row(place, i)[0][0],
        labels=found,
        keys=keys,
        classes=classes,
        id=f"{manifest.hash} {names[place]} {split}",
    )


def _tree(folder: Path, split: str) -> Labelled:
    top = folder / split
    if not top.is_dir():
        raise InputError(
            f"{folder} has neither {FILE} nor a folder {split}; wanted image shards of "
            "`python -m visual_sentences.build --images`, or pictures as "
            f"{split}/CLASS/picture.jpg"
        )
    classes = sorted(p.name for p in top.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = [(k, path) for k, name in enumerate(classes) for path in list_images(top / name)]
    if not files:
        raise InputError(f"there are no pictures in {top}; wanted {top}/CLASS/picture.jpg")
    digest = hashlib.sha256()
    for _, path in files:  # contents are not read: ImageNet's are 150 GB
        facts = path.stat()
        name = path.relative_to(top).as_posix()
        digest.update(f"{name} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return Labelled(
        read=lambda i: files[i][1].read_bytes(),
        labels=np.array([k for k, _ in files], np.int64),
        keys=[path.relative_to(top).as_posix() for _, path in files],
        classes=tuple(classes),
        id=digest.hexdigest(),
    )
