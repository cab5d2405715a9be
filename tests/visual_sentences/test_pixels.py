"""Pictures to pixels: the same ones whatever else is read, by however many threads."""

from pathlib import Path

import numpy as np
from PIL import Image

from tokenizer.images import read_image
from visual_sentences.containers import parts, recognise
from visual_sentences.pixels import Files, decode
from visual_sentences.sentence import Picture
from visual_sentences.spec import Source

SIZE = 32


def files_of(folder: Path) -> Files:
    origin = recognise(".", base=folder, where="mix.toml", role="path")
    source = Source(name="s", kind="image", paths={"path": "."}, origins={"path": origin})
    return Files(source=source, listed={"path": parts(origin)[0]})


def test_a_whole_image_has_its_pixels_whatever_is_cut_from_it(tmp_path: Path) -> None:
    """JPEGs that are read at a reduced scale, another one for a part than for the whole."""
    rng = np.random.default_rng(0)
    for number in range(3):
        noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
        noise.resize((512, 384)).save(tmp_path / f"{number}.jpg")
    whole = [Picture(f"{number}.jpg") for number in range(3)]
    cut = [Picture(f"{number}.jpg", "crop 0.1 0.2 0.6 0.7 flip") for number in range(3)]
    for threads in (1, 3):
        for wanted in (whole, [*cut, *whole]):
            read = decode(files_of(tmp_path), wanted, size=SIZE, threads=threads)
            found = {entry.picture: entry.value for entry in read}
            assert found.keys() == set(wanted)
            for picture in whole:
                assert np.array_equal(
                    found[picture], read_image(tmp_path / picture.name, size=SIZE)
                )
