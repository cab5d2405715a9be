"""Rows of codes by place: from a map of the file, or by one read each.

    mmap    copies from the mapped shard; the quickest once its pages have been touched
    pread   reads a row's codes by the manifest's offset, all rows of a batch asked for beforehand

Random rows of 8 KiB in batches of 16 from 0.5 GB on a local virtual disk, page cache emptied, over
a map with MADV_RANDOM (2026-11-22, Linux 6.18, medians of 4 interleaved rounds of 1024 rows): pread
2.5 times as fast, pread of rows asked for beforehand 5. So `auto` reads on network disks, and for
random rows of more data than the memory keeps; else it maps. `python -m
visual_sentences.bench_loader --disk DIR` compares them on a disk of yours.
"""

import os
import resource
from collections import OrderedDict
from io import FileIO
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from tokenizer.cli import CommandError, InputError
from visual_sentences.manifest import Manifest
from visual_sentences.pack import Rows
from visual_sentences.sampler import Integers
from visual_sentences.shards import Shard, code_type, open_shard

Read = Literal["auto", "mmap", "pread"]

NETWORK = frozenset({
    "9p", "afs", "beegfs", "ceph", "cifs", "fuse", "gpfs", "lustre", "ncpfs", "nfs", "nfs4",
    "orangefs", "panfs", "pvfs2", "smb3", "smbfs", "virtiofs", "wekafs",
})  # fmt: skip
"""File systems over a network, as Linux names them; with fuse.sshfs and the like."""
MIXED = "were files of two builds mixed? Run its build again with --verify"
MOST = 16_384  # shards open at once where the system allows more; a process has 65,530 maps at most


def file_system(path: Path | str, mounts: str) -> str:
    """Return the type of the file system that holds `path`; `mounts` as /proc/self/mountinfo."""
    place, found, best = os.path.realpath(path), "", -1
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        point = left.split(" ")[4].encode().decode("unicode_escape")  # a space is written \040
        inside = place == point or place.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= best:  # of two mounts on one point the later hides the earlier
            found, best = right.split(" ")[0], len(point)
    return found


def mounted() -> str:
    """Return what this process has mounted, as Linux writes it; empty on other systems."""
    try:
        return Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def way_to_read(
    folder: Path | str, *, size: int, random: bool, mounts: str
) -> Literal["mmap", "pread"]:
    """Choose for `size` bytes of codes in `folder`; without a list of mounts the disk is local.

    Half of the memory is what a page cache may hope for beside a training.
    """
    kind = file_system(folder, mounts)
    network = kind in NETWORK or kind.startswith("fuse.")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return "pread" if network or (random and size > memory // 2) else "mmap"


def require_codes(manifest: Manifest, folder: Path | str) -> None:
    """Raise InputError where a build made image shards, which hold no codes."""
    if manifest.form != "codes":
        raise InputError(
            f"{folder} holds {manifest.form}, wanted codes: build it again without --images and "
            "with --tokenizer"
        )


class Reader:
    """Rows of one split by (source, row). Shards are opened on first use.

    `random` says that rows will be asked for in no order. At most as many shards are open as half
    of the system's limit on file descriptors allows; the one unused for longest is closed first.
    """

    def __init__(
        self,
        folder: Path | str,
        manifest: Manifest,
        *,
        split: str,
        random: bool,
        read: Read = "auto",
    ) -> None:
        require_codes(manifest, folder)
        self.folder, self.manifest = Path(folder), manifest
        self._entries = [e for s in manifest.sources for e in manifest.shards_of(s.name, split)]
        self._ends = np.cumsum([entry.rows for entry in self._entries], dtype=np.int64)
        self._rows = np.array(list(manifest.rows(split).values()), np.int64)
        self._first = np.cumsum(self._rows) - self._rows
        self._type = code_type(manifest.codebook_size)
        self._row_bytes = manifest.row_len * self._type.itemsize
        self._random = random
        size = int(self._rows.sum()) * self._row_bytes
        if read == "auto":
            read = way_to_read(folder, size=size, random=random, mounts=mounted())
        self.way: Literal["mmap", "pread"] = read
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = MOST if limit == resource.RLIM_INFINITY else min(limit // 2, MOST)
        self._most = max(1, limit // (2 if self.way == "pread" else 1))  # a map holds one as well
        self._open: OrderedDict[int, _Held] = OrderedDict()

    def read(self, sources: Integers, rows: Integers) -> Rows:
        """Return the rows at `sources` and `rows`, integers [B] each."""
        count, hint = len(sources), self._random and self.way == "pread"
        tokens = np.empty((count, self.manifest.row_len), self._type)
        starts = np.full((count, self.manifest.images_per_row), -1, np.int32)
        length = np.empty(count, np.int32)
        numbers, places = self._places(np.asarray(sources), np.asarray(rows))
        for first in range(0, count, self._most):  # so that no shard is closed before its use
            part = slice(first, first + self._most)
            held = [self._held(number) for number in numbers[part]]
            if hint:
                for shard, place in zip(held, places[part], strict=True):
                    shard.announce(place)
            for i, (shard, place) in enumerate(zip(held, places[part], strict=True), first):
                shard.fill(tokens[i], place)
                length[i] = shard.length[place]
                begin, end = shard.edges[place], shard.edges[place + 1]
                starts[i, : end - begin] = shard.docs[begin:end]
        return Rows(
            tokens=torch.from_numpy(tokens if tokens.dtype == np.uint16 else tokens.view(np.int32)),
            starts=torch.from_numpy(starts),
            length=torch.from_numpy(length),
            source=torch.from_numpy(np.asarray(sources).astype(np.int32)),
            row=torch.from_numpy(np.asarray(rows).astype(np.int64)),
        )

    def keys(self, source: int, row: int) -> list[str]:
        """Return the names of a row's images, as the build's source folders have them."""
        (number,), (place,) = self._places(np.array([source]), np.array([row]))
        return self._held(number).shard.keys(place)

    def close(self) -> None:
        """Close what is open; a later read opens it again."""
        while self._open:
            self._close_oldest()

    def _places(self, sources: Integers, rows: Integers) -> tuple[list[int], list[int]]:
        """Return the number of each row's shard, and its place in there."""
        assert bool(((rows >= 0) & (rows < self._rows[sources])).all()), "a row outside its source"
        place = self._first[sources] + rows
        number = np.searchsorted(self._ends, place, side="right")
        before = np.where(number > 0, self._ends[number - 1], 0)
        return number.tolist(), (place - before).tolist()

    def _held(self, number: int) -> "_Held":
        found = self._open.get(number)
        if found is None:
            if len(self._open) >= self._most:
                self._close_oldest()
            found = self._open[number] = self._opened(number)
        else:
            self._open.move_to_end(number)
        return found

    def _close_oldest(self) -> None:
        _, held = self._open.popitem(last=False)
        if held.file is not None:
            held.file.close()

    def _opened(self, number: int) -> "_Held":
        entry, manifest = self._entries[number], self.manifest
        path = self.folder / entry.name
        # What is left to the map of a shard that is read lies together: there, reading ahead helps.
        shard = open_shard(path, random=self._random and self.way == "mmap")
        seen = (*shard.tokens.shape, shard.metadata["tokenizer"])
        wanted = (entry.rows, manifest.row_len, manifest.tokenizer)
        if seen != wanted:
            raise InputError(
                f"the shard {path} has rows, row length and tokenizer {seen}, the manifest says "
                f"{wanted}; {MIXED}"
            )
        if self.way == "mmap":
            return _Held(shard)
        held = _Held(shard, file=FileIO(path), offset=entry.offset)
        first = np.empty(manifest.row_len, self._type)
        held.fill(first, 0)
        if not np.array_equal(first, shard.tokens[0]):
            raise InputError(
                f"the codes of {path} do not start at byte {entry.offset}, as the manifest says; "
                f"{MIXED}"
            )
        return held


class _Held:
    """An open shard. Memory views beside its arrays: of one element they are the quicker."""

    def __init__(self, shard: Shard, *, file: FileIO | None = None, offset: int = 0) -> None:
        self.shard, self.file, self.offset = shard, file, offset
        self.tokens, self.docs = shard.tokens, shard.docs
        self.length, self.edges = shard.length.data, shard.edges.data

    def announce(self, place: int) -> None:
        """Say that a row will be read soon, so that the disk works on many at once."""
        if self.file is not None and hasattr(os, "posix_fadvise"):
            size = self.tokens.strides[0]
            start = self.offset + place * size
            os.posix_fadvise(self.file.fileno(), start, size, os.POSIX_FADV_WILLNEED)

    def fill(self, row: np.ndarray, place: int) -> None:
        """Copy the codes at `place`; raises CommandError where the file ends or fails."""
        if self.file is None:
            row[:] = self.tokens[place]
            return
        rest, offset = row.data.cast("B"), self.offset + place * row.nbytes
        while rest:
            try:
                count = os.preadv(self.file.fileno(), [rest], offset)
            except OSError as error:
                raise CommandError(
                    f"the shard {self.file.name!s} cannot be read: {error}"
                ) from error
            if not count:
                raise CommandError(
                    f"the shard {self.file.name!s} ends at byte {offset}, inside a row; run its "
                    "build again with --verify"
                )
            rest, offset = rest[count:], offset + count
