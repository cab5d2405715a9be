"""What read_image accepts, refuses and returns."""

import io
import pickle
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenizer.images import (
    BadImage,
    encode_image,
    fit,
    grid,
    list_images,
    natural_key,
    open_image,
    read_image,
    save_image,
)


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("cut.jpg", encode_image(noise(64, 64), format="JPEG")[:900], "truncated"),
        ("cut.png", encode_image(noise(64, 64))[:900], "truncated"),
        ("text.png", b"this is no image", "not an image"),
        ("empty.png", b"", "empty file"),
        ("bytes.jpg", b"\xff\xd8\xff\xe0" + b"\x00" * 64, "not an image"),
    ],
)
def test_unusable_file_is_refused_with_its_reason(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    for source in (tmp_path / name, content):
        with pytest.raises(BadImage) as caught:
            read_image(source, size=32)
        assert caught.value.reason == reason


@pytest.mark.parametrize("format", ["GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG", "PNG"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5])
def test_a_file_that_ends_early_is_refused_in_every_format(format: str, share: float) -> None:
    whole = encoded(Image.fromarray(noise(64, 64)), format)
    with pytest.raises(BadImage) as caught:
        read_image(whole[: int(share * len(whole))], size=32)
    assert caught.value.reason in ("empty file", "not an image", "truncated", "unreadable")


def test_damaged_bytes_are_read_or_refused_and_raise_nothing_else() -> None:
    """With 40,000 files this found `struct.error`, out of a damaged EXIF block."""
    rng, exif = np.random.default_rng(0), Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    image = Image.fromarray(noise(24, 24))
    wholes = [encoded(image, format, exif=exif) for format in ("PNG", "JPEG", "WEBP", "TIFF")]
    refused = 0
    for turn in range(300):
        data = bytearray(wholes[turn % len(wholes)])
        for place in rng.integers(2, min(len(data), 160), size=3):
            data[place] = rng.integers(0, 256)
        try:
            read_image(bytes(data), size=16)
        except BadImage:
            refused += 1
    assert 30 < refused < 300  # the damage is real, and not all of it


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="missing file"):
        read_image(tmp_path / "no.png", size=32)


def test_refusal_survives_the_way_home_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(BadImage("truncated", "a.jpg")))
    assert (error.reason, error.detail) == ("truncated", "a.jpg")


@pytest.mark.parametrize("preprocess", ["squash", "crop"])
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 200), (33, 17), (17, 33), (31, 32), (300, 301), (32, 32)]
)
def test_every_shape_becomes_the_square(preprocess, shape: tuple[int, int]) -> None:
    image = read_image(encode_image(noise(*shape)), size=32, preprocess=preprocess)
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8


def test_crop_keeps_the_middle_and_squash_keeps_all() -> None:
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, :40, 0], wide[:, 40:80, 1], wide[:, 80:, 2] = 255, 255, 255
    crop = read_image(encode_image(wide), size=40, preprocess="crop")
    assert np.array_equal(crop, wide[:, 40:80])
    squash = read_image(encode_image(wide), size=40, preprocess="squash")
    assert [squash[20, x].argmax() for x in (2, 20, 37)] == [0, 1, 2]


def test_an_image_of_the_right_size_is_not_touched() -> None:
    image = noise(32, 32)
    for preprocess in ("squash", "crop"):
        assert np.array_equal(
            read_image(encode_image(image), size=32, preprocess=preprocess), image
        )


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    image = read_image(encoded(Image.fromarray(ramp), "PNG"), size=32)
    assert np.abs(image[..., 0] - ramp / 257.0).max() <= 0.5  # rounding to 8 bits
    assert np.array_equal(image[..., 0], image[..., 2])


def png(depth: int, kind: int, row: bytes, size: int = 32) -> bytes:
    """Return a square PNG of equal rows; Pillow writes no 16-bit colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checked = name + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", size, size, depth, kind, 0, 0, 0)
    pixels = zlib.compress((b"\0" + row) * size)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("kind", "pixel", "expected"),
    [
        (2, (0xFFFF, 0x8000, 0x01FF), [255, 128, 1]),  # RGB
        (6, (0xFFFF, 0x8000, 0x01FF, 0), [255, 128, 1]),  # RGBA, clear
        (4, (0x8000, 0), [128, 128, 128]),  # grey with alpha, clear
    ],
)
def test_sixteen_bit_colour_is_read_by_its_high_bytes(
    kind: int, pixel: tuple[int, ...], expected: list[int]
) -> None:
    image = read_image(png(16, kind, struct.pack(f">{len(pixel)}H", *pixel) * 32), size=32)
    assert (image == expected).all()


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (np.full((32, 32), 0x8000, np.int32), 128),  # 16-bit depth in a 32-bit file
        (np.full((32, 32), 70_000, np.int32), None),
        (np.full((32, 32), -1, np.int32), None),
        (np.full((32, 32), 0.5, np.float32), None),
        (np.full((32, 32), np.nan, np.float32), None),
    ],
)
def test_grey_of_unknown_range_is_refused(values: np.ndarray, wanted: int | None) -> None:
    data = encoded(Image.fromarray(values), "TIFF")
    if wanted is not None:
        assert (read_image(data, size=32) == wanted).all()
        return
    with pytest.raises(BadImage, match="unsupported mode"):
        read_image(data, size=32)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animated_image_is_its_first_frame(format: str) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "lime")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.n_frames == 2
    assert (read_image(data, size=32) == [255, 0, 0]).all()


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_transparency_is_dropped_and_colours_stay_as_stored(alpha: int) -> None:
    colour = Image.new("RGBA", (32, 32), (200, 100, 50, alpha))
    assert (read_image(encoded(colour, "PNG"), size=16) == [200, 100, 50]).all()


def test_adobes_inverted_cmyk_is_read_the_right_way_round() -> None:
    data = encoded(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG", quality=95)
    assert b"Adobe" in data  # such files store 255 − ink
    red = read_image(data, size=32).astype(int)
    assert np.abs(red - [255, 0, 0]).max() <= 4  # JPEG


def test_an_image_too_elongated_to_crop_is_refused() -> None:
    line = encoded(Image.new("RGB", (1, 60_000)), "PNG")
    with pytest.raises(BadImage, match="too elongated: 1×60000"):
        read_image(line, size=256, preprocess="crop")  # 256 × 15,360,000 once resized
    assert read_image(line, size=32, preprocess="squash").shape == (32, 32, 3)


def test_palette_with_transparency_becomes_rgb() -> None:
    palette = Image.fromarray(np.tile(np.arange(4, dtype=np.uint8), (32, 8))).convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9] + [0] * 756)
    image = read_image(encoded(palette, "PNG", transparency=bytes([255, 128, 255, 0])), size=32)
    assert image[0, :4].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]]


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "1"])
def test_other_colour_modes_become_rgb(mode: str) -> None:
    format = "TIFF" if mode == "CMYK" else "PNG"
    image = Image.new("RGB", (32, 32), (255, 255, 255)).convert(mode)
    assert read_image(encoded(image, format), size=32).min() == 255


def test_camera_rotation_is_applied() -> None:
    upright = np.zeros((32, 32, 3), np.uint8)
    upright[:16] = 255  # the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90° clockwise to show": stored lying on its side
    stored = Image.fromarray(np.rot90(upright).copy())
    image = read_image(encoded(stored, "PNG", exif=exif), size=32)
    assert np.array_equal(image, upright)


def test_large_jpeg_decoded_small_is_close_to_the_full_decode() -> None:
    y, x = np.mgrid[0:512, 0:512] / 512.0
    smooth = (np.stack([x, y, x * y], -1) * 255).astype(np.uint8)
    image = read_image(encode_image(smooth, format="JPEG", quality=95), size=32)
    exact = read_image(encode_image(smooth), size=32)
    # JPEG and the two ways to shrink a smooth picture differ by a few grey levels at most.
    assert np.abs(image.astype(int) - exact).max() <= 6


def test_images_are_listed_in_natural_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("f10.png", "f2.PNG", "b/f1.jpg", "notes.txt", ".hidden.png"):
        (tmp_path / name).write_bytes(b"")
    names = [p.relative_to(tmp_path).as_posix() for p in list_images(tmp_path)]
    assert names == ["b/f1.jpg", "f2.PNG", "f10.png"]


def test_grid_lays_images_out_row_by_row(tmp_path: Path) -> None:
    sheet = grid(noise(3 * 4, 4).reshape(3, 4, 4, 3), columns=2, gap=1, scale=2)
    assert sheet.shape == (19, 19, 3)
    assert np.array_equal(sheet[10:18:2, 1:9:2], noise(3 * 4, 4).reshape(3, 4, 4, 3)[2])
    assert (sheet[10:, 10:] == 255).all()
    save_image(tmp_path / "sheet.png", sheet)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "sheet.png")), sheet)


@pytest.mark.parametrize("preprocess", ["squash", "crop"])
def test_a_part_of_an_image_is_what_its_cut_out_would_be(preprocess) -> None:
    image = Image.fromarray(noise(60, 100))
    part = fit(image, size=32, preprocess=preprocess, box=(0.25, 0.5, 0.5, 0.4))
    alone = image.crop((25, 30, 75, 54))
    assert np.array_equal(part, fit(alone, size=32, preprocess=preprocess))
    flipped = fit(image, size=32, preprocess=preprocess, box=(0.25, 0.5, 0.5, 0.4), flip=True)
    assert np.array_equal(flipped[:, ::-1], part) and flipped.flags.c_contiguous


@pytest.mark.parametrize("box", [(0.999, 0.999, 0.001, 0.001), (0, 0, 1, 1), (1, 1, 0, 0)])
def test_a_part_has_a_pixel_at_least_and_stays_inside(box) -> None:
    image = Image.fromarray(np.full((3, 5, 3), 200, np.uint8))  # outside would be black
    assert (fit(image, size=16, preprocess="squash", box=box) == 200).all()


def test_an_array_is_an_image_already() -> None:
    pixels = noise(20, 30)
    assert np.array_equal(np.asarray(open_image(pixels, size=8)), pixels)
    for wrong in (pixels[..., :2], pixels[..., 0], pixels / 255, pixels[:0]):
        with pytest.raises(BadImage, match="unsupported mode"):
            open_image(wrong, size=8)


def test_an_image_keeps_its_shape_but_a_large_jpeg_is_read_smaller() -> None:
    large = noise(512, 1024)
    assert open_image(encode_image(large), size=32).size == (1024, 512)
    small = open_image(encode_image(large, format="JPEG"), size=100)
    assert small.size == (256, 128)  # the smallest of an eighth to all that is at least 100


@pytest.mark.parametrize("format", ["EPS", "PDF", "ICO", "TGA", "SGI", "PCX", "IM"])
def test_formats_beside_the_listed_ones_are_refused(format: str) -> None:
    """Pillow hands EPS to Ghostscript, which runs what is written in it."""
    with pytest.raises(BadImage, match="not an image"):
        read_image(encoded(Image.fromarray(noise(32, 32)), format), size=32)


def test_many_threads_decode_and_leave_warnings_as_they_were() -> None:
    data = encode_image(noise(64, 64), format="JPEG")
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: read_image(data, size=16), range(200)))
    assert all(np.array_equal(image, made[0]) for image in made)
    assert list(warnings.filters) == before


def test_natural_order_takes_every_name() -> None:
    assert sorted(["a10", "a9", "a²1", "", "a٣"], key=natural_key) == ["", "a٣", "a9", "a10", "a²1"]
