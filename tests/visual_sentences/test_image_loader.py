"""Images for training on pixels: same samples anywhere, views as torchvision draws them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from tokenizer.cli import CommandError, InputError
from tokenizer.images import BadImage, encode_image
from visual_sentences import augment
from visual_sentences.augment import centre_view, crop_box, jitter, random_view
from visual_sentences.image_loader import Cut, ImageLoader, View, held_out_images
from visual_sentences.image_shards import write_images
from visual_sentences.manifest import Manifest, ShardEntry, SourceEntry

ROWS = 20
CUT = Cut(view=View(size=8, jitter=(0.4, 0.4, 0.2, 0.1)), places=16)


def write(folder: Path, *, rows: int = ROWS, broken: int | None = None) -> Path:
    rng = np.random.default_rng(0)
    shards = []
    for split, count in (("train", rows), ("val", 7)):
        files = [
            [encode_image(rng.integers(0, 256, (12, 16, 3)).astype(np.uint8), format="JPEG")]
            for _ in range(count)
        ]
        if broken is not None:
            files[broken] = [files[broken][0][:60]]
        name = f"s-{split}-00000.arrow"
        written = write_images(
            folder / name,
            jpegs=files,
            labels=list(range(count)),
            keys=[[f"{split}/{i}.jpg"] for i in range(count)],
            metadata={"source": "s"},
        )
        shards.append(
            ShardEntry(
                name=name, source="s", split=split, rows=count, documents=count, images=count,
                bytes=written.bytes, sha256=written.sha256, offset=0,
            )
        )  # fmt: skip
    source = SourceEntry(
        name="s", kind="category", weight=None, repeat=None, preprocess="squash", license="",
        note="", inputs=rows, good=rows, bad={},
    )  # fmt: skip
    Manifest(
        tokenizer="", codebook_size=0, codes_per_image=0, image_size=12, row_len=0, seed=0,
        sources=(source,), shards=tuple(shards), form="images",
    ).save(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("images"))


def take(folder, steps, **options):
    batches = iter(ImageLoader(folder, cut=CUT, **{"batch_rows": 4, "seed": 3, **options}))
    return [next(batches) for _ in range(steps)]


def same(a, b):
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("pixels", "prefix", "label", "source")
    )


def test_a_run_goes_on_anywhere_with_the_same_pixels(folder):
    whole = take(folder, 6)
    assert all(map(same, whole[2:], take(folder, 4, start=8)))
    ranks = [take(folder, 6, rank=r, world=2) for r in (0, 1)]
    for step, one in enumerate(whole):
        for name in ("pixels", "prefix", "label"):
            halves = torch.cat([getattr(rank[step], name) for rank in ranks])
            assert torch.equal(halves, getattr(one, name))
    assert all(map(same, whole, take(folder, 6, workers=2)))


def test_an_epoch_uses_every_image_once_and_the_next_one_another_view_of_it(folder):
    first, second = take(folder, ROWS // 4), take(folder, ROWS // 4, start=ROWS)
    labels = torch.cat([batch.label for batch in first])
    assert sorted(labels.tolist()) == list(range(ROWS))
    views = {int(n): p for b in first for n, p in zip(b.label, b.pixels, strict=True)}
    again = {int(n): p for b in second for n, p in zip(b.label, b.pixels, strict=True)}
    assert sum(torch.equal(views[n], again[n]) for n in views) == 0
    assert not same(first[0], take(folder, 1, seed=4)[0])


def test_validation_is_the_centre_of_each_image_once_for_any_number_of_ranks(folder):
    one = list(held_out_images(folder, cut=CUT, rows=100, micro_rows=3))
    labels = torch.cat([b.label[b.source >= 0] for b in one])
    assert labels.tolist() == list(range(7))
    ranks = [
        list(held_out_images(folder, cut=CUT, rows=100, micro_rows=2, rank=r, world=2))
        for r in (0, 1)
    ]
    assert len(ranks[0]) == len(ranks[1])
    found = {
        int(n): (p, int(s))
        for rank in ranks
        for b in rank
        for n, p, s in zip(b.label, b.pixels, b.prefix, strict=True)
        if n >= 0
    }
    for batch in one:
        for n, pixels, prefix in zip(batch.label, batch.pixels, batch.prefix, strict=True):
            if n >= 0:
                assert torch.equal(found[int(n)][0], pixels)
                assert found[int(n)][1] == int(prefix) in range(1, 16)
    stand_in = one[-1]
    assert int((stand_in.source < 0).sum()) == 2
    assert int(stand_in.predicted) == 16 - int(stand_in.prefix[0])


def test_without_a_prefix_there_is_none(folder):
    plain = replace(CUT, prefix=False)
    batch = next(iter(ImageLoader(folder, cut=plain, batch_rows=4, seed=3)))
    assert batch.prefix.tolist() == [0] * 4
    assert int(batch.predicted) == 4 * 15
    assert [part.rows for part in batch.split(3)] == [3, 1]
    assert batch.tokens == 64


def test_a_damaged_file_ends_the_run_by_its_name(tmp_path):
    folder = write(tmp_path, broken=5)
    with pytest.raises(CommandError, match=r"train/5\.jpg .*cannot be decoded"):
        take(folder, 5)


def test_shards_of_codes_are_refused(tmp_path):
    folder = write(tmp_path)
    manifest = replace(Manifest.load(folder), form="codes")
    manifest.save(folder)
    with pytest.raises(InputError, match="wanted images: build it with --images"):
        take(folder, 1)


# Views -------------------------------------------------------------------------------------------


def test_crops_have_the_area_and_ratio_that_were_drawn():
    random = np.random.default_rng(0)
    boxes = np.array([crop_box(400, 300, least=0.4, random=random) for _ in range(4000)])
    left, top, width, height = boxes.T
    assert (left >= 0).all() and (top >= 0).all()
    assert (left + width <= 400).all() and (top + height <= 300).all()
    area, ratio = width * height / (400 * 300), width / height
    # Whole pixels: a side of 200 is off by half a pixel, its area by half a percent.
    assert 0.395 < area.min() < 0.41 and 0.97 < area.max() <= 1.0
    assert 0.745 < ratio.min() < 0.76 and 1.32 < ratio.max() < 1.34


def test_an_image_too_narrow_for_any_crop_gives_its_centre():
    assert crop_box(1000, 10, least=0.4, random=np.random.default_rng(0)) == (493, 0, 13, 10)
    assert crop_box(9, 900, least=1.0, random=np.random.default_rng(0)) == (0, 444, 9, 12)


def test_a_view_of_all_of_a_square_is_a_bicubic_resize():
    picture = np.random.default_rng(0).integers(0, 256, (24, 24, 3)).astype(np.uint8)
    file = encode_image(picture)  # PNG: nothing lost
    view = View(size=24, least_crop=1.0, flip=False)
    # Ratio 1 within rounding is rare: most draws at full area do not fit and give the centre, all.
    found = random_view(file, view, np.random.default_rng(1))
    assert np.array_equal(found, picture)


def test_half_of_the_views_are_mirrored():
    ramp = np.tile(np.arange(0, 240, 10, dtype=np.uint8)[None, :, None], (24, 1, 3))
    file, view = encode_image(ramp), View(size=24)
    mirrored = 0
    for seed in range(400):
        found = random_view(file, view, np.random.default_rng(seed))
        mirrored += int(found[0, 0, 0]) > int(found[0, -1, 0])
    assert 140 < mirrored < 260  # 6 standard deviations of 400 fair coins


def test_colours_change_as_pillows_enhancers_and_the_hue_circle_do():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8))
    only = {
        (0.4, 0, 0, 0): ImageEnhance.Brightness,
        (0, 0.4, 0, 0): ImageEnhance.Contrast,
        (0, 0, 0.4, 0): ImageEnhance.Color,
    }
    for i, (most, enhancer) in enumerate(only.items()):
        random = np.random.default_rng(5)
        factors = [random.uniform(max(0.0, 1 - m), 1 + m) for m in most[:3]]
        wanted = enhancer(picture).enhance(factors[i])
        found = jitter(picture, most, np.random.default_rng(5))
        assert np.array_equal(np.asarray(found), np.asarray(wanted))
    red = Image.new("RGB", (2, 2), (255, 0, 0))
    turned = augment._turn(red, 1 / 3)  # a third of the circle: green, in steps of 1/256
    assert turned.getpixel((0, 0))[1] == 255 and turned.getpixel((0, 0))[0] < 8


def test_no_change_is_none():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    assert jitter(picture, (0, 0, 0, 0), np.random.default_rng(0)) is picture


def test_the_centre_is_cut_from_a_resized_shorter_side():
    picture = np.zeros((80, 160, 3), np.uint8)
    picture[:, 60:100] = 255
    found = centre_view(encode_image(picture), 56)
    assert found.shape == (56, 56, 3)
    # Resized to 64 x 128, the band is 48 … 80; the cut starts at 36.
    middle = found[28, :, 0]
    assert middle[20] == 255 and middle[4] == 0 and middle[52] == 0


@pytest.mark.parametrize("file", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_refused(file):
    with pytest.raises(BadImage):
        random_view(file, View(size=8), np.random.default_rng(0))
    with pytest.raises(BadImage):
        centre_view(file, 8)
