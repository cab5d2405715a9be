"""Shards of images: what was written is read in place, and old files stay readable."""

from pathlib import Path

import numpy as np
import pytest

from tokenizer.cli import CommandError
from tokenizer.images import encode_image, read_image
from visual_sentences.image_shards import ImageShard, open_images, write_images
from visual_sentences.shards import Written, open_shard, write_shard

GOLDEN = Path(__file__).parent / "golden" / "images-train-00000.arrow"
JPEGS = [[b"\xff\xd8 one", b"\xff\xd8 two"], [b""], [bytes(range(256))]]
KEYS = [["n01/1.jpg", "n01/ü.jpg"], ["2.jpg"], ["3.jpg|crop 0 0 0.5 0.5 flip"]]


def write_golden(path: Path) -> Written:
    return write_images(
        path,
        jpegs=JPEGS,
        labels=[0, -1, 7],
        keys=KEYS,
        metadata={
            "source": "images",
            "kind": "category",
            "split": "train",
            "image_size": 32,
            "preprocess": "crop",
        },
    )


def check_golden(shard: ImageShard) -> None:
    assert shard.rows == 3
    assert [shard.jpegs(row) for row in range(3)] == JPEGS
    assert [shard.keys(row) for row in range(3)] == KEYS
    assert shard.labels.tolist() == [0, -1, 7]
    assert shard.labels.dtype == np.int32
    assert (shard.metadata["kind"], shard.metadata["image_size"]) == ("category", "32")


def test_the_golden_shard_of_version_1_is_readable() -> None:
    """This file is never written again: a change that breaks this test needs a new version."""
    check_golden(open_images(GOLDEN))


def test_equal_images_are_equal_bytes_and_the_facts_are_those_of_the_file(tmp_path: Path) -> None:
    written = write_golden(tmp_path / "a.arrow")
    assert write_golden(tmp_path / "b.arrow") == written
    content = (tmp_path / "a.arrow").read_bytes()
    assert content == (tmp_path / "b.arrow").read_bytes()
    assert (written.rows, written.bytes, written.offset) == (3, len(content), 0)
    for random in (False, True):
        check_golden(open_images(tmp_path / "a.arrow", random=random))


def test_labels_are_a_view_of_the_file(tmp_path: Path) -> None:
    write_golden(tmp_path / "a.arrow")
    labels = open_images(tmp_path / "a.arrow").labels
    assert not labels.flags.owndata and not labels.flags.writeable


def test_a_picture_comes_back_as_it_was_encoded(tmp_path: Path) -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, 8:] = (0, 200, 40)
    jpeg = encode_image(image, format="JPEG", quality=95)
    write_images(tmp_path / "a.arrow", jpegs=[[jpeg]], labels=[-1], keys=[["a"]], metadata={})
    [found] = open_images(tmp_path / "a.arrow").jpegs(0)
    assert found == jpeg
    # 8: blocks of 8 px hold one colour each; what remains is YCbCr and chroma at half resolution.
    assert np.abs(read_image(found, size=16).astype(int) - image)[:, [0, 4, 12, 15]].max() <= 8


def test_damaged_missing_and_other_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "s.arrow"
    with pytest.raises(CommandError, match=r"s.arrow is missing; run its build again"):
        open_images(path)
    written = write_golden(path)
    with pytest.raises(CommandError, match=r"of visual-sentences-images; wanted .*-shard"):
        open_shard(path)
    content = path.read_bytes()
    for cut in (0, 10, written.bytes // 2, written.bytes - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(CommandError, match=r"s.arrow is damaged"):
            open_images(path)
    tokens = np.zeros((1, 2), np.uint16)
    length = np.array([2], np.int32)
    write_shard(path, tokens=tokens, docs=[[0]], length=length, keys=[["a"]], metadata={})
    with pytest.raises(CommandError, match=r"of visual-sentences-shard; wanted .*-images"):
        open_images(path)


def test_a_shard_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.arrow"
    write_images(path, jpegs=[], labels=[], keys=[], metadata={"version": 2})
    with pytest.raises(CommandError, match="has shard version 2; this program reads version 1"):
        open_images(path)
