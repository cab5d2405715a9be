"""Data for the training tests: a small folder of shards, written by the writer that build uses;
and small models for the tests of what is done with one."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lvm.config import Layout, ModelConfig, Reads, Run
from lvm.model import Transformer, build
from tokenizer.images import encode_image
from visual_sentences.image_shards import write_images
from visual_sentences.manifest import Manifest, ShardEntry, SourceEntry
from visual_sentences.shards import write_shard

HERE = Path(__file__).parent
CODES, PER_IMAGE, ROW_LEN = 61, 4, 32


def write_data(
    folder: Path, *, tokenizer: str = "t" * 64, train: int = 24, val: int = 8, seed: int = 0
) -> Path:
    """Write two sources; of rows of up to 8 images a third is short, others have two documents."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    sources, shards = [], []
    for name in ("a", "b"):
        for split, rows in (("train", train), ("val", val)):
            tokens = rng.integers(0, CODES, (rows, ROW_LEN)).astype(np.uint16)
            length = np.full(rows, ROW_LEN, np.int32)
            length[1::3] = ROW_LEN - 3 * PER_IMAGE
            for row, valid in enumerate(length):
                tokens[row, valid:] = 0
            docs = [[0] if row % 3 == 0 else [0, 2 * PER_IMAGE] for row in range(rows)]
            images = [int(valid) // PER_IMAGE for valid in length]
            shard = f"{name}-{split}-00000.arrow"
            written = write_shard(
                folder / shard,
                tokens=tokens,
                docs=docs,
                length=length,
                keys=[[f"{row}/{i}.png" for i in range(n)] for row, n in enumerate(images)],
                metadata={"tokenizer": tokenizer},
            )
            shards.append(
                ShardEntry(
                    name=shard,
                    source=name,
                    split=split,
                    rows=rows,
                    documents=sum(map(len, docs)),
                    images=sum(images),
                    bytes=written.bytes,
                    sha256=written.sha256,
                    offset=written.offset,
                )
            )
        sources.append(
            SourceEntry(
                name=name,
                kind="image",
                weight=None,
                repeat=None,
                preprocess="squash",
                license="",
                note="",
                inputs=train,
                good=train,
                bad={},
            )
        )
    Manifest(
        tokenizer=tokenizer,
        codebook_size=CODES,
        codes_per_image=PER_IMAGE,
        image_size=32,
        row_len=ROW_LEN,
        seed=seed,
        sources=tuple(sources),
        shards=tuple(shards),
    ).save(folder)
    return folder


@pytest.fixture(scope="session")
def make_data() -> Callable[..., Path]:
    """Return the function that writes a folder of shards; see `write_data`."""
    return write_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def image_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of image shards of two sources, 24 small pictures of each to train on and 8 val."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    sources, shards = [], []
    for name in ("a", "b"):
        for split, rows in (("train", 24), ("val", 8)):
            pictures = rng.integers(0, 256, (rows, 12, 10, 3)).astype(np.uint8)
            shard = f"{name}-{split}-00000.arrow"
            written = write_images(
                folder / shard,
                jpegs=[[encode_image(p, format="JPEG")] for p in pictures],
                labels=[row % 3 for row in range(rows)],
                keys=[[f"{name}/{row}.jpg"] for row in range(rows)],
                metadata={"source": name, "split": split},
            )
            shards.append(
                ShardEntry(
                    name=shard, source=name, split=split, rows=rows, documents=rows, images=rows,
                    bytes=written.bytes, sha256=written.sha256, offset=0,
                )
            )  # fmt: skip
        sources.append(
            SourceEntry(
                name=name, kind="image" if name == "a" else "category", weight=None, repeat=None,
                preprocess="squash", license="", note="", inputs=24, good=24, bad={},
                classes=("x", "y", "z"),
            )
        )  # fmt: skip
    Manifest(
        tokenizer="", codebook_size=0, codes_per_image=0, image_size=12, row_len=0, seed=0,
        sources=tuple(sources), shards=tuple(shards), form="images",
    ).save(folder)  # fmt: skip
    return folder


@pytest.fixture
def make_model():
    """Return a function that makes a small model whose weights are far from their initialisation,
    so that every path moves the logits; keywords replace values of its config and its reads."""

    def make(
        *,
        layout: Layout = "bos",
        codes: int = 40,
        codes_per_image: int = 4,
        row_images: int = 6,
        image_size: int = 8,
        whole_rows: bool = False,
        tokenizer: str = "",
        seed: int = 0,
        **shape: Any,
    ) -> Transformer:
        reads = Reads(
            layout=layout,
            codes=codes,
            codes_per_image=codes_per_image,
            row_len=row_images * codes_per_image,
            image_size=image_size,
            tokenizer=tokenizer,
            whole_rows=whole_rows,
        )
        small = {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 48, "init_std": 0.25}
        config = ModelConfig(**{**small, "vocab_size": reads.vocab.size, **shape})
        model = build(config, seed=seed, reads=reads)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
        return model.eval()

    return make


@pytest.fixture
def two_ranks(tmp_path: Path) -> Callable[..., None]:
    """Return a function that trains runs, one after the other, on two gloo ranks."""

    def on_ranks(*runs: Run) -> None:
        listing = tmp_path / "runs.json"
        listing.write_text(json.dumps([run.to_json() for run in runs]))
        with ExitStack() as stack:  # all open at once, so that the ports differ
            free = [stack.enter_context(socket.socket()) for _ in runs]
            for opened in free:
                opened.bind(("127.0.0.1", 0))
            ports = " ".join(str(opened.getsockname()[1]) for opened in free)
        shared = {
            **os.environ,
            "PYTHONPATH": str(HERE.parents[1]),
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "PORTS": ports,
        }
        ranks = [
            subprocess.Popen(
                [sys.executable, str(HERE / "ranks.py"), str(listing)],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
            )
            for rank in range(2)
        ]
        for rank in ranks:
            _, errors = rank.communicate(timeout=120)
            assert rank.returncode == 0, errors

    return on_ranks
