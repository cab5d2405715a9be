"""What a source holds: which images, pairs and clips, and what cannot be used.

A folder or a list is listed as a whole when a build is planned. Tars and Parquet files are listed
one by one, each by the worker that encodes it, so that their number has no bound. Parts of several
roles belong together where their ids are equal.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenizer.cli import InputError
from tokenizer.images import natural_key
from visual_sentences.containers import contents, is_clip, parts
from visual_sentences.containers.origin import Contents, Entry, Part
from visual_sentences.layouts import SHORTEST_CLIP
from visual_sentences.seeds import seeded
from visual_sentences.sentence import Item
from visual_sentences.spec import CLIPS, Source

Bad = tuple[str, str]  # name, reason
Parts = Mapping[str, Part]  # one a role


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The items of one set of parts, and the files that no item can use.

    `inputs` counts files, `order` has the place of each name where the parts are stored.
    """

    items: Sequence[Item]
    inputs: int
    bad: Sequence[Bad]
    order: Mapping[str, int]


def is_streamed(source: Source) -> bool:
    """Say whether workers list the parts; raises InputError where roles are stored differently."""
    ways = {origin.kind in ("tar", "parquet") for origin in source.origins.values()}
    if len(ways) > 1:
        raise InputError(
            f'source "{source.name}": some of its paths are folders or lists, others tars or '
            "Parquet files, whose images cannot be matched; wanted the same for all of them"
        )
    return ways.pop()


def part_sets(source: Source) -> tuple[list[Parts], list[Bad]]:
    """Return the parts that belong together, in natural order, and those that are alone."""
    found = {role: parts(origin) for role, origin in source.origins.items()}
    if not is_streamed(source):
        return [{role: listed[0] for role, listed in found.items()}], []
    by_id = {role: {part.id: part for part in listed} for role, listed in found.items()}
    first = next(iter(by_id.values()))
    whole = [id for id in first if all(id in ids for ids in by_id.values())]
    sets: list[Parts] = [{role: ids[id] for role, ids in by_id.items()} for id in whole]
    alone = [
        (_named(source, role, part.name), f"no part of this name in {other}")
        for role, ids in by_id.items()
        for id, part in ids.items()
        for other in [next((r for r, theirs in by_id.items() if id not in theirs), None)]
        if other is not None
    ]
    return sets, alone


def list_items(source: Source, together: Parts) -> Listing:
    """List one set of parts. Items come in seeded order later; here they are as stored."""
    clips = source.kind in CLIPS
    found = {role: contents(part, clips=clips) for role, part in together.items()}
    bad = [(_named(source, role, name), why) for role, c in found.items() for name, why in c.bad]
    entries = {role: _with_role(source, role, c) for role, c in found.items()}
    if clips:
        items, unmatched = _clips(entries)
    elif len(entries) > 1:
        items, unmatched = _matched(entries)
    else:
        only = next(iter(entries.values()))
        items, unmatched = [Item(e.stem, (e.name,), e.group) for e in only], []
    names = [entry.name for listed in entries.values() for entry in listed]
    return Listing(
        items=items,
        inputs=len(names) + len(bad),
        bad=[*bad, *unmatched],
        order={name: place for place, name in enumerate(names)},
    )


def in_seeded_order(items: Sequence[Item], *, source: Source, seed: int) -> list[Item]:
    """Sort by what depends on the seed and an item alone: one more item moves no other."""
    return sorted(items, key=lambda item: (seeded(seed, source.name, item.stem), item.names))


def split_of(stem: str, splits: Mapping[str, float]) -> str:
    """Choose the split by the stem alone, so that an item is in the same split in every source."""
    place, edge = seeded("split", stem) / 2**64, 0.0
    for name, share in splits.items():
        edge += share
        if place < edge:
            return name
    return "train"


def role_of(source: Source, name: str) -> tuple[str, str]:
    """Return the role that a name of `source` belongs to, and the name in its part."""
    if len(source.origins) == 1:
        return next(iter(source.origins)), name
    role, _, rest = name.partition("/")
    return role, rest


def _named(source: Source, role: str, name: str) -> str:
    return name if len(source.origins) == 1 else f"{role}/{name}"


def _with_role(source: Source, role: str, found: Contents) -> Sequence[Entry]:
    if len(source.origins) == 1:
        return found.entries
    return [Entry(f"{role}/{e.name}", e.stem, e.group) for e in found.entries]


def _matched(found: Mapping[str, Sequence[Entry]]) -> tuple[list[Item], list[Bad]]:
    """Join the entries of equal stems, one of each role; the group is that of the first role."""
    bad: list[Bad] = []
    by_stem: dict[str, dict[str, Entry]] = {}
    for role, entries in found.items():
        by_stem[role] = {}
        for entry in entries:
            if entry.stem in by_stem[role]:
                bad.append((entry.name, "same name twice"))
            else:
                by_stem[role][entry.stem] = entry
    items = []
    for role, entries_of in by_stem.items():
        for stem, entry in entries_of.items():
            missing = next((other for other in by_stem if stem not in by_stem[other]), None)
            if missing is not None:
                bad.append((entry.name, f"missing {_one(missing)}"))
            elif role == next(iter(by_stem)):
                names = tuple(by_stem[r][stem].name for r in by_stem)
                items.append(Item(stem, names, entry.group))
    return items, bad


def _one(role: str) -> str:
    return {"inputs": "input", "targets": "target", "frames": "frame"}.get(role, role)


def _clips(found: Mapping[str, Sequence[Entry]]) -> tuple[list[Item], list[Bad]]:
    """Join frames to clips, and clips of equal names of all roles.

    A clip is a file of video, or the images directly in one folder, or the images of one WebDataset
    sample; frames are in natural order, and one that some role has not got is not used.
    """
    bad: list[Bad] = []
    by_clip = {
        role: _frames(entries, bad, alone=len(found) == 1) for role, entries in found.items()
    }
    items = []
    for clip in dict.fromkeys(clip for clips in by_clip.values() for clip in clips):
        frames = {role: clips.get(clip, {}) for role, clips in by_clip.items()}
        shared = set.intersection(*(set(of_role) for of_role in frames.values()))
        stem, video = clip
        enough = bool(video) or len(shared) >= SHORTEST_CLIP
        for of_role in frames.values():
            for frame, name in of_role.items():
                missing = next((_one(r) for r, other in frames.items() if frame not in other), "")
                if missing:
                    bad.append((name, f"missing {missing}"))
                elif not enough:
                    bad.append((name, "clip too short"))
        if shared and enough:
            names = tuple(n for f in frames.values() for frame, n in f.items() if frame in shared)
            items.append(Item(stem, names))
    return items, bad


def _frames(
    entries: Sequence[Entry], bad: list[Bad], *, alone: bool
) -> dict[tuple[str, str], dict[str, str]]:
    """Return the names of each clip's frames by what tells them apart, in natural order.

    Clips are known by their stem, and files of video by something else besides: their name where no
    other role has to have them too.
    """
    times = Counter(entry.stem for entry in entries)
    clips: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for entry in entries:
        folder, _, frame = entry.stem.rpartition("/")
        clip = folder or ".", ""
        if is_clip(entry.name):
            clip, frame = (entry.stem, entry.name if alone else "video"), ""
        elif times[entry.stem] > 1 and _numbered(entry):
            clip, frame = (entry.stem, ""), _numbered(entry)
        if frame in clips[clip]:
            bad.append((entry.name, "same name twice"))
        else:
            clips[clip][frame] = entry.name
    return {
        clip: dict(sorted(frames.items(), key=lambda frame: natural_key(frame[0])))
        for clip, frames in clips.items()
    }


def _numbered(entry: Entry) -> str:
    """Return what numbers a frame in a WebDataset sample, 0003 of walk.0003.jpg, else nothing."""
    last, end = entry.name.rpartition("/")[2], entry.stem.rpartition("/")[2]
    return last.removeprefix(f"{end}.").rpartition(".")[0]
