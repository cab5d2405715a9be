"""The benchmark of the loader compares like with like: all readers yield what was written."""

from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from visual_sentences import bench_loader
from visual_sentences.bench_loader import lines, missing, sampler
from visual_sentences.bench_rivals import BATCH, ROW_LEN, ours, streams, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bench") / "rows"
    write_rows(place, shards=2, rows=24)
    return place


def written(folder: Path) -> set[bytes]:
    files = sorted((folder / "raw").glob("*.bin"))
    rows = np.concatenate([np.fromfile(file, np.uint16) for file in files]).reshape(-1, ROW_LEN)
    return {row.tobytes() for row in rows}


@pytest.mark.parametrize("name", list(streams()))
def test_every_reader_yields_batches_of_the_rows_that_were_written(folder: Path, name: str) -> None:
    """Two seconds: imports the other packages."""
    stream = streams()[name]
    if stream is None:
        pytest.skip(f"{name} is not installed")
    with closing(stream(folder)) as batches:
        found = [batch.numpy() for batch in islice(batches, 3)]
    assert [batch.shape for batch in found] == 3 * [(BATCH, ROW_LEN)]
    rows = {row.astype(np.uint16).tobytes() for batch in found for row in batch}
    assert len(rows) > BATCH
    assert rows <= written(folder)


def test_a_packed_stream_is_what_a_model_reads(folder: Path) -> None:
    with closing(ours(folder, read="mmap", packed="cpu")) as batches:
        ids = next(batches)
    assert (ids[:, [0, ROW_LEN // 2]] == 8192).all()  # bos, at the start of both documents


def test_ratios_are_taken_within_a_round() -> None:
    times: dict[str, list[float]] = {"np.memmap": [1.0, 4.0, 2.0], "ours, mmap": [2.0, 2.0, 2.0]}
    first, second = lines({"case": "warm"}, times, rows=100)
    assert (first["rows/s"], first["x np.memmap"]) == (50.0, 1.0)
    assert (second["rows/s"], second["x np.memmap"]) == (50.0, 1.0)
    times["ours, mmap"] = [0.5, 2.0, 4.0]
    assert [row["x np.memmap"] for row in lines({"case": "start"}, times)] == [1.0, 2.0]


def test_a_package_that_is_absent_is_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = dict.fromkeys(("webdataset", "datasets"))
    monkeypatch.setattr(bench_loader, "streams", lambda: {**streams(), **absent})
    assert missing({"case": "start"}, "ms") == [
        {"case": "start", "reader": "webdataset", "ms": "not installed"},
        {"case": "start", "reader": "datasets", "ms": "not installed"},
    ]


def test_the_order_of_many_rows_is_not_stored() -> None:
    found = sampler(rows=10**9, draws=10_000)
    assert found["MiB of a stored order"] == 7629
    assert float(str(found["MiB"])) < 100  # what numpy holds for a while included
