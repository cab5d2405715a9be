"""A build over bad inputs of all kinds: each is counted by its reason, and the rest is built."""

import io
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from visual_sentences.build import Build, build, main
from visual_sentences.image_shards import open_images
from visual_sentences.manifest import Manifest
from visual_sentences.shards import open_shard


@pytest.fixture(scope="module")
def built(
    corpus: ModuleType, tok_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str]]:
    root = tmp_path_factory.mktemp("bad").resolve() / "here"
    reasons = corpus.corpus(root)
    spec = "row_len = 1024\nimage_size = 32\n"  # 16 places, as rows of images draw frames
    for name, path in corpus.ORIGINS.items():
        kind = "video" if name == "clips" else "image"
        spec += f'[[source]]\nname = "{name}"\nkind = "{kind}"\npath = "{path}"\n'
    (root / "mix.toml").write_text(spec)
    command = Build(spec=root / "mix.toml", tokenizer=tok_dir, out=root / "out", workers=1)
    assert main(command) == 0
    return root, reasons


def test_each_bad_input_is_counted_by_its_reason(
    corpus: ModuleType, built: tuple[Path, dict[str, str]]
) -> None:
    root, reasons = built
    lines = (root / "out/unusable.tsv").read_text(encoding="utf-8").splitlines()
    found = {f"{source}/{name}": why for source, why, name in (line.split("\t") for line in lines)}
    assert found == reasons | {"clips/frames/0.png": "clip too short"}
    assert len(reasons) >= 40 and len(set(reasons.values())) >= 20
    for source in Manifest.load(root / "out").sources:
        own = [why for name, why in found.items() if name.startswith(f"{source.name}/")]
        assert source.bad == {why: own.count(why) for why in own}


def test_all_that_is_good_is_built_and_nothing_from_outside(
    corpus: ModuleType, built: tuple[Path, dict[str, str]]
) -> None:
    root, _ = built
    pictures = 0
    names: dict[str, set[str]] = {}
    for entry in Manifest.load(root / "out").shards:
        shard = open_shard(root / "out" / entry.name)
        for row in range(shard.rows):
            names.setdefault(entry.source, set()).update(
                key.partition("#")[0] for key in shard.keys(row)
            )
            pictures += len(shard.keys(row))
    good = corpus.GOOD | {"clips": corpus.GOOD["clips"] - {"frames/0.png"}}
    assert names == {source: set(wanted) for source, wanted in good.items()}
    stored = root / "jpegs"
    command = Build(spec=root / "mix.toml", images=True, out=stored, workers=1)
    manifest = build(command, log=lambda line: None)
    assert manifest is not None and sum(s.images for s in manifest.shards) == pictures
    for entry in manifest.shards:
        shard = open_images(stored / entry.name)
        for row in range(shard.rows):
            for jpeg in shard.jpegs(row):
                image = np.asarray(Image.open(io.BytesIO(jpeg)), np.int32)
                assert abs(image - np.array(corpus.CANARY)).mean() > 30, "a picture from outside"


@pytest.mark.parametrize(("preprocess", "pairs"), [("squash", 3), ("crop", 1)])
def test_a_crop_refuses_pairs_that_it_would_cut_differently(
    tmp_path: Path, tok_dir: Path, preprocess: str, pairs: int
) -> None:
    """Of equal shape; of equal shape but another size; of another shape."""
    for role, sizes in {"x": [(64, 48)] * 3, "y": [(64, 48), (48, 64), (48, 48)]}.items():
        (tmp_path / role).mkdir()
        for number, size in enumerate(sizes):
            Image.new("RGB", size, (90, 120, 30 * number)).save(tmp_path / role / f"{number}.png")
    (tmp_path / "mix.toml").write_text(
        'row_len = 256\n[[source]]\nname = "p"\nkind = "pair"\ninputs = "x"\ntargets = "y"\n'
        f'preprocess = "{preprocess}"\n'
    )
    out = tmp_path / "out"
    command = Build(spec=tmp_path / "mix.toml", tokenizer=tok_dir, out=out, workers=1)
    manifest = build(command, log=lambda line: None)
    assert manifest is not None
    source = manifest.sources[0]
    assert source.good == 2 * pairs
    assert source.bad == ({"shapes differ": 6 - 2 * pairs} if pairs < 3 else {})
