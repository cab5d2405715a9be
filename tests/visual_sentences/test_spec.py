"""A spec that is wrong says where, what was seen and what was wanted."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tokenizer.cli import InputError
from visual_sentences.spec import KINDS, load_spec, parse_spec

Write = Callable[[str], Path]

GOOD = """
[[source]]
name = "photos"
kind = "image"
path = "photos"
"""


@pytest.fixture(autouse=True)
def folders(tmp_path: Path) -> None:
    for name in ("photos", "frames", "depth"):
        (tmp_path / name).mkdir()


def test_a_whole_spec_is_read(write_spec: Write, tmp_path: Path) -> None:
    spec = load_spec(
        write_spec(
            """
            seed = 7
            row_len = 512
            image_size = 64
            [[source]]
            name = "depth"
            kind = "pair"
            inputs = "frames"
            targets = "depth"
            repeat = "sqrt"
            splits = {val = 0.1, test = 0.2}
            preprocess = "crop"
            license = "MIT"
            note = "rendered"
            [[source]]
            name = "clips"
            kind = "video"
            path = "frames"
            weight = 0.25
            stride = [1, 4]
            """
        )
    )
    assert (spec.seed, spec.row_len, spec.image_size) == (7, 512, 64)
    pair, video = spec.sources
    assert pair.paths == {"inputs": "frames", "targets": "depth"}
    assert {role: origin.path for role, origin in pair.origins.items()} == {
        "inputs": tmp_path / "frames",
        "targets": tmp_path / "depth",
    }
    assert (pair.repeat, pair.weight, pair.preprocess) == ("sqrt", None, "crop")
    assert pair.splits == {"val": 0.1, "test": 0.2}
    assert (pair.license, pair.note) == ("MIT", "rendered")
    assert (video.weight, video.repeat, video.stride) == (0.25, None, (1, 4))


def test_folders_are_relative_to_the_spec(
    write_spec: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_spec(GOOD)
    monkeypatch.chdir("/")
    assert load_spec(path).sources[0].origins["path"].path == tmp_path / "photos"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("weigth = 0.5", 'unknown key "weigth"; did you mean "weight"'),
        ("zzz = 1", 'unknown key "zzz"; wanted one of name, kind'),
        ("stride = [1]", 'the key "stride" does not belong to kind "image"'),
        ("weight = 0.5\nrepeat = 2", "both weight"),
        ("weight = -1", "weight = -1; wanted a number above 0"),
        ("weight = true", "weight = True; wanted a number above 0"),
        ('repeat = "cbrt"', 'wanted a number above 0, or "sqrt"'),
        ("splits = 0.1", "wanted a table of shares"),
        ("splits = {val = 1.5}", "wanted a table of shares"),
        ("splits = {val = 0.5, test = 0.5}", "sum below 1"),
        ("splits = {train = 0.5}", '"train" is what the others leave'),
        ('preprocess = "sqash"', 'wanted one of squash, crop; did you mean "squash"'),
        ("license = 3", "license = 3; wanted a text in quotes"),
        ("augment = 0", "augment = 0; wanted an integer of 1 or more"),
        ("classes = 2", 'the key "classes" does not belong to kind "image"'),
    ],
)
def test_a_wrong_line_is_named(write_spec: Write, line: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_spec(write_spec(GOOD + line))
    assert message in str(caught.value)
    assert 'source "photos"' in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed = 1", "has no source"),
        ("sead = 1" + GOOD, 'unknown key "sead"; did you mean "seed"'),
        ('seed = "one"' + GOOD, "seed = 'one'; wanted an integer of 0 or more"),
        ("row_len = 0" + GOOD, "row_len = 0; wanted an integer of 1 or more"),
        ("row_len = 1.5" + GOOD, "row_len = 1.5; wanted an integer"),
        ("row_len = " + GOOD, "is not valid TOML"),
        (GOOD + GOOD, 'two sources are called "photos"'),
        (GOOD.replace('"photos"\nkind', '"a/b"\nkind'), 'name "a/b" becomes part of file names'),
        (GOOD.replace("name", "nmae"), 'the key "name" is missing; did you mean it by "nmae"'),
        (GOOD.replace('path = "photos"', ""), 'the key "path" is missing'),
        (GOOD.replace('path = "photos"', 'path = "gone"'), 'path = "gone" is not there'),
        (
            GOOD.replace('path = "photos"', 'path = "mix.toml"'),
            "is another kind of file; wanted a folder",
        ),
        (GOOD.replace("image", "imgae"), 'did you mean "image"'),
        (GOOD.replace("image", "annotated"), 'the key "annotations" is missing'),
        (GOOD + "weight = 1.0" + GOOD.replace('"photos"\nk', '"b"\nk'), "leaves nothing"),
        ("source = 3", "has no source"),
    ],
)
def test_a_wrong_spec_is_refused(write_spec: Write, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_spec(write_spec(text))
    assert message in str(caught.value)


def test_strides_are_positive_integers(write_spec: Write) -> None:
    text = '[[source]]\nname = "v"\nkind = "video"\npath = "frames"\nstride = '
    for stride in ("2", "[]", "[0]", "[1.5]"):
        with pytest.raises(InputError, match="stride = "):
            load_spec(write_spec(text + stride))


def test_a_missing_spec_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no spec file"):
        load_spec(tmp_path / "gone.toml")


def test_rows_default_to_16_images(write_spec: Write) -> None:
    spec = load_spec(write_spec(GOOD))
    assert spec.geometry(codes_per_image=256, image_size=256, tokenizer="t") == (4096, 16)
    assert spec.geometry(codes_per_image=64, image_size=32, tokenizer="t") == (1024, 16)


def test_a_tokenizer_that_does_not_fit_is_refused(write_spec: Write) -> None:
    wrong_size = load_spec(write_spec("image_size = 128" + GOOD))
    with pytest.raises(InputError, match="image_size = 128, but the tokenizer in t reads 256 px"):
        wrong_size.geometry(codes_per_image=256, image_size=256, tokenizer="t")
    uneven = load_spec(write_spec("row_len = 1000" + GOOD))
    with pytest.raises(InputError, match="wanted a multiple, such as 768 or 1024"):
        uneven.geometry(codes_per_image=256, image_size=256, tokenizer="t")


def test_pairs_need_rows_of_two_images(write_spec: Write) -> None:
    text = '[[source]]\nname = "p"\nkind = "pair"\ninputs = "frames"\ntargets = "depth"\n'
    spec = load_spec(write_spec("row_len = 256\n" + text))
    with pytest.raises(InputError, match="wanted 512 or more"):
        spec.geometry(codes_per_image=256, image_size=256, tokenizer="t")


def test_annotations_are_roles_beside_the_image(write_spec: Write, tmp_path: Path) -> None:
    text = '[[source]]\nname = "a"\nkind = "annotated"\npath = "frames"\nannotations = '
    source = load_spec(write_spec(text + '{depth = "depth", seg = "photos"}')).sources[0]
    assert list(source.origins) == ["image", "depth", "seg"]
    assert source.origins["seg"].path == tmp_path / "photos"
    for wrong in ('"depth"', "{}", '{image = "depth"}', "{depth = 3}", '{"a/b" = "depth"}'):
        with pytest.raises(InputError, match="annotations = "):
            load_spec(write_spec(text + wrong))


def test_every_kind_says_how_many_images_its_rows_need(write_spec: Write) -> None:
    def refuse(text: str, images: int) -> None:
        spec = load_spec(
            write_spec(f"row_len = {64 * (images - 1)}\n[[source]]\nname = 'x'\n{text}")
        )
        with pytest.raises(InputError, match=f"needs rows of {images} images or more"):
            spec.geometry(codes_per_image=64, image_size=32, tokenizer="t")

    refuse('kind = "category"\npath = "photos"\nclasses = 4', 4)
    refuse('kind = "colorize"\npath = "photos"', 2)
    annotations = 'path = "photos"\nannotations = {depth = "depth", seg = "frames"}'
    refuse(f'kind = "annotated"\n{annotations}', 3)
    refuse(f'kind = "annotated_video"\n{annotations}', 6)


def test_all_missing_paths_are_named_at_once(write_spec: Write) -> None:
    with pytest.raises(InputError) as caught:
        load_spec(write_spec(GOOD.replace('"photos"', '"x"') + GOOD.replace('"photos"', '"y"')))
    assert 'path = "x"' in str(caught.value) and 'path = "y"' in str(caught.value)


def test_the_mixture_of_lvm_is_72_sources_with_the_published_shares() -> None:
    spec = parse_spec(Path(__file__).parents[2] / "examples/uvd_v1.toml")
    weights = {source.name: source.weight for source in spec.sources}
    assert len(weights) == 72
    # Each of the 72 figures is rounded to 4 digits; the sum to 1, as the facts about it are.
    assert round(sum(weight or 0 for weight in weights.values()), 1) == 429.6
    assert spec.geometry(codes_per_image=256, image_size=256, tokenizer="t") == (4096, 16)
    assert {source.kind for source in spec.sources} == set(KINDS), "a kind has no example"
