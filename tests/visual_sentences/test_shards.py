"""The formats on disk: what was written is read in place, and old files stay readable."""

import json
from pathlib import Path

import numpy as np
import pytest

from tokenizer.cli import CommandError, InputError
from visual_sentences.manifest import Manifest, ShardEntry, SourceEntry
from visual_sentences.shards import Shard, Written, open_shard, write_shard

GOLDEN = Path(__file__).parent / "golden"


def golden_tokens() -> np.ndarray:
    """Return the rows of the golden shard: [3, 8], two codes an image, the last row half full."""
    tokens = (np.arange(24) * 37 % 64).reshape(3, 8).astype(np.uint16)
    tokens[2, 4:] = 0
    return tokens


def write_golden(folder: Path) -> Manifest:
    written = write_golden_shard(folder / "pairs-train-00000.arrow")
    shard = ShardEntry(
        name="pairs-train-00000.arrow",
        source="pairs",
        split="train",
        rows=written.rows,
        documents=4,
        images=10,
        bytes=written.bytes,
        sha256=written.sha256,
        offset=written.offset,
    )
    source = SourceEntry(
        name="pairs",
        kind="pair",
        weight=None,
        repeat="sqrt",
        preprocess="squash",
        license="MIT",
        note="made by the test",
        inputs=12,
        good=10,
        bad={"missing target": 1, "truncated": 1},
    )
    manifest = Manifest(
        tokenizer="0" * 64,
        codebook_size=64,
        codes_per_image=2,
        image_size=32,
        row_len=8,
        seed=5,
        sources=(source,),
        shards=(shard,),
    )
    manifest.save(folder)
    return manifest


def write_golden_shard(path: Path) -> Written:
    return write_shard(
        path,
        tokens=golden_tokens(),
        docs=[[0], [0, 4], [0]],
        length=np.array([8, 8, 4], np.int32),
        keys=[["a", "b", "c", "d"], ["e", "f", "g", "ü"], ["i", "j"]],
        metadata={
            "source": "pairs",
            "kind": "pair",
            "split": "train",
            "tokenizer": "0" * 64,
            "encoder": "float32 cpu",
            "codebook_size": 64,
            "codes_per_image": 2,
            "image_size": 32,
            "preprocess": "squash",
        },
    )


def check_golden(shard: Shard) -> None:
    assert np.array_equal(shard.tokens, golden_tokens())
    assert shard.tokens.dtype == np.uint16
    assert shard.length.tolist() == [8, 8, 4]
    assert [shard.starts(row).tolist() for row in range(3)] == [[0], [0, 4], [0]]
    assert [shard.keys(row) for row in range(3)] == [
        ["a", "b", "c", "d"],
        ["e", "f", "g", "ü"],
        ["i", "j"],
    ]
    assert shard.metadata["kind"] == "pair"
    assert shard.metadata["codes_per_image"] == "2"


def test_the_golden_shard_and_manifest_of_version_1_are_readable() -> None:
    """These files are never written again: a change that breaks this test needs a new version."""
    manifest = Manifest.load(GOLDEN)
    check_golden(open_shard(GOLDEN / manifest.shards[0].name))
    assert manifest.rows("train") == {"pairs": 3}
    assert manifest.sources[0].bad == {"missing target": 1, "truncated": 1}
    assert (manifest.vocab.bos, manifest.images_per_row, manifest.splits) == (64, 4, ["train"])
    assert manifest.hash == "dd554e95e3f8cf1ace492f6c9e408066414c2c6abca638317f70748bf4a5d0a8"


def test_a_shard_is_read_back_without_a_copy(tmp_path: Path) -> None:
    write_golden_shard(tmp_path / "s.arrow")
    for random in (False, True):
        shard = open_shard(tmp_path / "s.arrow", random=random)
        check_golden(shard)
        for array in (shard.tokens, shard.length, shard.docs, shard.edges):
            assert not array.flags.owndata
            assert not array.flags.writeable  # a view of the mapped file


def test_the_offset_in_the_manifest_is_where_the_tokens_start(tmp_path: Path) -> None:
    written = write_golden_shard(tmp_path / "s.arrow")
    content = (tmp_path / "s.arrow").read_bytes()
    tokens = np.frombuffer(content, np.uint16, count=24, offset=written.offset)
    assert np.array_equal(tokens.reshape(3, 8), golden_tokens())
    assert len(content) == written.bytes


def test_equal_rows_are_equal_bytes(tmp_path: Path) -> None:
    write_golden_shard(tmp_path / "a.arrow")
    write_golden_shard(tmp_path / "b.arrow")
    assert (tmp_path / "a.arrow").read_bytes() == (tmp_path / "b.arrow").read_bytes()


def test_large_codebooks_are_stored_in_32_bits(tmp_path: Path) -> None:
    tokens = np.array([[70_000, 1]], np.uint32)
    write_shard(
        tmp_path / "s.arrow",
        tokens=tokens,
        docs=[[0]],
        length=np.array([2], np.int32),
        keys=[["a"]],
        metadata={},
    )
    assert np.array_equal(open_shard(tmp_path / "s.arrow").tokens, tokens)


def test_a_damaged_or_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"gone.arrow is missing; run its build again"):
        open_shard(tmp_path / "gone.arrow")
    written = write_golden_shard(tmp_path / "s.arrow")
    content = (tmp_path / "s.arrow").read_bytes()
    for cut in (0, 10, written.bytes // 2, written.bytes - 1):
        (tmp_path / "s.arrow").write_bytes(content[:cut])
        with pytest.raises(CommandError, match=r"s.arrow is damaged"):
            open_shard(tmp_path / "s.arrow")


def test_a_manifest_round_trips_and_its_hash_notices_changes(tmp_path: Path) -> None:
    manifest = write_golden(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    text = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace('"seed": 5', '"seed": 6'))
    assert Manifest.load(tmp_path).hash != manifest.hash


def test_a_manifest_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no manifest.json in .*run it again"):
        Manifest.load(tmp_path)
    write_golden(tmp_path)
    path = tmp_path / "manifest.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"version": 99}))
    with pytest.raises(InputError, match=r"'visual-sentences', 99.*this program reads"):
        Manifest.load(tmp_path)
    path.write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        Manifest.load(tmp_path)
