"""A build of every kind from every container: what its keys say is what its codes are."""

import io
import re
import tarfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import tokenizer
from visual_sentences.build import Build, build
from visual_sentences.manifest import Manifest
from visual_sentences.shards import open_shard

SIZE, CODES, PLACES = 32, 64, 8
FOLDERS = {
    "listed": "photos",
    "category": "classes",
    "video": "videos",
    "orbit": "orbits",
    "colorize": "photos",
    "inpaint": "photos",
}
ROLES = {
    "style": {"inputs": "classes", "targets": "styled"},
    "annotated": {"image": "photos", "depth": "depth", "seg": "seg"},
    "clips": {"frames": "frames", "mask": "masks"},
}


@pytest.fixture(scope="module")
def built(every: Path, tok_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kinds") / "out"
    command = Build(
        spec=every / "every.toml",
        tokenizer=tok_dir,
        out=out,
        workers=1,
        batch=16,
        shard_rows=3,
        precision="exact",
    )
    assert build(command, log=lambda line: None) is not None
    return out


def sentences(built: Path, source: str) -> list[list[str]]:
    """Return the keys of all sentences of a source."""
    found = []
    for entry in Manifest.load(built).shards:
        if entry.source == source:
            shard = open_shard(built / entry.name)
            for row in range(shard.rows):
                keys = shard.keys(row)
                edges = [*(shard.starts(row) // CODES).tolist(), shard.length[row] // CODES]
                found += [keys[a:b] for a, b in pairwise(edges)]
    return found


def test_each_key_makes_its_codes_again(built: Path, every: Path, tok_dir: Path) -> None:
    """Read, cut and paint each image anew, by other means, from what its key says alone."""
    tok = tokenizer.load(tok_dir)
    for entry in Manifest.load(built).shards:
        shard = open_shard(built / entry.name)
        for row in range(shard.rows):
            keys = shard.keys(row)
            pixels = np.stack([picture(every, entry.source, key) for key in keys])
            codes = tok.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)
            # Batches of another size may round a distance differently: nearly all, not all, equal.
            same = shard.tokens[row, : codes.numel()] == codes.flatten().numpy()
            assert same.mean() > 0.98, (entry.name, keys)
            assert shard.length[row] == codes.numel()
            assert not shard.tokens[row, codes.numel() :].any()


def picture(root: Path, source: str, key: str) -> np.ndarray:
    name, _, edit = key.partition("|")
    if source in ("image", "pair"):
        role, name = name.split("/", 1) if source == "pair" else ("inputs", name)
        tar_name, _, member = name.partition("/")
        assert tar_name.startswith("rgb" if role == "inputs" else "depth")
        with tarfile.open(root / "tars" / tar_name) as tar:
            image = Image.open(io.BytesIO(tar.extractfile(member).read()))  # type: ignore[union-attr]
    elif source == "labelled":
        file, _, row = name.partition("/")
        cell = pq.read_table(root / "parquet" / file).column("image")[int(row)].as_py()
        image = Image.open(io.BytesIO(cell["bytes"]))
    elif ".mp4#" in name:
        file, _, frame = name.partition("#")
        with av.open(str(root / "videos" / file)) as video:
            frames = list(video.decode(video=0))
        image = Image.fromarray(frames[int(frame)].to_ndarray(format="rgb24"))
    elif source in ROLES:
        role, _, name = name.partition("/")
        image = Image.open(root / ROLES[source][role] / name)
    else:
        image = Image.open(root / FOLDERS[source] / name)
    image = image.convert("RGB")
    if found := re.match(r"crop ([\d.]+) ([\d.]+) ([\d.]+) ([\d.]+)", edit):
        left, top, width, height = (float(x) for x in found.groups())
        w, h = image.size
        box = (left * w, top * h, (left + width) * w, (top + height) * h)
        image = image.crop(tuple(round(x) for x in box))  # type: ignore[arg-type]
    image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    pixels = np.asarray(image).copy()
    if re.search(r"\bflip\b", edit):
        pixels = pixels[:, ::-1].copy()
    if re.search(r"\bgray\b", edit):
        grey = np.rint(pixels @ np.array([0.2989, 0.587, 0.114])).astype(np.uint8)
        pixels = grey[..., None].repeat(3, 2)
    if found := re.search(r"hole (\d+) (\d+) (\d+)", edit):
        x, y, side = map(int, found.groups())
        pixels[y : y + side, x : x + side] = 0
    if found := re.search(r"patches ([0-9a-f]{16})", edit):
        bits = int(found[1], 16)
        keep = np.array([bits >> (63 - i) & 1 for i in range(64)], np.uint8).reshape(8, 8)
        pixels *= keep.repeat(SIZE // 8, 0).repeat(SIZE // 8, 1)[..., None]
    return pixels


def test_every_item_is_in_one_sentence_of_each_pass(built: Path) -> None:
    manifest = Manifest.load(built)
    assert all(not source.bad for source in manifest.sources), manifest.sources
    video = next(source for source in manifest.sources if source.name == "video")
    assert (video.inputs, video.good) == (7, 7), "two files of video and five frames"
    counts = {
        name: Counter(key for keys in sentences(built, name) for key in keys)
        for name in (source.name for source in manifest.sources)
    }
    assert set(counts["image"].values()) == {1} and len(counts["image"]) == 24
    assert len(counts["listed"]) == 14 and len({k.partition("|")[0] for k in counts["listed"]}) == 7
    assert len(counts["category"]) == 21 and len(counts["labelled"]) == 20
    assert len(counts["pair"]) == 4 * 24 and set(counts["pair"].values()) == {1}
    assert len(counts["colorize"]) == len(counts["inpaint"]) == 26
    assert len(counts["style"]) == 42 and len(counts["annotated"]) == 39
    assert {k.partition("#")[0] for k in counts["video"] if "#" in k} == {"0.mp4", "1.mp4"}
    for name in ("category", "labelled", "colorize", "inpaint", "style", "annotated"):
        assert set(counts[name].values()) == {1}


def test_sentences_are_what_their_kinds_say(built: Path) -> None:
    assert {len(keys) for keys in sentences(built, "image")} == {1}
    first = open_shard(built / "image-train-00000.arrow")
    order = [key for row in range(first.rows) for key in first.keys(row)]
    assert order != sorted(order), "in seeded order, not as they are stored"
    for keys in sentences(built, "category"):
        classes = [key.split("/")[0] for key in keys]
        assert all(count <= PLACES // 2 for count in Counter(classes).values())
    for keys in sentences(built, "pair"):
        assert [key.split("/")[0] for key in keys] == ["inputs", "targets"] * (len(keys) // 2)
        for x, y in zip(keys[::2], keys[1::2], strict=True):
            assert x.split("/", 1)[1].replace("rgb", "depth") == y.split("/", 1)[1], "one cut"
    for keys in sentences(built, "colorize"):
        assert [key.endswith("|gray") for key in keys] == [True, False] * (len(keys) // 2)
        assert [key.removesuffix("|gray") for key in keys[::2]] == keys[1::2]
    for keys in sentences(built, "style"):
        assert len({key.split("/")[1] for key in keys}) == 1, "one style a sentence"
    orders = set()
    for keys in sentences(built, "annotated"):
        order = [key.split("/")[0] for key in keys[:3]]
        orders.add(tuple(order))
        assert [key.split("/")[0] for key in keys] == order * (len(keys) // 3)
    assert len(orders) > 1
    for keys in sentences(built, "orbit"):
        views = [int(key.split("/")[1].removesuffix(".png")) for key in keys]
        assert len(keys) == PLACES
        assert len({(b - a) % 9 for a, b in pairwise(views)}) == 1
    forms = Counter(
        "separate" if keys[0].split("/")[0] == keys[1].split("/")[0] else "interleaved"
        for keys in sentences(built, "clips")
    )
    assert forms == {"separate": 4, "interleaved": 4}


def test_splits_are_disjoint_and_equal_in_all_sources(built: Path) -> None:
    manifest = Manifest.load(built)
    places: dict[str, set[str]] = {}
    for entry in manifest.shards:
        if entry.source not in ("image", "pair"):
            continue
        shard = open_shard(built / entry.name)
        for row in range(shard.rows):
            for key in shard.keys(row):
                stem = re.sub(r"\|.*|inputs/|targets/|rgb-|depth-", "", key)
                places.setdefault(stem, set()).add(entry.split)
    assert len(places) == 24 and {len(splits) for splits in places.values()} == {1}
    assert {split for splits in places.values() for split in splits} == {"train", "val"}
