"""The same rows in our shards and in the formats of others, and streams of batches of each.

ours/       Arrow shards and their manifest
raw/        the codes alone, a file a shard, for np.memmap
tars/       WebDataset: a member of raw bytes a row
datasets/   Hugging Face datasets, where it is installed
"""

import importlib.util
import io
import mmap
import tarfile
from collections.abc import Callable, Collection, Generator, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from visual_sentences.loader import Loader
from visual_sentences.manifest import Manifest, ShardEntry, SourceEntry
from visual_sentences.pack import pack
from visual_sentences.reading import Read
from visual_sentences.shards import write_shard
from visual_sentences.vocab import Vocab

OTHERS = ("raw", "tars", "datasets")
BATCH, ROW_LEN, PER_IMAGE, CODES = 16, 4096, 256, 8192

Batches = Generator[torch.Tensor, None, None]  # integers [16, 4096] each, without end
Stream = Callable[[Path], Batches]


def write_rows(folder: Path, *, shards: int, rows: int, others: Collection[str] = OTHERS) -> None:
    """Write random codes, `rows` a shard, as ours and in `others` as far as they are installed."""
    rng = np.random.default_rng(0)
    for name in ("ours", *others):
        (folder / name).mkdir(parents=True)
    entries = []
    for number in range(shards):
        tokens = rng.integers(0, CODES, (rows, ROW_LEN), dtype=np.uint16)
        entries.append(write_ours(folder / "ours", tokens, number=number))
        if "raw" in others:
            tokens.tofile(folder / "raw" / f"{number:05d}.bin")
        if "tars" in others:
            write_tar(folder / "tars" / f"{number:05d}.tar", tokens)
    source = SourceEntry(
        name="rows",
        kind="image",
        weight=None,
        repeat=None,
        preprocess="squash",
        license="",
        note="",
        inputs=0,
        good=0,
        bad={},
    )
    Manifest(
        tokenizer="",
        codebook_size=CODES,
        codes_per_image=PER_IMAGE,
        image_size=256,
        row_len=ROW_LEN,
        seed=0,
        sources=(source,),
        shards=tuple(entries),
    ).save(folder / "ours")
    if "datasets" in others and importlib.util.find_spec("datasets"):
        write_datasets(folder, shards=shards)


def write_ours(folder: Path, tokens: np.ndarray, *, number: int) -> ShardEntry:
    """Write a shard of rows of two documents each."""
    rows, images = len(tokens), ROW_LEN // PER_IMAGE
    name = f"rows-train-{number:05d}.arrow"
    written = write_shard(
        folder / name,
        tokens=tokens,
        docs=[[0, ROW_LEN // 2]] * rows,
        length=np.full(rows, ROW_LEN),
        keys=[[""] * images] * rows,
        metadata={"tokenizer": ""},
    )
    return ShardEntry(
        name=name,
        source="rows",
        split="train",
        rows=rows,
        documents=2 * rows,
        images=images * rows,
        bytes=written.bytes,
        sha256=written.sha256,
        offset=written.offset,
    )


def write_tar(path: Path, tokens: np.ndarray) -> None:
    with tarfile.open(path, "w") as tar:
        for row, codes in enumerate(tokens):
            member = tarfile.TarInfo(f"{path.stem}-{row:05d}.u2")
            member.size = codes.nbytes
            tar.addfile(member, io.BytesIO(codes.tobytes()))


def write_datasets(folder: Path, *, shards: int) -> None:
    import datasets
    import pyarrow as pa

    files = sorted((folder / "ours").glob("*.arrow"))
    tables = [pa.ipc.open_file(pa.memory_map(str(f))).read_all().select(["tokens"]) for f in files]
    datasets.disable_progress_bars()
    whole = datasets.Dataset(pa.concat_tables(tables).combine_chunks())
    whole.save_to_disk(folder / "datasets", num_shards=shards)


def ours(folder: Path, *, read: Read, packed: str = "") -> Batches:
    """Yield what a training run reads; with `packed`, its inputs on that device."""
    vocab = Vocab(CODES, PER_IMAGE)
    for rows in Loader(folder / "ours", batch_rows=BATCH, seed=0, read=read):
        yield pack(rows.to(packed), layout="bos", vocab=vocab).ids if packed else rows.tokens


def shuffled(count: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng()
    while True:
        yield from rng.permutation(count)[: count // BATCH * BATCH].reshape(-1, BATCH)


def in_memmap(folder: Path, *, random: bool = False) -> Batches:
    """Yield rows in a drawn order; `random` tells the kernel so."""
    parts = []
    for file in sorted((folder / "raw").glob("*.bin")):
        found = np.memmap(file, np.uint16, mode="r")
        if random:
            found._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
        parts.append(np.asarray(found).reshape(-1, ROW_LEN))
    each = len(parts[0])
    for chosen in shuffled(each * len(parts)):
        yield torch.from_numpy(np.stack([parts[i // each][i % each] for i in chosen.tolist()]))


def in_webdataset(folder: Path) -> Batches:
    import webdataset

    urls = sorted(str(path) for path in (folder / "tars").glob("*.tar"))
    samples = webdataset.WebDataset(urls, resampled=True, shardshuffle=False).shuffle(1000)
    stream = (np.frombuffer(sample["u2"], np.uint16) for sample in samples)
    while True:
        yield torch.from_numpy(np.stack(list(islice(stream, BATCH))))


def in_datasets(folder: Path) -> Batches:
    import datasets

    rows = datasets.load_from_disk(str(folder / "datasets")).with_format("numpy")
    for chosen in shuffled(len(rows)):
        yield torch.from_numpy(rows[chosen]["tokens"])


def streams() -> dict[str, Stream | None]:
    """Return the readers, that of a package which is not here as None; np.memmap comes first."""
    there = {name: importlib.util.find_spec(name) for name in ("webdataset", "datasets")}
    return {
        "np.memmap": in_memmap,
        "ours, mmap": partial(ours, read="mmap"),
        "ours, pread": partial(ours, read="pread"),
        "webdataset": in_webdataset if there["webdataset"] else None,
        "datasets": in_datasets if there["datasets"] else None,
    }
