"""A run goes on at any number of ranks, with real worker processes, and no row moves.

What goes from one stretch to the next is the number of samples used: workers read ahead of their
trainer, so what they have fetched says nothing of where a run stands.
"""

from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest

from visual_sentences.loader import Loader
from visual_sentences.reading import Read

BATCH, SEED = 12, 7
ROWS = {("many", "train"): 23, ("few", "train"): 5, ("weighted", "train"): 9}
Ids = list[tuple[int, int]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, numbered_rows: Callable[..., Path]) -> Path:
    """Three sources: every row once, three and a half times, and a fifth of the epoch."""
    return numbered_rows(
        tmp_path_factory.mktemp("elastic"),
        ROWS,
        repeats={"few": 3.5},
        weights={"weighted": 0.2},
    )


def ids(
    folder: Path,
    *,
    steps: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    read: Read = "auto",
) -> list[Ids]:
    """Return the (source, code of the row) of each step of one rank."""
    loader = Loader(
        folder,
        batch_rows=BATCH,
        seed=SEED,
        start=start,
        rank=rank,
        world=world,
        workers=workers,
        read=read,
    )
    with closing(iter(loader)) as stream:  # a generator, which ends its workers
        return [
            list(zip(rows.source.tolist(), rows.tokens[:, 0].tolist(), strict=True))
            for rows in islice(stream, steps)
        ]


def test_ranks_4_then_2_then_3_with_workers_read_what_one_rank_would(folder: Path) -> None:
    """9 ranks of two worker processes each, one after the other."""
    stretches = [(4, 7), (2, 6), (3, 7)]
    slots = Loader(folder, batch_rows=BATCH, seed=SEED).mixture.slots
    ends = [BATCH * 7, BATCH * 13, BATCH * 20]
    epochs = [end // slots for end in ends]
    assert epochs[0] >= 1 and epochs[2] > epochs[1] > epochs[0], "a stretch crosses no epoch edge"
    assert all(end % slots for end in ends), "a stretch ends on an epoch edge"

    wanted = [row for step in ids(folder, steps=20) for row in step]
    found: Ids = []
    for number, (world, steps) in enumerate(stretches):
        read: Read = "pread" if number == 1 else "mmap"
        used = len(found)
        ranks = [
            ids(folder, steps=steps, start=used, rank=r, world=world, workers=2, read=read)
            for r in range(world)
        ]
        found += [row for step in range(steps) for rank in ranks for row in rank[step]]
    assert found == wanted
    assert len({source for source, _ in found}) == 3


def test_rows_that_workers_fetched_and_nobody_used_come_again(folder: Path) -> None:
    """A trainer stops after 3 steps, while its 2 workers have fetched more."""
    before = ids(folder, steps=3, workers=2)
    after = ids(folder, steps=5, start=3 * BATCH, workers=2)
    assert before + after == ids(folder, steps=8)


def test_ranks_of_one_model_read_equal_rows(folder: Path) -> None:
    """A mesh of 3 data-parallel by 2 tensor-parallel ranks: of 6 ranks, rank r is at (r // 2, r %
    2), and its rows are those of place r // 2 of 3."""
    whole = ids(folder, steps=4)
    by_rank = [ids(folder, steps=4, rank=r // 2, world=3) for r in range(6)]
    for data in range(3):
        assert by_rank[2 * data] == by_rank[2 * data + 1]
    for step in range(4):
        assert [row for data in range(3) for row in by_rank[2 * data][step]] == whole[step]
