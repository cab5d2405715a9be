"""Real image folders, a real (untrained) tokenizer and a spec, all small."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import tokenizer
from tokenizer.images import save_image

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


def write_images(folder: Path, names: list[str], *, seed: int) -> None:
    """Write one image of smooth noise for each name, suffix included."""
    rng = np.random.default_rng(seed)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        save_image(path, coarse.repeat(SIZE // 4, 0).repeat(SIZE // 4, 1))


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
