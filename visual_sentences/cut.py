"""A source to what its units are made of: new items of a split, or new tars and Parquet files."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from tokenizer.cli import InputError
from visual_sentences.containers import Part, is_clip
from visual_sentences.job import Job
from visual_sentences.seeds import seeded
from visual_sentences.sentence import Item
from visual_sentences.sources import (
    Bad,
    in_seeded_order,
    is_streamed,
    list_items,
    part_sets,
    split_of,
)
from visual_sentences.spec import CLIPS, Source

GROUPED = ("category", "style")  # kinds whose sentences show few groups
LABELLED = ("image", "category")  # kinds whose groups are classes
Cut = tuple[str, list[Item], int]  # split, items, files


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A source as it was when a plan was made: all that cannot be used, and its classes."""

    bad: Sequence[Bad]
    classes: Sequence[str]


def identity_of(item: Item, source: Source) -> Any:
    """Return what tells an item from all others of its source, whatever is added to it later."""
    if is_streamed(source) or (len(source.origins) == 1 and source.kind not in CLIPS):
        return item.names
    # Of clips and pairs more may come later: frames, or another file for one of the roles.
    return item.stem, item.names[0] if is_clip(item.names[0]) else ""


def cut_items(
    source: Source, *, known: Set[Any], classes: Sequence[str], job: Job, rows: int
) -> tuple[list[Cut], Listed]:
    """List a folder or list, and cut its new items into units of one split."""
    together = part_sets(source)[0][0]
    listing = list_items(source, together)
    if not listing.inputs:
        raise InputError(f'source "{source.name}": {_nothing(source)}')
    new = [item for item in listing.items if identity_of(item, source) not in known]
    each = _items_per_unit(source, job, rows)
    splits: dict[str, list[Item]] = {"train": [], **{name: [] for name in source.splits}}
    for item in in_seeded_order(new, source=source, seed=job.seed):
        splits[split_of(item.stem, source.splits)].append(item)
    cut: list[Cut] = []
    for split, chosen in splits.items():
        if source.kind in GROUPED:
            chosen = _bunched(source, chosen, job=job)
        for first in range(0, len(chosen), each):
            some = chosen[first : first + each]
            cut.append((split, some, sum(len(item.names) for item in some)))
    return cut, Listed(
        bad=listing.bad,
        classes=_classes(classes, source, job, (item.group for item in listing.items)),
    )


def cut_parts(
    source: Source, *, known: Set[Any], classes: Sequence[str], job: Job, rows: int
) -> tuple[list[Cut], Listed]:
    """Put new tars or Parquet files into units, as many as the first with items says are needed."""
    sets, alone = part_sets(source)
    items = {}
    for together in sets:
        item = Item(next(iter(together.values())).id, tuple(p.name for p in together.values()))
        if identity_of(item, source) not in known:
            items[item] = sum(part.bytes for part in together.values())
    cut: list[Cut] = []
    if items:
        size, found, files = _sample(source, sets)
        for some in _by_size(items, _items_per_unit(source, job, rows) * size / found):
            images = sum(items[item] for item in some) * files / size
            cut.append(("", some, round(images)))
    labelled = job.form == "images" and source.kind in LABELLED
    groups = (i.group for s in sets for i in list_items(source, s).items) if labelled else ()
    return cut, Listed(bad=alone, classes=_classes(classes, source, job, groups))


def _sample(source: Source, sets: Sequence[Mapping[str, Part]]) -> tuple[int, int, int]:
    """Return bytes, items and files of the first set that has an item; damaged ones have none."""
    for together in sets:
        listing = list_items(source, together)
        if listing.items:
            size = sum(part.bytes for part in together.values())
            return max(1, size), len(listing.items), len(listing.order)
    return 1, 1, 0  # about one set a unit; there is nothing to encode


def _items_per_unit(source: Source, job: Job, rows: int) -> int:
    """Return how many items fill `rows` rows if all are good and no place is wasted."""
    n, roles = job.images_per_row, len(source.origins)
    passes = source.augment
    if source.kind in CLIPS:
        passes *= len(source.stride) * (2 if source.kind == "annotated_video" else 1)
    if job.form == "images" or source.kind in CLIPS:  # a row holds one
        return max(1, rows // passes)
    width = 2 if source.kind in ("colorize", "inpaint") else roles
    each = n // source.classes * source.classes if source.kind == "category" else n // width
    return max(1, rows * each // passes)


def _bunched(source: Source, items: Sequence[Item], *, job: Job) -> list[Item]:
    """Keep together what one sentence shows of a group; these bunches come in seeded order."""
    most = job.images_per_row // (source.classes if source.kind == "category" else 2)
    groups: defaultdict[str, list[Item]] = defaultdict(list)
    for item in items:
        groups[item.group].append(item)
    bunches = [
        (seeded(job.seed, source.name, "bunch", group, first), found[first : first + most])
        for group, found in groups.items()
        for first in range(0, len(found), most)
    ]
    bunches.sort(key=lambda bunch: (bunch[0], bunch[1][0].names))
    return [item for _, bunch in bunches for item in bunch]


def _by_size(sizes: Mapping[Item, int], wanted: float) -> Iterator[list[Item]]:
    """Yield consecutive items of about `wanted` bytes, at least one."""
    some: list[Item] = []
    size = 0
    for item, its in sizes.items():
        if some and size + its > wanted:
            yield some
            some, size = [], 0
        some.append(item)
        size += its
    if some:
        yield some


def _classes(before: Sequence[str], source: Source, job: Job, groups: Iterable[str]) -> list[str]:
    """Return the classes in the order of their labels; those there before keep theirs.

    None where all are whole numbers: these are the labels themselves.
    """
    if job.form != "images" or source.kind not in LABELLED:
        return []
    found = set(groups)
    if not before and all(group.isdecimal() for group in found):
        return []
    return [*before, *sorted(found - {*before, ""})]


def _nothing(source: Source) -> str:
    where = ", ".join(f"{role} = {origin.path}" for role, origin in source.origins.items())
    what = "a video or folder of images" if source.kind in CLIPS else "an image"
    return f"there is no file in {where} that could be {what}; wanted .jpg, .png, .webp, …"
