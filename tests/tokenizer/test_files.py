"""Atomic writes leave a whole file or none, through exceptions and kill -9."""

import errno
import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tokenizer.files import atomic_write, remove_temporaries, sha256_file, temporary_name


def test_written_file_appears_at_the_end_only(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    with atomic_write(target, "w") as file:
        file.write("{}")
        assert not target.exists()
    assert target.read_text() == "{}" and list(tmp_path.iterdir()) == [target]


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_write(target) as file:
        file.write(b"new")
        raise RuntimeError
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


def test_a_file_that_came_first_stays_where_that_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan"
    with atomic_write(path, "w", first=True) as file:
        file.write("one")
    with pytest.raises(FileExistsError), atomic_write(path, "w", first=True) as file:
        file.write("two")
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr("tokenizer.files.os.link", no_links)
    with atomic_write(path, "w", first=True) as file:  # then by rename, as well as it can be
        file.write("three")
    assert path.read_text() == "three" and list(tmp_path.iterdir()) == [path]


def no_links(*paths: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def test_killed_writer_leaves_the_old_file_and_a_temporary(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")
    code = (
        "import os, signal, sys\n"
        "from tokenizer.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(target)])
    assert done.returncode == -signal.SIGKILL
    assert target.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2
    assert remove_temporaries(tmp_path) == 1
    assert list(tmp_path.iterdir()) == [target]


def test_temporary_names_never_meet(tmp_path: Path) -> None:
    assert temporary_name(tmp_path / "a") != temporary_name(tmp_path / "a")


def test_checksum_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
