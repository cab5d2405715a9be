"""Data for the training tests: a small folder of shards, written by the writer that build uses;
and small models for the tests of what is done with one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lvm.config import Layout, ModelConfig, Reads
from lvm.model import Transformer, build
from visual_sentences.manifest import Manifest, ShardEntry, SourceEntry
from visual_sentences.shards import write_shard

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
