"""The page shows the sentences of the shards and stands alone."""

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tokenizer.cli import InputError
from visual_sentences.build import Build, build
from visual_sentences.view import View, view


@pytest.fixture(scope="module")
def built(data: Path, tok_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("view") / "shards"
    build(
        Build(spec=data / "mix.toml", tokenizer=tok_dir, out=out, workers=1), log=lambda line: None
    )
    return out


def test_a_page_and_a_sheet_for_each_source(built: Path, tok_dir: Path) -> None:
    page = view(View(data=built, tokenizer=tok_dir, rows=2))
    assert page == built / "view.html"
    text = page.read_text()
    for name in ("photos", "depth", "clips"):
        assert f"<h2>{name}</h2>" in text
        with Image.open(built / f"view-{name}.png") as sheet:
            assert sheet.width == 4 * 34 + 2  # 4 images of 32 px with gaps of 2
    assert not re.search(r'(src|href)="(?!data:)', text), "the page needs another file"
    assert "CC0" in text and "nearest neighbours" in text


def test_a_frame_is_a_sentence_with_its_names(built: Path, tok_dir: Path, tmp_path: Path) -> None:
    page = view(View(data=built, tokenizer=tok_dir, rows=1, out=tmp_path / "p" / "x.html"))
    text = page.read_text()
    frames = re.findall(
        r'<figure title="([^"]*)"><img alt="(\d) images"\s+src="[^,]*,([^"]*)"', text
    )
    pairs = [frame for frame in frames if frame[0].startswith("inputs/")]
    assert pairs and pairs[0][0].count(" · ") == 3  # two pairs
    for _, count, png in frames:
        with Image.open(io.BytesIO(base64.b64decode(png))) as strip:
            assert strip.width == int(count) * (96 + 2) + 2  # 32 px, enlarged three times


def test_another_tokenizer_is_refused(
    built: Path, tmp_path: Path, small_tokenizer: Callable[..., Path]
) -> None:
    other = small_tokenizer(tmp_path / "other", seed=5)
    with pytest.raises(InputError, match="its codes would show something else"):
        view(View(data=built, tokenizer=other))


def test_a_split_that_is_not_there_is_refused(built: Path, tok_dir: Path) -> None:
    with pytest.raises(InputError, match="wanted one of train, val"):
        view(View(data=built, tokenizer=tok_dir, split="test"))
