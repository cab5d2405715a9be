"""Sequences from folders, files of video and GIFs, and what is written read back."""

import sys

import numpy as np
import pytest
from PIL import Image

from lvm.prompting.frames import (
    is_clip,
    last_frames,
    numbers,
    read_picture,
    require_video,
    write_frames,
)
from tokenizer.cli import InputError
from tokenizer.images import BadImage, save_image

SIDE = 96  # pixels, so that nothing is enlarged


@pytest.fixture
def images() -> np.ndarray:
    """Seven frames of 96 pixels, each of its own flat colour, which codecs keep."""
    levels = np.arange(7, dtype=np.uint8) * 30 + 20
    frames = np.empty((7, SIDE, SIDE, 3), np.uint8)
    frames[..., 0] = levels[:, None, None]
    frames[..., 1] = levels[::-1, None, None]
    frames[..., 2] = 128
    return frames


def take(path, *, count=3, stride=2) -> np.ndarray:
    return last_frames(path, count=count, stride=stride, size=SIDE, preprocess="squash")


def near(a: np.ndarray, b: np.ndarray) -> bool:
    """Within 4 levels of 255: what YUV in 8 bits and a codec leave of flat colours."""
    return a.shape == b.shape and np.abs(a.astype(int) - b).max() <= 4


def test_numbers_end_with_the_last_frame():
    assert numbers(10, count=3, stride=2) == [5, 7, 9]
    assert numbers(3, count=9, stride=2) == [0, 2]
    assert numbers(3, count=1, stride=5) == [2]


@pytest.mark.parametrize("name", ["walk.gif", "walk.mp4"])
def test_what_is_written_is_read_back(tmp_path, images, name):
    write_frames(tmp_path / name, images, fps=5)
    assert near(take(tmp_path / name), images[[2, 4, 6]])
    assert near(take(tmp_path / name, count=99, stride=1), images)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_gif_keeps_its_time_and_repeats(tmp_path, images):
    write_frames(tmp_path / "walk.gif", images, fps=5)
    with Image.open(tmp_path / "walk.gif") as gif:
        assert (gif.info["duration"], gif.info["loop"], gif.n_frames) == (200, 0, 7)


def test_a_video_keeps_its_time(tmp_path, images):
    import av

    write_frames(tmp_path / "walk.mp4", images, fps=12.5)
    with av.open(str(tmp_path / "walk.mp4")) as file:
        assert file.streams.video[0].average_rate == 12.5


def test_small_and_odd_frames_are_enlarged_and_padded(tmp_path, images):
    small = images[:, :19, :21]
    for name in ("walk.gif", "walk.mp4"):
        write_frames(tmp_path / name, small, fps=4)
    with Image.open(tmp_path / "walk.gif") as gif:
        assert gif.size == (5 * 21, 5 * 19)
    import av

    with av.open(str(tmp_path / "walk.mp4")) as file:
        stream = file.streams.video[0]
        assert (stream.width, stream.height) == (106, 96)


def test_a_folder_is_read_in_natural_order(tmp_path, images):
    for number, image in zip((2, 10, 1), images, strict=False):
        save_image(tmp_path / f"f{number}.png", image)
    assert np.array_equal(take(tmp_path, count=9, stride=1), images[[2, 0, 1]])


def test_what_is_a_clip(tmp_path):
    assert is_clip(tmp_path)
    assert is_clip(tmp_path / "a.GIF") and is_clip(tmp_path / "a.webm")
    assert not is_clip(tmp_path / "a.png") and not is_clip(tmp_path / "nowhere")


def test_clips_that_are_none_are_refused_by_what_is_wrong(tmp_path, images):
    write_frames(tmp_path / "one.gif", images[:1], fps=4)
    write_frames(tmp_path / "one.mp4", images[:1], fps=4)
    write_frames(tmp_path / "cut.mp4", images, fps=4)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "cut.mp4").read_bytes()[:700])
    (tmp_path / "text.gif").write_text("no image")
    (tmp_path / "empty").mkdir()
    for name, words in {
        "one.gif": "one.gif cannot be used as a sequence: it has one frame, which is no sequence",
        "one.mp4": "it has one frame",
        "cut.mp4": "not a video|truncated",
        "text.gif": "not an image",
        "gone.gif": "missing file",
        "gone.mp4": "missing file",
        "empty": "it has no frame",
    }.items():
        with pytest.raises(InputError, match=words):
            take(tmp_path / name)


def test_a_large_jpeg_is_read_and_a_large_png_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr("lvm.prompting.frames.MOST_PIXELS", 1000)
    image = np.zeros((40, 40, 3), np.uint8)
    save_image(tmp_path / "a.jpg", image)
    save_image(tmp_path / "a.png", image)
    assert read_picture(tmp_path / "a.jpg", size=8, preprocess="squash").shape == (8, 8, 3)
    with pytest.raises(BadImage, match="too large"):
        read_picture(tmp_path / "a.png", size=8, preprocess="squash")


def test_video_without_pyav_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"pip install \"large-vision-models\[video\]\""):
        require_video(tmp_path / "a.mp4")
