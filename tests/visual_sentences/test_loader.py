"""Rows for training in the promised order, whatever reads them."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch

from tokenizer.cli import CommandError, InputError
from visual_sentences.batch import IGNORE
from visual_sentences.loader import Loader, check_batch, held_out
from visual_sentences.pack import Rows, pack
from visual_sentences.reading import Read
from visual_sentences.vocab import Vocab

ROOT = Path(__file__).parents[2]
ROWS = {("a", "train"): 11, ("b", "train"): 5, ("a", "val"): 3, ("b", "val"): 2}


@pytest.fixture
def folder(tmp_path: Path, numbered_rows: Callable[..., Path]) -> Path:
    """Shards of at most 4 rows; the first code of a row is 100 × its source + its number."""
    return numbered_rows(tmp_path, ROWS, repeats={"a": 1.0, "b": 2.0})


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
    for number, source, starts, length in zip(
        rows.tokens[:, 0].tolist(),
        rows.source.tolist(),
        rows.starts.tolist(),
        rows.length.tolist(),
        strict=True,
    ):
        assert source == number // 100
        row = number % 100
        last = row % 4 == 3 or row == (10, 4)[source]
        assert length == (4 if last else 8)
        assert starts == ([0, 4] if row % 4 % 2 and not last else [0, -1])


@pytest.mark.parametrize(("workers", "read"), [(2, "auto"), (0, "pread"), (2, "pread")])
def test_workers_and_the_way_to_read_change_no_row(folder: Path, workers: int, read: Read) -> None:
    alone = steps(Loader(folder, batch_rows=6, seed=1, start=6, read="mmap"), 9)
    other = steps(Loader(folder, batch_rows=6, seed=1, start=6, workers=workers, read=read), 9)
    for one, two in zip(alone, other, strict=True):
        for name in ("tokens", "starts", "length", "source"):
            assert getattr(one, name).tolist() == getattr(two, name).tolist()


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
    assert Loader(folder, batch_rows=16, seed=1, mix={}).mixture.counts() == {"a": 11, "b": 10}
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


def test_training_never_reads_a_row_of_another_split(folder: Path) -> None:
    """The splits number their rows alike here, so their shards tell them apart."""
    for shard in folder.glob("*-val-*"):
        shard.unlink()
    assert len(numbers(steps(Loader(folder, batch_rows=21, seed=1), 3))) == 63
    with pytest.raises(CommandError, match=r"val-00000\.arrow is missing"):
        steps(Loader(folder, batch_rows=5, seed=1, split="val"), 1)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(("rows", "micro_rows"), [(100, 4), (7, 2), (7, 3), (1, 1)])
def test_a_validation_has_the_same_rows_once_each_at_any_number_of_ranks(
    folder: Path, world: int, rows: int, micro_rows: int
) -> None:
    def real(step: Rows) -> list[int]:
        return step.tokens[:, 0][step.length > 0].tolist()

    def of_rank(rank: int) -> list[Rows]:
        return list(
            held_out(
                folder, rows=rows, micro_rows=micro_rows, split="train", rank=rank, world=world
            )
        )

    (alone,) = held_out(folder, rows=rows, micro_rows=100, split="train")
    every = [*range(11), *range(100, 105)]
    assert real(alone) == {100: every, 7: [0, 2, 4, 6, 9, 100, 102], 1: [0]}[rows]
    ranks = [of_rank(rank) for rank in range(world)]
    assert len({len(steps) for steps in ranks}) == 1
    assert all(step.rows == micro_rows for steps in ranks for step in steps)
    found = [real(step) for steps in ranks for step in steps]
    assert sorted(number for step in found for number in step) == real(alone)


def test_rows_that_stand_in_predict_nothing(folder: Path) -> None:
    (step,) = held_out(folder, rows=3, micro_rows=5)
    for whole_rows in (False, True):
        batch = pack(step, layout="bos", vocab=Vocab(256, 4), whole_rows=whole_rows)
        assert (batch.labels[3:] == IGNORE).all()
        assert (batch.labels[:3] != IGNORE).any(dim=1).all()
