"""Files that are either whole or absent: atomic writes, checksums, left-over temporaries."""

import errno
import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)  # some file systems have none
TEMPORARY = ".tmp-"  # every unfinished file of the project carries this in its name


def temporary_name(path: Path) -> Path:
    """Return a unique name beside `path`; two writers of one file never meet."""
    return path.with_name(f"{path.name}{TEMPORARY}{os.getpid()}-{uuid.uuid4().hex[:8]}")


@contextmanager
def atomic_write(path: Path | str, mode: str = "wb", *, first: bool = False) -> Iterator[IO[Any]]:
    """Open a temporary file that becomes `path` by fsync and rename when the block ends well.

    A crash at any moment leaves the old file or the new one, never a part of one. With `first` a
    file that another process has put there meanwhile stays: FileExistsError.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if first and _link(temporary, path):
            temporary.unlink()
        else:
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _link(temporary: Path, path: Path) -> bool:
    """Give a file a second name, which must be new; returns False where nothing has two names."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path) -> int:
    """Delete what killed writers left in `folder`; returns how many files."""
    left = [p for p in folder.glob(f"*{TEMPORARY}*") if p.is_file()]
    for path in left:
        path.unlink(missing_ok=True)
    return len(left)


def sha256_file(path: Path | str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
