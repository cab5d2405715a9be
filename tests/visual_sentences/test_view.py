"""The page shows the sentences of the shards, says where each picture stands, and needs no other
file; `test_view_browser` opens it."""

import base64
import html
import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tokenizer
from tokenizer.cli import CommandError, InputError
from tokenizer.images import encode_image
from visual_sentences.image_shards import write_images
from visual_sentences.manifest import Manifest, ShardEntry, SourceEntry
from visual_sentences.mixture import Mixture
from visual_sentences.shards import write_shard
from visual_sentences.view import View, view

SIZE, CODES, ROW = 32, 64, 4  # pixels, codes an image, images a row
COUNTS = {("photos", "train"): (3, 2), ("clips", "train"): (4,), ("clips", "val"): (2,)}
KINDS = {"photos": "image", "clips": "video"}
COLOURS = {"red": (220, 20, 20), "green": (20, 180, 40), "blue": (30, 30, 200)}


def entry(name: str, source: str, split: str, written, *, images: int) -> ShardEntry:
    return ShardEntry(
        name=name,
        source=source,
        split=split,
        rows=written.rows,
        documents=written.rows,
        images=images,
        bytes=written.bytes,
        sha256=written.sha256,
        offset=written.offset,
    )


def source(name: str, kind: str, **changes) -> SourceEntry:
    plain = SourceEntry(
        name=name,
        kind=kind,
        weight=None,
        repeat=None,
        preprocess="squash",
        license="CC0",
        note='made <by> "hand"',
        inputs=9,
        good=7,
        bad={"truncated": 2},
    )
    return replace(plain, **changes)


@pytest.fixture(scope="module")
def codes(tok_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of two images and a clip, or of one clip; the last row of a shard holds one sentence.

    An image's first 63 codes are one number, its 64th tells which image it is.
    """
    folder = tmp_path_factory.mktemp("codes")
    shards = []
    for (name, split), sizes in COUNTS.items():
        for number, rows in enumerate(sizes):
            tokens = np.zeros((rows, ROW * CODES), np.uint16)
            docs, length, keys = [], np.zeros(rows, np.int32), []
            for row in range(rows):
                images = ROW if row + 1 < rows else 2
                for image in range(images):
                    tokens[row, image * CODES : (image + 1) * CODES] = (7 * row + 3 * image) % 64
                docs.append([0, CODES] if name == "photos" else [0])
                length[row] = images * CODES
                keys.append([f"{number}/{row}-{image}.jpg" for image in range(images)])
            keys[0][1] += "|crop 0.1 0 0.8 0.75 flip"
            written = write_shard(
                folder / f"{name}-{split}-{number:05d}.arrow",
                tokens=tokens,
                docs=docs,
                length=length,
                keys=keys,
                metadata={"tokenizer": tokenizer.load(tok_dir).id},
            )
            place = f"{name}-{split}-{number:05d}.arrow"
            shards.append(entry(place, name, split, written, images=int(length.sum()) // CODES))
    Manifest(
        tokenizer=tokenizer.load(tok_dir).id,
        codebook_size=64,
        codes_per_image=CODES,
        image_size=SIZE,
        row_len=ROW * CODES,
        seed=0,
        sources=tuple(source(name, kind) for name, kind in KINDS.items()),
        shards=tuple(shards),
    ).save(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image shards of one category source: row i has one to three pictures of colour i."""
    folder = tmp_path_factory.mktemp("images")
    jpegs, keys = [], []
    for row, colour in enumerate(COLOURS.values()):
        picture = np.full((SIZE, SIZE, 3), colour, np.uint8)
        jpegs.append([encode_image(picture, format="JPEG")] * (row + 1))
        keys.append([f"{row}/{image}.jpg" for image in range(row + 1)])
    written = write_images(
        folder / "c-train-00000.arrow", jpegs=jpegs, labels=[0, 1, -1], keys=keys, metadata={}
    )
    Manifest(
        tokenizer="",
        codebook_size=0,
        codes_per_image=0,
        image_size=SIZE,
        row_len=0,
        seed=0,
        form="images",
        sources=(source("c", "category", classes=("tench", "goldfish")),),
        shards=(entry("c-train-00000.arrow", "c", "train", written, images=6),),
    ).save(folder)
    return folder


Row = tuple[dict[str, str], list[list[dict[str, str]]]]


def rows_of(page: Path) -> list[Row]:
    """Return the data of each row of the page, and of the pictures in each of its sentences."""
    text = page.read_text(encoding="utf-8")
    rows = []
    for section in re.findall(r'<section class="row"(.*?)</section>', text, re.DOTALL):
        head, _, body = section.partition(">")
        sentences = [
            [
                data(button) | {"src": re.findall(r'src="([^"]*)"', button)[0]}
                for button in re.findall(r"<button(.*?)</button>", sentence, re.DOTALL)
            ]
            for sentence in body.split('<div class="sentence">')[1:]
        ]
        rows.append((data(head), sentences))
    return rows


def data(tag: str) -> dict[str, str]:
    return {k: html.unescape(v) for k, v in re.findall(r'data-([a-z]+)="([^"]*)"', tag)}


def pixels(uri: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return np.asarray(image.convert("RGB"))


def test_each_picture_is_there_with_its_place(codes: Path, tok_dir: Path) -> None:
    page = view(View(data=codes, tokenizer=tok_dir, rows=99))
    assert page == codes / "view.html"
    rows = rows_of(page)
    seen = [(row["source"], row["kind"], row["shard"], row["row"]) for row, _ in rows]
    assert seen == [
        *(("photos", "image", "photos-train-00000.arrow", str(row)) for row in range(3)),
        *(("photos", "image", "photos-train-00001.arrow", str(row)) for row in range(2)),
        *(("clips", "video", "clips-train-00000.arrow", str(row)) for row in range(4)),
    ]
    assert [len(sentence) for sentence in rows[0][1]] == [1, 3]
    assert [len(sentence) for sentence in rows[2][1]] == [1, 1]
    assert [len(sentence) for sentence in rows[5][1]] == [4]
    first, second = rows[3][1][0][0], rows[3][1][1][0]
    assert (first["name"], first["edit"]) == ("1/0-0.jpg", "")
    assert (second["name"], second["edit"]) == ("1/0-1.jpg", "crop 0.1 0 0.8 0.75 flip")


def test_a_picture_is_what_its_codes_decode_to(codes: Path, tok_dir: Path) -> None:
    rows = rows_of(view(View(data=codes, tokenizer=tok_dir, rows=99)))
    third = rows[1][1][1][1]  # row 1, image 2: code 7 · 1 + 3 · 2
    decoded = tokenizer.load(tok_dir).decode(torch.full((1, CODES), 13))[0]
    wanted = decoded.mul(255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(pixels(third["src"]), wanted)  # PNG: exact


def test_the_page_needs_no_other_file_and_quotes_what_it_shows(codes: Path, tok_dir: Path) -> None:
    text = view(View(data=codes, tokenizer=tok_dir, rows=1)).read_text()
    assert not re.search(r'(src|href|action)="(?!data:)', text)
    assert "http" not in text
    assert "<by>" not in text and "made &lt;by&gt;" in text
    assert "7 of 9" in text and "truncated 2" in text and "CC0" in text


def test_a_contact_sheet_for_each_source(codes: Path, tok_dir: Path, tmp_path: Path) -> None:
    view(View(data=codes, tokenizer=tok_dir, rows=99, out=tmp_path / "deep" / "x.html"))
    for name, rows in (("photos", 5), ("clips", 4)):
        with Image.open(tmp_path / "deep" / f"x-{name}.png") as sheet:
            assert sheet.size == (ROW * (SIZE + 2) + 2, rows * (SIZE + 2) + 2)
            last = np.asarray(sheet)[-3, -3]
        assert last.tolist() == [240] * 3  # the last row holds two images of four


def test_the_seed_chooses_rows_and_a_split_has_its_own(codes: Path, tok_dir: Path) -> None:
    def chosen(**options) -> list[tuple[str, str]]:
        rows = rows_of(view(View(data=codes, tokenizer=tok_dir, **options)))
        return [(row["shard"], row["row"]) for row, _ in rows]

    found = {tuple(chosen(rows=2, seed=seed)) for seed in range(6)}
    assert len(found) > 1
    assert all(sorted(rows[:2]) == list(rows[:2]) for rows in found)  # in the order of the shards
    assert chosen(split="val") == [("clips-val-00000.arrow", str(row)) for row in range(2)]


def test_one_shard_alone(codes: Path, tok_dir: Path) -> None:
    for name in ("photos-train-00001.arrow", "clips-val-00000.arrow"):
        rows = rows_of(view(View(data=codes / name, tokenizer=tok_dir)))
        assert [(row["shard"], row["row"]) for row, _ in rows] == [(name, "0"), (name, "1")]
        assert rows[0][1][0][0]["name"].endswith("0-0.jpg")
    other = codes / "other.arrow"
    other.write_bytes(b"")
    with pytest.raises(InputError, match="no shard of the manifest beside it"):
        view(View(data=other, tokenizer=tok_dir))
    other.unlink()


@pytest.mark.parametrize("mix", [None, {"photos": 1.0, "clips": 3.0}])
def test_the_mixture_is_in_the_order_of_training(
    codes: Path, tok_dir: Path, mix: dict[str, float] | None
) -> None:
    page = view(
        View(data=codes, tokenizer=tok_dir, mixture=True, rows=20, first=5, seed=4, mix=mix)
    )
    mixture = Mixture.of(Manifest.load(codes), split="train", seed=4, mix=mix)
    sources, numbers = mixture.rows(5 + np.arange(20))
    wanted = []
    for source, number in zip(sources.tolist(), numbers.tolist(), strict=True):
        name = list(KINDS)[source]
        first = COUNTS[name, "train"][0]
        shard, row = (0, number) if number < first else (1, number - first)
        wanted.append((f"{name}-train-{shard:05d}.arrow", str(row)))
    rows = rows_of(page)
    assert [(row["shard"], row["row"]) for row, _ in rows] == wanted
    assert [row["sample"] for row, _ in rows] == [str(sample) for sample in range(5, 25)]
    with Image.open(codes / "view-mixture.png") as sheet:
        assert sheet.height == 20 * (SIZE + 2) + 2


def test_image_shards_need_no_tokenizer_and_are_shown_as_they_are(images: Path) -> None:
    rows = rows_of(view(View(data=images)))
    assert [row["label"] for row, _ in rows] == ["tench", "goldfish", ""]
    for row, (colour, (_, sentences)) in enumerate(zip(COLOURS.values(), rows, strict=True)):
        [sentence] = sentences
        assert [p["name"] for p in sentence] == [f"{row}/{n}.jpg" for n in range(row + 1)]
        assert sentence[0]["src"].startswith("data:image/jpeg;base64,")
        # 4: JPEG of one flat colour rounds it in YCbCr
        assert np.abs(pixels(sentence[0]["src"]).astype(int) - colour).max() <= 4


def test_labels_without_names_are_numbers_and_single_pictures_stand_side_by_side(
    tmp_path: Path, images: Path
) -> None:
    jpeg = encode_image(np.zeros((SIZE, SIZE, 3), np.uint8), format="JPEG")
    written = write_images(
        tmp_path / "c-train-00000.arrow",
        jpegs=[[jpeg]] * 5,
        labels=[4, 3, -1, 0, 2],
        keys=[["a"]] * 5,
        metadata={},
    )
    manifest = Manifest.load(images)
    replace(
        manifest,
        sources=(source("c", "category"),),
        shards=(entry("c-train-00000.arrow", "c", "train", written, images=5),),
    ).save(tmp_path)
    rows = rows_of(view(View(data=tmp_path)))
    assert [row["label"] for row, _ in rows] == ["4", "3", "", "0", "2"]
    with Image.open(tmp_path / "view-c.png") as sheet:
        assert sheet.size == (5 * (SIZE + 2) + 2, SIZE + 2 + 2)


def test_a_damaged_image_in_a_shard_is_named(images: Path, tmp_path: Path) -> None:
    write_images(
        tmp_path / "c-train-00000.arrow",
        jpegs=[[b"no image"]] * 3,
        labels=[-1] * 3,
        keys=[["a"]] * 3,
        metadata={},
    )
    Manifest.load(images).save(tmp_path)
    with pytest.raises(CommandError, match=r"row 0 of the shard .*not an image"):
        view(View(data=tmp_path))


def test_a_large_picture_is_a_jpeg(
    tmp_path: Path, small_tokenizer: Callable[..., Path], codes: Path
) -> None:
    """A page of 800 pictures of 256 px is 20 MB so, and 100 MB as PNG."""
    large = small_tokenizer(tmp_path / "tok", image_size=256)
    each = tokenizer.load(large).codes_per_image
    written = write_shard(
        tmp_path / "s-train-00000.arrow",
        tokens=np.zeros((1, each), np.uint16),
        docs=[[0]],
        length=np.array([each], np.int32),
        keys=[["a.jpg"]],
        metadata={"tokenizer": ""},
    )
    plain = Manifest.load(codes)
    replace(
        plain,
        tokenizer="",  # imported shards do not know it
        codes_per_image=each,
        image_size=256,
        row_len=each,
        sources=(source("s", "image"),),
        shards=(entry("s-train-00000.arrow", "s", "train", written, images=1),),
    ).save(tmp_path)
    page = view(View(data=tmp_path, tokenizer=large))
    [(_, [[picture]])] = rows_of(page)
    assert picture["src"].startswith("data:image/jpeg;base64,")
    assert "tokenizer unknown" in page.read_text()


def test_what_cannot_be_shown_is_refused(
    codes: Path, images: Path, tok_dir: Path, tmp_path: Path, small_tokenizer: Callable[..., Path]
) -> None:
    other = small_tokenizer(tmp_path / "other", seed=5)
    wrong: list[tuple[dict, str]] = [
        ({"data": codes, "tokenizer": other}, "its codes would show something else"),
        ({"data": codes}, "give the --tokenizer that it was built with"),
        ({"data": codes, "tokenizer": tok_dir, "split": "test"}, "wanted one of train, val"),
        ({"data": images, "rows": 0}, "wanted --rows of 1 or more"),
        ({"data": images, "first": 3}, "give --mixture too"),
        ({"data": images / "c-train-00000.arrow", "mixture": True}, "give the folder"),
        ({"data": images, "mixture": True, "mix": {"d": 1.0}}, 'the mixture names "d"'),
    ]
    for options, message in wrong:
        with pytest.raises(InputError, match=message):
            view(View(**options))
