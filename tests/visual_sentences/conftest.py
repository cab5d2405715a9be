"""Real image folders, a real (untrained) tokenizer and a spec, all small; and shards of rows that
tell where they come from."""

from collections.abc import Callable, Mapping
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import tokenizer
from visual_sentences.build import Build, build
from visual_sentences.manifest import Manifest, ShardEntry, SourceEntry
from visual_sentences.shards import code_type, write_shard

SIZE = 32  # pixels of the test images; 64 codes each

SPEC = """
seed = 3
row_len = 256

[[source]]
name = "photos"
kind = "image"
path = "photos"
splits = {val = 0.2}
license = "CC0"

[[source]]
name = "depth"
kind = "pair"
inputs = "frames"
targets = "depth"
repeat = 2
note = "nearest neighbours"

[[source]]
name = "clips"
kind = "video"
path = "clips"
stride = [1, 2]
"""


def beside(name: str) -> ModuleType:
    """Import a module of this folder, which is no package."""
    spec = spec_from_file_location(f"beside_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


write_images = beside("every").write_images


def small_tokenizer(folder: Path, *, image_size: int = SIZE, seed: int = 0) -> Path:
    """Save a random tokenizer of 64 codes an image of 32 px whose codes vary between images."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = tokenizer.VQGANConfig(
            image_size=image_size,
            channels=32,
            multipliers=(1,),
            patch=4,
            res_blocks=1,
            latent_dim=8,
            code_dim=8,
            codebook_size=64,
        )
        tokenizer.save(tokenizer.VQGAN(config).eval(), folder)
    return folder


def numbered_rows(
    folder: Path,
    rows: Mapping[tuple[str, str], int],
    *,
    weights: Mapping[str, float] | None = None,
    repeats: Mapping[str, float] | None = None,
    shard_rows: int = 4,
    codebook_size: int = 256,
) -> Path:
    """Write shards for (source, split) → count, whose rows tell where they come from.

    Rows have two images of four codes. The first code of a row is 100 × the number of its source +
    its own number in the split, every second row of a shard is two documents, and the last row of a
    shard has one image alone.
    """
    folder.mkdir(exist_ok=True)
    shards = []
    names = list(dict.fromkeys(source for source, _ in rows))
    for (source, split), count in rows.items():
        for number, first in enumerate(range(0, count, shard_rows)):
            there = min(shard_rows, count - first)
            tokens = np.zeros((there, 8), code_type(codebook_size))
            tokens[:, 0] = 100 * names.index(source) + first + np.arange(there)
            length = np.full(there, 8, np.int32)
            length[-1] = 4
            docs = [[0, 4] if i % 2 and i < there - 1 else [0] for i in range(there)]
            name = f"{source}-{split}-{number:05d}.arrow"
            written = write_shard(
                folder / name,
                tokens=tokens,
                docs=docs,
                length=length,
                keys=[[f"{source}{first + i}", "second"][: length[i] // 4] for i in range(there)],
                metadata={"tokenizer": "t"},
            )
            shards.append(
                ShardEntry(
                    name=name,
                    source=source,
                    split=split,
                    rows=there,
                    documents=sum(map(len, docs)),
                    images=int(length.sum()) // 4,
                    bytes=written.bytes,
                    sha256=written.sha256,
                    offset=written.offset,
                )
            )
    sources = tuple(
        SourceEntry(
            name=name,
            kind="image",
            weight=(weights or {}).get(name),
            repeat=(repeats or {}).get(name),
            preprocess="squash",
            license="",
            note="",
            inputs=0,
            good=0,
            bad={},
        )
        for name in names
    )
    Manifest(
        tokenizer="t",
        codebook_size=codebook_size,
        codes_per_image=4,
        image_size=8,
        row_len=8,
        seed=0,
        sources=sources,
        shards=tuple(shards),
    ).save(folder)
    return folder


@pytest.fixture(scope="session", name="numbered_rows")
def numbered_rows_fixture() -> Callable[..., Path]:
    return numbered_rows


@pytest.fixture(scope="session", name="write_images")
def write_images_fixture() -> Callable[..., None]:
    return write_images


@pytest.fixture(scope="session", name="small_tokenizer")
def small_tokenizer_fixture() -> Callable[..., Path]:
    return small_tokenizer


@pytest.fixture(scope="session")
def tok_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with mix.toml and what it names: 30 photos, 20 pairs, 6 clips of 2 to 12 frames."""
    root = tmp_path_factory.mktemp("data")
    write_images(root / "photos", [f"{i % 3}/{i}.jpg" for i in range(30)], seed=1)
    write_images(root / "frames", [f"{i}.png" for i in range(20)], seed=2)
    write_images(root / "depth", [f"{i}.jpg" for i in range(20)], seed=3)
    clips = [f"clip{c}/{f}.png" for c in range(6) for f in range(2 + 2 * c)]
    write_images(root / "clips", clips, seed=4)
    (root / "mix.toml").write_text(SPEC)
    return root


@pytest.fixture
def write_spec(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "mix.toml"
        path.write_text(text)
        return path

    return write


@pytest.fixture(scope="session")
def every(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every.toml and what it names: every kind of sentence and of container."""
    return beside("every").write_every(tmp_path_factory.mktemp("every"))


@pytest.fixture(scope="session")
def corpus() -> ModuleType:
    """The module that writes bad inputs of all kinds."""
    return beside("corpus")


@pytest.fixture(scope="session")
def processes() -> ModuleType:
    """The module that starts builds as processes, and watches, kills and compares them."""
    return beside("processes")


@pytest.fixture(scope="session")
def undisturbed(every: Path, tok_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """A build of `every` by one process that nothing went wrong with; others must equal it."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    made = Build(
        spec=every / "every.toml", tokenizer=tok_dir, out=out, workers=1, batch=16, shard_rows=3
    )
    assert build(made, log=lambda line: None) is not None
    return made
