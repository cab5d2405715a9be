"""A list of files: a relative path a line, and behind a tab its class if it has one.

    frames/0001.png
    frames/0002.png	outdoors

Paths start at the list's own folder and stay below it. Empty lines are passed over.
"""

import os
import posixpath
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from visual_sentences.containers.names import OUTSIDE, entry_of, fault, is_clip, shown
from visual_sentences.containers.origin import Contents, Entry, Part


def contents(part: Part, *, clips: bool) -> Contents:
    """List what the lines name, in their order; a file that is not there is bad at once.

    Every suffix is taken for an image's, but those of video: whoever wrote the list meant the file.
    """
    entries: dict[str, Entry] = {}
    bad: list[tuple[str, str]] = []
    inside = _Inside(part.origin.path.parent)
    try:
        for name, group in _lines(part.origin.path):
            reason = "same name twice" if name in entries else fault(name) or inside.fault(name)
            if not reason and not clips and is_clip(name):
                reason = "not an image"
            if reason:
                bad.append((shown(name), reason))
            else:
                entries[name] = entry_of(name, group=group)
    except OSError:
        bad.append((part.origin.path.name, "unreadable list"))
    return Contents(entries=tuple(entries.values()), bad=tuple(bad))


def read(part: Part, names: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Yield each name with its path; who decodes it opens it."""
    for name in names:
        yield name, part.origin.path.parent / name


def _lines(path: Path) -> Iterator[tuple[str, str | None]]:
    """Yield (relative path without needless dots and slashes, class or None)."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for line in file:
            name, tab, group = line.rstrip("\r\n").partition("\t")
            if not name.strip():
                continue
            if ".." not in name.split("/"):  # normpath would take these away, and hide them
                name = posixpath.normpath(name)
            yield name, group.strip() if tab else None


class _Inside:
    """Tell whether names lead to files below a folder; looks at each folder once."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.root = os.path.realpath(folder)
        self.folders: dict[str, bool] = {}

    def fault(self, name: str) -> str:
        path = f"{self.folder}/{name}"
        above = os.path.dirname(path)
        if above not in self.folders:
            self.folders[above] = self._is_below(above)
        if not self.folders[above]:
            return OUTSIDE
        try:
            mode = os.lstat(path).st_mode
            if stat.S_ISLNK(mode):
                if not self._is_below(path):
                    return OUTSIDE
                mode = os.stat(path).st_mode
        except OSError:
            return "missing file"
        return "" if stat.S_ISREG(mode) else "not a file"

    def _is_below(self, path: str) -> bool:
        return os.path.commonpath((os.path.realpath(path), self.root)) == self.root
