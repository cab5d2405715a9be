"""The store: files by their SHA-256, the least used dropped first."""

import hashlib
import os
from pathlib import Path

import pytest

from lvm.playground.store import BLOCK, Store
from tokenizer.cli import InputError


def put(store: Store, *letters: str) -> list[str]:
    return [store.put(letter.encode() * 10, suffix=".png") for letter in letters]


def test_what_is_put_is_got_by_its_hash_once(tmp_path: Path):
    store = Store(tmp_path / "new" / "store", most=10 * BLOCK)
    assert put(store, "a", "a") == [hashlib.sha256(b"a" * 10).hexdigest()] * 2
    assert store.get(put(store, "a")[0], suffix=".png") == b"a" * 10
    assert store.get(put(store, "a")[0], suffix=".json") is None
    assert len(list(store.folder.iterdir())) == 1 and store.total == BLOCK


def test_what_was_used_longest_ago_is_dropped_first(tmp_path: Path):
    store = Store(tmp_path, most=3 * BLOCK)
    a, b, c = put(store, "a", "b", "c")
    store.get(a, suffix=".png")
    (d,) = put(store, "d")
    assert store.get(b, suffix=".png") is None
    assert all(store.get(key, suffix=".png") for key in (a, c, d))
    put(store, "a")  # used again by being put again
    put(store, "e")
    assert store.get(c, suffix=".png") is None and store.get(a, suffix=".png")
    assert sum(1 for _ in tmp_path.iterdir()) == 3


def test_one_file_larger_than_the_store_is_kept_until_the_next(tmp_path: Path):
    store = Store(tmp_path, most=BLOCK)
    big = store.put(b"x" * 2 * BLOCK, suffix=".png")
    assert store.get(big, suffix=".png")
    put(store, "a")
    assert store.get(big, suffix=".png") is None and store.total == BLOCK


def test_a_new_start_knows_what_is_there_and_when_it_was_used(tmp_path: Path):
    before = Store(tmp_path, most=20 * BLOCK)
    keys = put(before, *"abcdefgh")
    for age, key in enumerate(keys):
        os.utime(tmp_path / f"{key}.png", (1000 - age, 1000 - age))  # h the oldest
    assert before.get(keys[-1], suffix=".png")  # and now the most recently used
    (tmp_path / "holiday.png").write_bytes(b"not ours")
    store = Store(tmp_path, most=4 * BLOCK)
    put(store, "i")
    there = [key for key in keys if (tmp_path / f"{key}.png").exists()]
    assert there == [keys[0], keys[1], keys[-1]]
    put(store, *"jklm")
    assert (tmp_path / "holiday.png").exists() and sum(1 for _ in tmp_path.iterdir()) == 5


def test_what_another_process_dropped_or_added_is_seen(tmp_path: Path):
    store, other = Store(tmp_path, most=10 * BLOCK), Store(tmp_path, most=10 * BLOCK)
    (a,) = put(store, "a")
    assert other.get(a, suffix=".png")
    (tmp_path / f"{a}.png").unlink()
    assert store.get(a, suffix=".png") is None and store.total == 0
    assert put(store, "a") == [a] and other.get(a, suffix=".png")


def test_only_its_owner_may_look_in_and_a_file_is_no_folder(tmp_path: Path):
    store = Store(tmp_path / "store", most=BLOCK)
    assert store.folder.stat().st_mode & 0o077 == 0
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--store .*file: wanted a folder"):
        Store(tmp_path / "file", most=BLOCK)
