"""Files by the SHA-256 of what is in them, in one folder whose size is bounded."""

import hashlib
import os
import threading
from collections import OrderedDict
from pathlib import Path

from tokenizer.cli import InputError
from tokenizer.files import TEMPORARY, atomic_write

BLOCK = 4096  # bytes that a small file takes of a disk anyway


class Store:
    """What was used longest ago is dropped first once more than `most` bytes are held.

    Safe to use from several threads. Names are made here, never by a client: `key` is checked by
    whoever takes it from one. Files that another process has dropped are simply not there.
    """

    def __init__(self, folder: Path | str, *, most: int) -> None:
        self.folder, self.most = Path(folder), most
        self.lock = threading.Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            found = [path for path in self.folder.iterdir() if path.is_file()]
            times = {path.name: (path.stat().st_mtime, path.stat().st_size) for path in found}
        except OSError as error:
            raise InputError(
                f"--store {self.folder}: wanted a folder to keep pictures in ({error}); "
                "give another"
            ) from error
        ours = (name for name in times if TEMPORARY not in name and _is_ours(name))
        self.sizes = OrderedDict(
            (name, _taken(times[name][1])) for name in sorted(ours, key=lambda n: times[n])
        )
        self.total = sum(self.sizes.values())

    def put(self, data: bytes, *, suffix: str, key: str = "") -> str:
        """Keep `data` under `key`, by default its SHA-256, which is returned."""
        key = key or hashlib.sha256(data).hexdigest()
        name = key + suffix
        with self.lock:
            if not self._touch(name):
                with atomic_write(self.folder / name) as file:
                    file.write(data)
                self.total += _taken(len(data)) - self.sizes.pop(name, 0)
                self.sizes[name] = _taken(len(data))
            self._drop()
        return key

    def get(self, key: str, *, suffix: str) -> bytes | None:
        """Return what is kept under `key`, now the most recently used; None where it is not."""
        name = key + suffix
        with self.lock:
            if not self._touch(name):
                return None
            return (self.folder / name).read_bytes()

    def _touch(self, name: str) -> bool:
        """Mark a file as used; False where there is none."""
        try:
            os.utime(self.folder / name)
            size = _taken((self.folder / name).stat().st_size)
        except FileNotFoundError:
            self.total -= self.sizes.pop(name, 0)
            return False
        self.total += size - self.sizes.pop(name, 0)  # another process may have put it there
        self.sizes[name] = size
        return True

    def _drop(self) -> None:
        while self.total > self.most and len(self.sizes) > 1:
            name, size = self.sizes.popitem(last=False)
            (self.folder / name).unlink(missing_ok=True)
            self.total -= size


def _taken(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _is_ours(name: str) -> bool:
    """A folder may hold other files, which are neither counted nor dropped."""
    stem, dot, suffix = name.partition(".")
    return dot + suffix in (".png", ".json") and len(stem) in (20, 64) and set(stem) <= set(
        "0123456789abcdef"
    )  # fmt: skip
