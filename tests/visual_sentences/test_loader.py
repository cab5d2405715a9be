"""Rows for training in the promised order, whatever reads them; rows for evaluation, each once."""

import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenizer.cli import CommandError, InputError
from visual_sentences.loader import Loader, check_batch
from visual_sentences.manifest import Manifest, ShardEntry, SourceEntry
from visual_sentences.pack import Rows
from visual_sentences.shards import write_shard

ROOT = Path(__file__).parents[2]
ROW_LEN, CODES = 8, 4  # two images a row
ROWS = {("a", "train"): 11, ("b", "train"): 5, ("a", "val"): 3, ("b", "val"): 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards of at most 4 rows; the first code of a row is 100 × its source + its number."""
    shards = []
    for (source, split), count in ROWS.items():
        for number, first in enumerate(range(0, count, 4)):
            rows = min(4, count - first)
            tokens = np.zeros((rows, ROW_LEN), np.uint16)
            tokens[:, 0] = 100 * (source == "b") + first + np.arange(rows)
            name = f"{source}-{split}-{number:05d}.arrow"
            written = write_shard(
                tmp_path / name,
                tokens=tokens,
                docs=[[0, CODES] if row % 2 else [0] for row in range(rows)],
                length=np.full(rows, ROW_LEN, np.int32),
                keys=[[f"{source}{first + row}", "second"] for row in range(rows)],
                metadata={"tokenizer": "t"},
            )
            shards.append(
                ShardEntry(
                    name=name,
                    source=source,
                    split=split,
                    rows=rows,
                    documents=rows + rows // 2,
                    images=2 * rows,
                    bytes=written.bytes,
                    sha256=written.sha256,
                    offset=written.offset,
                )
            )
    sources = tuple(
        SourceEntry(
            name=name,
            kind="image",
            weight=None,
            repeat=repeat,
            preprocess="squash",
            license="",
            note="",
            inputs=0,
            good=0,
            bad={},
        )
        for name, repeat in (("a", 1.0), ("b", 2.0))
    )
    Manifest(
        tokenizer="t",
        codebook_size=256,
        codes_per_image=CODES,
        image_size=8,
        row_len=ROW_LEN,
        seed=0,
        sources=sources,
        shards=tuple(shards),
    ).save(tmp_path)
    return tmp_path


def steps(loader: Loader, count: int) -> list[Rows]:
    return list(islice(iter(loader), count))


def numbers(rows: list[Rows]) -> list[int]:
    return [number for step in rows for number in step.tokens[:, 0].tolist()]


def test_an_epoch_has_every_row_as_often_as_its_source_says(folder: Path) -> None:
    loader = Loader(folder, batch_rows=7, seed=1)
    assert loader.mixture.slots == 11 + 2 * 5
    found = numbers(steps(loader, 3))
    assert sorted(found) == sorted([*range(11), *range(100, 105), *range(100, 105)])


def test_rows_carry_their_documents_lengths_and_sources(folder: Path) -> None:
    rows = steps(Loader(folder, batch_rows=21, seed=1), 1)[0]
    assert rows.tokens.dtype == torch.uint16
    assert (rows.length == ROW_LEN).all()
    for number, source, starts in zip(
        rows.tokens[:, 0].tolist(), rows.source.tolist(), rows.starts.tolist(), strict=True
    ):
        assert source == number // 100
        assert starts == ([0, CODES] if number % 100 % 4 % 2 else [0, -1])


def test_ranks_and_restarts_do_not_change_the_order(folder: Path) -> None:
    whole = numbers(steps(Loader(folder, batch_rows=12, seed=1), 30))
    found: list[int] = []
    for world, count in ((4, 11), (2, 9), (3, 10)):
        start = len(found)
        ranks = [
            steps(Loader(folder, batch_rows=12, seed=1, rank=r, world=world, start=start), count)
            for r in range(world)
        ]
        for step in range(count):
            found += [number for rank in ranks for number in numbers([rank[step]])]
    assert found == whole


def test_workers_read_the_same_rows(folder: Path) -> None:
    """Some seconds: real worker processes."""
    alone = steps(Loader(folder, batch_rows=6, seed=1, start=6), 9)
    ahead = steps(Loader(folder, batch_rows=6, seed=1, start=6, workers=2), 9)
    for one, other in zip(alone, ahead, strict=True):
        for name in ("tokens", "starts", "length", "source"):
            assert getattr(one, name).tolist() == getattr(other, name).tolist()


def test_a_program_with_workers_ends_although_they_ignore_sigterm(folder: Path) -> None:
    """A loader that is still alive at exit must not keep the program waiting."""
    program = (
        "import os, signal, multiprocessing\n"
        "from visual_sentences.loader import Loader\n"
        f"rows = iter(Loader({str(folder)!r}, batch_rows=2, seed=0, workers=2))\n"
        "next(rows)\n"
        "for child in multiprocessing.active_children(): os.kill(child.pid, signal.SIGTERM)\n"
        "for _ in range(50): next(rows)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=os.environ)
    try:
        assert process.wait(timeout=60) == 0
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_a_mixture_given_to_the_loader_replaces_the_manifests(folder: Path) -> None:
    only = Loader(folder, batch_rows=10, seed=1, mix={"b": 3.0})
    assert set(numbers(steps(only, 4))) == set(range(100, 105))
    both = Loader(folder, batch_rows=16, seed=1, mix={"a": 1, "b": 3})
    assert both.mixture.counts() == {"a": 4, "b": 12}
    with pytest.raises(InputError, match='names "c", which has no rows of split "train"'):
        Loader(folder, batch_rows=16, seed=1, mix={"c": 1})
    with pytest.raises(InputError, match="wanted a number above 0"):
        Loader(folder, batch_rows=16, seed=1, mix={"a": 0})


def test_a_batch_that_ranks_cannot_share_names_those_that_work(folder: Path) -> None:
    with pytest.raises(InputError, match=r"64 rows does not divide over 3 ranks.*use 63 or 66"):
        Loader(folder, batch_rows=64, seed=0, world=3)
    with pytest.raises(InputError, match=r"use 24 rows"):
        check_batch(10, world=3, micro_rows=8)
    check_batch(24, world=3, micro_rows=8)


def test_a_split_that_is_not_there_names_those_that_are(folder: Path) -> None:
    with pytest.raises(InputError, match='no rows of split "test"; this data has train, val'):
        Loader(folder, batch_rows=4, seed=0, split="test")


def test_shards_of_another_build_are_refused(folder: Path) -> None:
    shard = folder / "a-train-00000.arrow"
    shard.write_bytes((folder / "a-train-00002.arrow").read_bytes())  # 3 rows in place of 4
    with pytest.raises(InputError, match="were files of two builds mixed"):
        steps(Loader(folder, batch_rows=21, seed=0), 1)
    shard.unlink()
    with pytest.raises(CommandError, match="is missing"):
        steps(Loader(folder, batch_rows=21, seed=0), 1)
