"""A folder of images and clips, and all folders below it."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizer.images import SUFFIXES as IMAGES
from tokenizer.images import natural_key
from visual_sentences.containers.names import CLIPS, OUTSIDE, entry_of, fault, shown, suffix_of
from visual_sentences.containers.origin import Contents, Part


def contents(part: Part, *, clips: bool) -> Contents:
    """List a folder in natural order, without opening or measuring a file.

    Files of other kinds and hidden ones are passed over. A link to a file counts as the file, as
    long as that is below the folder: no name reads what is outside. A link to a folder is refused:
    if what it leads to is below, it is listed there.
    """
    suffixes = IMAGES | CLIPS.keys() if clips else IMAGES
    names: list[str] = []
    bad: list[tuple[str, str]] = []
    for name, reason in _walk(str(part.origin.path), suffixes):
        reason = reason or fault(name)
        if reason:
            bad.append((shown(name), reason))
        else:
            names.append(name)
    names.sort(key=natural_key)
    return Contents(entries=tuple(map(entry_of, names)), bad=tuple(sorted(bad)))


def read(part: Part, names: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Yield each name with its path; who decodes it opens it."""
    for name in names:
        yield name, part.origin.path / name


def _walk(top: str, suffixes: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Yield (relative name, "") of all files, and (name, reason) of what must not be opened."""
    root = os.path.realpath(top)
    left = [(top, "")]
    while left:
        folder, prefix = left.pop()
        try:
            with os.scandir(folder) as found:
                for item in found:
                    name = prefix + item.name
                    linked = item.is_symlink()
                    if linked and os.path.isdir(item.path):
                        yield name, _wrong_link(item.path, root) or "link to a folder"
                    elif not linked and item.is_dir():
                        left.append((item.path, name + "/"))
                    elif item.name[0] == "." or suffix_of(item.name) not in suffixes:
                        continue
                    elif linked and (reason := _wrong_link(item.path, root)):
                        yield name, reason
                    else:
                        yield name, "" if item.is_file() else "not a file"
        except OSError:
            yield prefix.rstrip("/") or ".", "unreadable folder"


def _wrong_link(path: str, root: str) -> str:
    real = os.path.realpath(path)
    if os.path.commonpath((real, root)) != root:
        return OUTSIDE
    return "" if os.path.exists(real) else "missing file"
