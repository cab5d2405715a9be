"""The folder that a build writes to: made, held against other builds, its manifest withdrawn."""

import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tokenizer.cli import InputError
from tokenizer.files import temporary_name
from visual_sentences.job import Job
from visual_sentences.manifest import FILE as MANIFEST
from visual_sentences.manifest import Manifest
from visual_sentences.plan import Unit


def withdraw(job: Job, todo: Sequence[Unit]) -> None:
    """Take the manifest away while shards that it names are made anew; others it names stay."""
    if not (Path(job.out) / MANIFEST).exists():
        return
    sealed = Manifest.load(job.out).generation
    if any(unit.generation <= sealed for unit in todo):
        (Path(job.out) / MANIFEST).unlink(missing_ok=True)


def make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = temporary_name(out / "probe")
        probe.touch()
        probe.unlink(missing_ok=True)  # another build may have cleared it away
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"--out {out} cannot be written to ({error.strerror}); choose another folder"
        ) from error


@contextmanager
def held(out: Path, *, alone: bool) -> Iterator[None]:
    """Hold `out` for this process, or with other parts; the lock goes when the process does."""
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another build is writing to {out}; wait for it, or end it"
            ) from error
        except OSError as error:  # some network file systems have no locks
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
                raise
        yield
    finally:
        os.close(folder)
