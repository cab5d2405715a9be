"""Rows by place: the same by map and by read, of shards opened and closed as the system allows."""

import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenizer.cli import CommandError, InputError
from visual_sentences import reading
from visual_sentences.manifest import Manifest
from visual_sentences.reading import Read, Reader, file_system, way_to_read

ROWS = {("a", "train"): 11, ("b", "val"): 2, ("c", "train"): 9}  # b has no rows of this split

MOUNTS = r"""
21 1 254:0 / / rw,relatime - ext4 /dev/vda rw
22 21 0:40 / /home rw,relatime shared:5 - nfs4 server:/export rw,vers=4.2
23 22 0:41 / /home/me/local rw,relatime - xfs /dev/sdb rw
24 21 0:42 / /mnt/my\040disk rw,relatime - fuse.sshfs host: rw
25 21 0:43 / /scratch rw,relatime - ext4 /dev/sdc rw
26 21 0:44 / /scratch rw,relatime - lustre mds@tcp:/lustre rw
""".strip()


@pytest.fixture
def folder(tmp_path: Path, numbered_rows: Callable[..., Path]) -> Path:
    return numbered_rows(tmp_path / "data", ROWS)


def reader(folder: Path, read: Read, *, random: bool = True) -> Reader:
    return Reader(folder, Manifest.load(folder), split="train", random=random, read=read)


def every_row() -> tuple[np.ndarray, np.ndarray]:
    """All rows of the split, far from the order in which they are stored."""
    places = [(s, r) for s, count in ((0, 11), (2, 9)) for r in range(count)]
    shuffled = np.random.default_rng(0).permutation(places)
    return shuffled[:, 0], shuffled[:, 1]


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("codes", [256, 70_000])
def test_a_map_and_a_read_give_the_same_rows(
    tmp_path: Path, numbered_rows: Callable[..., Path], codes: int, random: bool
) -> None:
    folder = numbered_rows(tmp_path / "wide", ROWS, codebook_size=codes)
    sources, rows = every_row()
    found = [reader(folder, way, random=random).read(sources, rows) for way in ("mmap", "pread")]
    for name in ("tokens", "starts", "length", "source"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name))
    assert found[0].tokens[:, 0].tolist() == (100 * sources + rows).tolist()
    assert found[0].tokens.dtype == (torch.uint16 if codes == 256 else torch.int32)


def test_keys_are_found_by_place(folder: Path) -> None:
    assert reader(folder, "mmap").keys(2, 5) == ["c5", "second"]
    assert reader(folder, "pread").keys(0, 10) == ["a10"]


def test_a_row_that_a_source_does_not_have_is_not_another_sources(folder: Path) -> None:
    for source, row in ((0, 11), (0, -1), (1, 0)):
        with pytest.raises(AssertionError, match="a row outside its source"):
            reader(folder, "mmap").read(np.array([source]), np.array([row]))


@pytest.mark.parametrize("way", ["mmap", "pread"])
def test_few_file_descriptors_are_enough(
    folder: Path, way: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six shards by two descriptors, in an order that meets all of them in one batch."""
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(reading, "MOST", 2)
    narrow = reader(folder, way)
    sources, rows = every_row()
    assert narrow.read(sources, rows).tokens[:, 0].tolist() == (100 * sources + rows).tolist()
    assert len(os.listdir("/proc/self/fd")) - before == 2
    narrow.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert narrow.read(sources[:1], rows[:1]).tokens[0, 0] == 100 * sources[0] + rows[0]


def test_half_of_the_systems_descriptors_are_left_alone(folder: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (400, limits[1]))
        assert (reader(folder, "mmap")._most, reader(folder, "pread")._most) == (200, 100)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_shards_of_another_build_are_refused(folder: Path) -> None:
    shard = folder / "a-train-00000.arrow"
    shard.write_bytes((folder / "a-train-00002.arrow").read_bytes())  # 3 rows in place of 4
    for way in ("mmap", "pread"):
        with pytest.raises(InputError, match=r"\(3, 8, 't'\).*were files of two builds mixed"):
            reader(folder, way).read(*every_row())
    shard.unlink()
    with pytest.raises(CommandError, match="is missing"):
        reader(folder, "mmap").read(*every_row())


def test_a_manifest_with_a_wrong_offset_reads_nothing(folder: Path) -> None:
    path = folder / "manifest.json"
    offset = Manifest.load(folder).shards[0].offset
    path.write_text(path.read_text().replace(f'"offset": {offset}', f'"offset": {offset + 2}', 1))
    with pytest.raises(InputError, match=rf"do not start at byte {offset + 2}, as the manifest"):
        reader(folder, "pread").read(*every_row())


def test_a_shard_that_ends_early_is_named(folder: Path) -> None:
    """Of an open shard, since opening one that is cut is refused already."""
    held = reader(folder, "pread")._held(0)
    offset = Manifest.load(folder).shards[0].offset
    os.truncate(folder / "a-train-00000.arrow", offset + 50)  # three rows of 16 bytes and a bit
    row = np.empty(8, np.uint16)
    held.fill(row, 2)
    assert row[0] == 2
    with pytest.raises(
        CommandError, match=rf"a-train-00000\.arrow ends at byte {offset + 50}, ins"
    ):
        held.fill(row, 3)


def test_image_shards_hold_no_codes(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"form": "codes"', '"form": "images"'))
    with pytest.raises(InputError, match="holds images, wanted codes"):
        reader(folder, "auto")


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/data/x", "ext4"),
        ("/home/me", "nfs4"),
        ("/homer", "ext4"),
        ("/home/me/local/deep", "xfs"),
        ("/mnt/my disk/x", "fuse.sshfs"),
        ("/scratch", "lustre"),  # mounted over the ext4 before it
    ],
)
def test_the_file_system_of_a_folder_is_found(path: str, kind: str) -> None:
    assert file_system(path, MOUNTS) == kind
    assert file_system(path, "") == ""


def test_links_are_followed_to_the_file_system_of_their_target(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    mounts = f"30 21 0:50 / {os.path.realpath(tmp_path)}/real rw - beegfs beegfs_nodev rw"
    assert file_system(tmp_path / "link" / "data", mounts) == "beegfs"


def test_network_disks_and_rows_that_outgrow_the_memory_are_read() -> None:
    def way(path: str, *, size: int = 1 << 20, random: bool = True, mounts: str = MOUNTS) -> str:
        return way_to_read(path, size=size, random=random, mounts=mounts)

    assert way("/data/x") == way("/home/me/local") == "mmap"
    assert way("/home/me") == way("/mnt/my disk") == way("/scratch", random=False) == "pread"
    assert way("/data/x", size=1 << 50) == "pread"
    assert way("/data/x", size=1 << 50, random=False) == "mmap"
    assert way("/home/me", mounts="") == "mmap"
