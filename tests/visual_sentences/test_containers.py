"""What a spec's path names, what is in it, and what is read from it."""

import importlib.util
import io
import os
import random
import sys
import tarfile
import tracemalloc
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tokenizer.cli import InputError
from tokenizer.images import BadImage, encode_image, read_image
from visual_sentences.containers import (
    Contents,
    Origin,
    contents,
    frame_count,
    frame_name,
    parts,
    read,
    recognise,
)
from visual_sentences.containers.headers import members

spec = importlib.util.spec_from_file_location("corpus", Path(__file__).with_name("corpus.py"))
assert spec is not None and spec.loader is not None
corpus = importlib.util.module_from_spec(spec)
spec.loader.exec_module(corpus)

JPEG = corpus.encoded("JPEG")


def origin(folder: Path, written: str) -> Origin:
    return recognise(written, base=folder, where="mix.toml", role="path")


def listing(folder: Path, written: str, *, clips: bool = False) -> Contents:
    (part,) = parts(origin(folder, written))
    return contents(part, clips=clips)


def names(found: Contents) -> list[str]:
    return [entry.name for entry in found.entries]


def touch(folder: Path, *files: str) -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


# What a path of the spec names


@pytest.mark.parametrize(
    ("written", "kind", "path", "pattern", "field"),
    [
        ("photos", "folder", "photos", "", ""),
        ("photos/", "folder", "photos", "", ""),
        ("../here/photos", "folder", "../here/photos", "", ""),
        ("list.txt", "list", "list.txt", "", ""),
        ("list.tsv", "list", "list.tsv", "", ""),
        ("tars/*.tar", "tar", "tars", "*.tar", ""),
        ("tars/*.tar#seg.png", "tar", "tars", "*.tar", "seg.png"),
        ("tars/rgb-1.tar", "tar", "tars", "rgb-1.tar", ""),
        ("*/rgb-?.tar", "tar", ".", "*/rgb-?.tar", ""),
        ("data/a.parquet#depth", "parquet", "data", "a.parquet", "depth"),
        ("data/*.parquet", "parquet", "data", "*.parquet", ""),
        ("odd[1]#2.tar", "tar", ".", "odd[[]1]#2.tar", ""),
        ("a folder.tar", "folder", "a folder.tar", "", ""),
    ],
)
def test_a_path_is_recognised(
    tmp_path: Path, written: str, kind: str, path: str, pattern: str, field: str
) -> None:
    here = tmp_path / "here"
    touch(here, "photos/1.png", "list.txt", "list.tsv", "tars/rgb-1.tar", "tars/rgb-2.tar")
    touch(here, "data/a.parquet", "odd[1]#2.tar", "a folder.tar/1.png")
    found = origin(here, written)
    assert (found.kind, found.pattern, found.field) == (kind, pattern, field)
    assert found.path == here / path
    assert parts(found)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("nothing", "not there"),
        ("nothing.txt", "not there"),
        ("tars/*.parquet", "no file matches"),
        ("tars/0.tar", "not there"),
        ("tars/{0..9}.tar", "write \\* where the numbers are"),
        ("data.tar.gz", "unpack it"),
        ("data.tgz", "unpack it"),
        ("image.png", "another kind of file; wanted a folder, a list"),
        ("~nobody_of_this_name/photos", "write the whole path"),
        ("*", "not there"),
    ],
)
def test_what_is_not_there_or_cannot_be_read_is_said(
    tmp_path: Path, written: str, said: str
) -> None:
    touch(tmp_path, "tars/1.tar", "data.tar.gz", "image.png")
    with pytest.raises(InputError, match=said) as caught:
        origin(tmp_path, written)
    assert str(caught.value).startswith(f'mix.toml: path = "{written}"')


def test_a_home_folder_and_an_absolute_path_are_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "photos/1.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    wanted = tmp_path / "photos"
    for written in ("~/photos", str(wanted)):
        assert origin(Path("/nowhere"), written).path == wanted


def test_the_id_is_what_the_wildcards_stand_for_and_the_order_is_natural(tmp_path: Path) -> None:
    for number in (10, 9, 1):
        for shard in "ab":
            touch(tmp_path, f"{shard}/rgb-{number}.tar", f"{shard}/depth-{number}.tar")
    touch(tmp_path, "a/rgb-11.tar/no.file")
    for role in ("rgb", "depth"):
        found = parts(origin(tmp_path, f"*/{role}-*.tar"))
        assert [part.id for part in found] == ["a/1", "a/9", "a/10", "b/1", "b/9", "b/10"]
        assert found[2].name == f"a/{role}-10.tar"
    assert [p.id for p in parts(origin(tmp_path, "a/rgb-[0-8].tar"))] == ["1"]
    assert [p.id for p in parts(origin(tmp_path, "**/depth-9.tar"))] == ["a", "b"]
    # Two files without wildcards are of one role each and belong together.
    assert [p.id for p in parts(origin(tmp_path, "a/rgb-1.tar"))] == [""]


def test_parts_may_be_links_as_in_the_cache_of_hugging_face(tmp_path: Path) -> None:
    touch(tmp_path, "blobs/0a1b", "snapshot/data/none")
    (tmp_path / "snapshot/data/train-0.parquet").symlink_to("../../blobs/0a1b")
    assert len(parts(origin(tmp_path, "snapshot/data/*.parquet"))) == 1


# Folders and lists


def test_a_folder_is_listed_with_stems_and_classes_in_natural_order(tmp_path: Path) -> None:
    touch(tmp_path, "cat/10.jpg", "cat/9.JPG", "cat/in/1.png", "top.v2.webp", "dog/w.mp4")
    touch(tmp_path, "notes.txt", ".hidden.png", "no suffix", ".jpg")
    found = listing(tmp_path, ".")
    assert [(e.name, e.stem, e.group) for e in found.entries] == [
        ("cat/9.JPG", "cat/9", "cat"),
        ("cat/10.jpg", "cat/10", "cat"),
        ("cat/in/1.png", "cat/in/1", "cat/in"),
        ("top.v2.webp", "top.v2", ""),
    ]
    assert found.bad == ()
    assert "dog/w.mp4" in names(listing(tmp_path, ".", clips=True))


def test_a_list_keeps_its_order_and_its_classes(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.png", "a/1.png", "3.png", "walk.mp4")
    (tmp_path / "l.txt").write_text("\ufeffb/2.png\tzebra\n\na//1.png\n./3.png\t\nwalk.mp4\n")
    found = listing(tmp_path, "l.txt", clips=True)
    assert [(e.name, e.stem, e.group) for e in found.entries] == [
        ("b/2.png", "b/2", "zebra"),
        ("a/1.png", "a/1", "a"),
        ("3.png", "3", ""),
        ("walk.mp4", "walk", ""),
    ]
    (part,) = parts(origin(tmp_path, "l.txt"))
    assert dict(read(part, ["a/1.png"])) == {"a/1.png": tmp_path / "a/1.png"}


# Tars

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.parametrize("format", FORMATS)
def test_headers_are_read_as_tarfile_reads_them(tmp_path: Path, format: str) -> None:
    rng = random.Random(0)
    stored = ["plain.jpg", "./dotted.jpg", "folder/" * 13 + "x.jpg", "café/ü.png", "0.jpg"]
    if format != "ustar":  # which has no names of more than 255 bytes
        stored += ["long/" * 60 + "1.jpg", "名" * 120 + ".png"]
    with tarfile.open(tmp_path / "a.tar", "w", format=FORMATS[format]) as tar:
        for name in stored:
            info = tarfile.TarInfo(name)
            info.size = rng.randrange(2000)
            info.mtime = 0.25 if format == "pax" else 0  # a header of its own, about time
            tar.addfile(info, io.BytesIO(rng.randbytes(info.size)))
            for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
                other = tarfile.TarInfo(f"{name}.{kind!r}")
                other.type, other.linkname = kind, "target/" * 30
                if format != "ustar":
                    tar.addfile(other)
    with tarfile.open(tmp_path / "a.tar") as tar, open(tmp_path / "a.tar", "rb", 0) as file:
        wanted = [
            (m.name.removeprefix("./"), m.offset_data, m.size, m.islnk() or m.issym())
            for m in tar
            if not m.isdir()
        ]
        found = [(m.name, m.start, m.size, m.fault == "link") for m in members(file)]
    assert found == wanted and len(found) >= 5


def test_a_size_beyond_octal_digits_is_read(tmp_path: Path) -> None:
    """GNU and pax write 8 GiB and more in their own ways; the file here is a hole."""
    for name, format in FORMATS.items():
        if name == "ustar":
            continue
        info = tarfile.TarInfo("huge.jpg")
        info.size = 9 << 30
        header = info.tobuf(format)
        path = tmp_path / f"{name}.tar"
        path.write_bytes(header)
        os.truncate(path, len(header) + info.size + 1024)
        with open(path, "rb", 0) as file:
            (member,) = members(file)
        assert (member.start, member.size) == (len(header), info.size)
        ((_, raw),) = read(parts(origin(tmp_path, path.name))[0], [f"{path.name}/huge.jpg"])
        assert isinstance(raw, BadImage) and raw.reason == "too large"


def samples_tar(path: Path, count: int = 6) -> dict[str, bytes]:
    """Write samples with a picture, depth, a class and a text; return what was written."""
    written = {}
    for number in range(count):
        for field in ("jpg", "depth.png", "cls", "txt"):
            content = str(number % 3).encode() if field == "cls" else f"{number} {field}".encode()
            written[f"train/{number:04d}.{field}"] = content
    corpus.write_tar(path, list(written.items()))
    return written


def test_samples_are_grouped_as_webdataset_groups_them(tmp_path: Path) -> None:
    import webdataset

    samples_tar(tmp_path / "a.tar")
    theirs = webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    (part,) = parts(origin(tmp_path, "a.tar"))
    (depth,) = parts(origin(tmp_path, "a.tar#depth.png"))
    ours, ours_depth = contents(part, clips=False), contents(depth, clips=False)
    pictures = [raw for _, raw in read(part, names(ours))]
    depths = [raw for _, raw in read(depth, names(ours_depth))]
    assert [
        (e.stem, e.group, picture, other)
        for e, picture, other in zip(ours.entries, pictures, depths, strict=True)
    ] == [(s["__key__"], s["cls"].decode(), s["jpg"], s["depth.png"]) for s in theirs]
    assert [e.stem for e in ours.entries] == [e.stem for e in ours_depth.entries]


def test_a_tars_names_stems_and_classes(tmp_path: Path) -> None:
    samples_tar(tmp_path / "rgb-17.tar", 2)
    (part,) = parts(origin(tmp_path, "rgb-*.tar"))
    found = contents(part, clips=False)
    assert [(e.name, e.stem, e.group) for e in found.entries] == [
        ("rgb-17.tar/train/0000.jpg", "17/train/0000", "0"),
        ("rgb-17.tar/train/0001.jpg", "17/train/0001", "1"),
    ]
    corpus.write_tar(tmp_path / "b.tar", [("./cat/1.JPG", JPEG), ("dog/1.x.jpg", JPEG)])
    found = listing(tmp_path, "b.tar")
    assert [(e.stem, e.group) for e in found.entries] == [("cat/1", "cat")]
    assert found.bad == (("b.tar/dog/1", "missing field"),)
    assert names(listing(tmp_path, "b.tar#png;x.jpg")) == ["b.tar/dog/1.x.jpg"]


def test_a_samples_numbered_images_are_frames(tmp_path: Path) -> None:
    stored = [f"walk.{i:04d}.jpg" for i in range(3)] + ["run.mp4", "run.depth.jpg"]
    corpus.write_tar(tmp_path / "a.tar", [(name, JPEG) for name in stored])
    found = listing(tmp_path, "a.tar", clips=True)
    assert names(found) == [f"a.tar/{name}" for name in stored[:4]]
    assert [e.stem for e in found.entries] == ["walk", "walk", "walk", "run"]


def test_files_are_read_from_a_tar_in_any_order(tmp_path: Path) -> None:
    written = samples_tar(tmp_path / "a.tar", 30)
    (part,) = parts(origin(tmp_path, "a.tar"))
    wanted = [f"a.tar/{name}" for name in written]
    random.Random(0).shuffle(wanted)
    assert [(name, written[name.removeprefix("a.tar/")]) for name in wanted] == list(
        read(part, wanted)
    )
    ((_, missing),) = read(part, ["a.tar/none.jpg"])
    assert isinstance(missing, BadImage) and missing.reason == "missing file"


def test_a_tar_that_is_gone_or_written_anew_is_noticed(tmp_path: Path) -> None:
    corpus.write_tar(tmp_path / "a.tar", [("1.jpg", b"old")])
    (part,) = parts(origin(tmp_path, "a.tar"))
    assert dict(read(part, ["a.tar/1.jpg"])) == {"a.tar/1.jpg": b"old"}
    corpus.write_tar(tmp_path / "a.tar", [("0.jpg", bytes(3000)), ("1.jpg", b"new")])
    assert dict(read(part, ["a.tar/1.jpg"])) == {"a.tar/1.jpg": b"new"}
    (tmp_path / "a.tar").unlink()
    ((_, gone),) = read(part, ["a.tar/1.jpg"])
    assert isinstance(gone, BadImage)
    assert contents(part, clips=False).bad == (("a.tar", "missing file"),)


def test_damaged_headers_never_hang_or_raise_anything_else(tmp_path: Path) -> None:
    samples_tar(tmp_path / "a.tar", 4)
    whole, rng = (tmp_path / "a.tar").read_bytes(), np.random.default_rng(0)
    (part,) = parts(origin(tmp_path, "a.tar"))
    damaged = 0
    for _ in range(200):
        data = bytearray(whole)
        header = 512 * int(rng.integers(0, 32))
        for place in rng.integers(0, 512, size=2):
            data[header + place] = rng.integers(0, 256)
        (tmp_path / "a.tar").write_bytes(bytes(data[: rng.integers(600, len(data))]))
        found = contents(part, clips=False)
        damaged += any(name == "a.tar" for name, _ in found.bad)
        assert len(list(read(part, names(found)))) == len(found.entries)
    assert damaged > 100  # most of them, for each one is cut as well


def test_a_large_tar_is_read_in_little_memory(tmp_path: Path) -> None:
    image = np.random.default_rng(0).bytes(200_000)
    corpus.write_tar(tmp_path / "a.tar", [(f"{i}.jpg", image) for i in range(200)])
    (part,) = parts(origin(tmp_path, "a.tar"))
    tracemalloc.start()
    found = contents(part, clips=False)
    total = sum(len(raw) for _, raw in read(part, names(found)) if isinstance(raw, bytes))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == 40_000_000
    assert peak < 1_000_000  # two images, the names and the block that is read ahead


# Parquet


def images_table(count: int, *, size: int = 0) -> pa.Table:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": bytes([i % 256]) * (size or i + 1), "path": f"{i}.jpg"} for i in range(count)]
    return pa.table({"image": pa.array(rows, kind), "label": [i % 3 for i in range(count)]})


def test_parquet_of_hugging_face_is_read_with_the_names_of_its_classes(tmp_path: Path) -> None:
    import datasets

    pixels = [np.full((8, 8, 3), 20 * i, np.uint8) for i in range(5)]
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"])
    )
    data = {"image": [Image.fromarray(p) for p in pixels], "label": [i % 2 for i in range(5)]}
    path = tmp_path / "train-00000-of-00001.parquet"
    datasets.Dataset.from_dict(data, features=features).to_parquet(str(path))
    (part,) = parts(origin(tmp_path, "train-*.parquet"))
    found = contents(part, clips=False)
    first = found.entries[0]
    assert (first.name, first.stem) == (f"{path.name}/000000", "00000-of-00001/000000")
    assert [e.group for e in found.entries] == ["cat", "dog", "cat", "dog", "cat"]
    for wanted, (_, raw) in zip(pixels, read(part, names(found)), strict=True):
        assert not isinstance(raw, BadImage)
        assert np.array_equal(read_image(raw, size=8), wanted)


@pytest.mark.parametrize("group_size", [1, 7, 100])
def test_rows_are_read_in_any_order_whatever_the_row_groups(
    tmp_path: Path, group_size: int
) -> None:
    pq.write_table(images_table(50), tmp_path / "a.parquet", row_group_size=group_size)
    (part,) = parts(origin(tmp_path, "a.parquet"))
    order = [*random.Random(0).sample(range(50), 50), 3, 3, 4]
    found = list(read(part, [f"a.parquet/{row:06d}" for row in order]))
    assert found == [(f"a.parquet/{row:06d}", bytes([row]) * (row + 1)) for row in order]
    ((_, beyond),) = read(part, ["a.parquet/000050"])
    assert isinstance(beyond, BadImage) and beyond.reason == "missing file"


def test_a_column_of_plain_bytes_is_found_or_named(tmp_path: Path) -> None:
    table = pa.table(
        {
            "class": ["day", None],
            "depth": pa.array([b"d0", b"d1"], pa.large_binary()),
            "rgb": pa.array([b"r0", b"r1"], pa.binary()),
        }
    )
    pq.write_table(table, tmp_path / "two.parquet")
    pq.write_table(table.drop_columns("rgb"), tmp_path / "one.parquet")
    (part,) = parts(origin(tmp_path, "two.parquet#depth"))
    assert [raw for _, raw in read(part, names(contents(part, clips=False)))] == [b"d0", b"d1"]
    assert [e.group for e in contents(part, clips=False).entries] == ["day", ""]
    assert len(listing(tmp_path, "one.parquet").entries) == 2
    bad = [("two.parquet", "no image column")], [("two.parquet", "no such column")]
    assert list(listing(tmp_path, "two.parquet").bad) == bad[0]  # two, and neither is called image
    assert list(listing(tmp_path, "two.parquet#sky").bad) == bad[1]


def test_a_damaged_row_group_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = images_table(30, size=500)
    pq.write_table(table, path, row_group_size=10, use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    with open(path, "r+b") as file:
        file.seek(column.data_page_offset)
        file.write(b"\xff" * 40)
    (part,) = parts(origin(tmp_path, "a.parquet"))
    found = [raw for _, raw in read(part, names(contents(part, clips=False)))]
    assert [isinstance(raw, BadImage) for raw in found] == [False] * 10 + [True] * 10 + [False] * 10
    assert {raw.reason for raw in found if isinstance(raw, BadImage)} == {"unreadable Parquet file"}


def test_no_more_than_a_row_group_is_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(images_table(400, size=50_000), path, row_group_size=20, compression="none")
    (part,) = parts(origin(tmp_path, "a.parquet"))
    before, peak = pa.total_allocated_bytes(), 0
    for _ in read(part, names(contents(part, clips=False))):
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert 50_000 <= peak < 4 * 20 * 50_000  # of 20 MB: the page, its values, the batch


# Video

CODECS = {
    "b.mp4": {},
    "open.mp4": {"x264-params": "open-gop=1"},
    "hevc.mp4": {"codec": "libx265", "x265-params": "log-level=error"},
    "b.mkv": {},
    "part4.avi": {"codec": "mpeg4"},
    "b.avi": {},
    "part4.mov": {"codec": "mpeg4"},
    "vp9.webm": {"codec": "libvpx-vp9"},
}


@pytest.mark.parametrize("name", CODECS)
def test_a_frames_number_is_exact_however_it_is_reached(tmp_path: Path, name: str) -> None:
    corpus.write_clip(tmp_path / name, 100, **CODECS[name])
    (part,) = parts(origin(tmp_path, "."))
    assert frame_count(part, name) == 100
    scattered = random.Random(0).sample(range(100), 8)
    for order in (range(100), [3, 40, 41, 43, 90, 99], scattered, [99], [5, 5, 4]):
        wanted = [frame_name(name, number) for number in order]
        found = list(read(part, wanted))
        assert [called for called, _ in found] == wanted
        assert [corpus.number_of(raw) for _, raw in found] == list(order)
    assert found[0][1].dtype == np.uint8 and found[0][1].shape == (64, 64, 3)


def test_frames_far_apart_are_sought_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it costs is counted in bytes read, the file being much larger than a buffer."""
    from visual_sentences.containers import clips

    noise = np.random.default_rng(0)
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=25, options={"qscale": "2", "flags": "qscale"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 256, 256, "yuv420p", 10
        for _ in range(100):
            pixels = noise.integers(0, 256, (256, 256, 3), dtype=np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    decoded = 0
    original = clips._Decoder._place

    def counted(self: object, time: int | None) -> int:
        nonlocal decoded
        decoded += 1
        return original(self, time)

    monkeypatch.setattr(clips._Decoder, "_place", counted)
    (part,) = parts(origin(tmp_path, "."))
    found = list(read(part, ["a.mp4#000000", "a.mp4#000055", "a.mp4#000095"]))
    assert all(isinstance(raw, np.ndarray) for _, raw in found)
    assert decoded <= 1 + 10 + 10


def test_a_clip_in_a_tar_is_read_where_it_is(tmp_path: Path) -> None:
    data = corpus.write_clip(tmp_path / "walk.mp4", 30).read_bytes()
    corpus.write_tar(tmp_path / "a.tar", [("0.jpg", JPEG), ("walk.mp4", data), ("1.jpg", JPEG)])
    (part,) = parts(origin(tmp_path, "a.tar"))
    assert names(contents(part, clips=True)) == ["a.tar/0.jpg", "a.tar/walk.mp4", "a.tar/1.jpg"]
    assert frame_count(part, "a.tar/walk.mp4") == 30
    wanted = ["a.tar/0.jpg", "a.tar/walk.mp4#000007", "a.tar/walk.mp4#000029", "a.tar/1.jpg"]
    found = list(read(part, wanted))
    assert [name for name, _ in found] == wanted
    assert found[0][1] == found[3][1] == JPEG
    assert [corpus.number_of(raw) for _, raw in found[1:3]] == [7, 29]


def test_a_clip_held_upright_is_read_upright(tmp_path: Path) -> None:
    lying = np.zeros((32, 64, 3), np.uint8)
    lying[:, :32] = 255  # the left half is white
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.set_display_rotation(-90)  # as a telephone writes it: turn clockwise to show
        file.mux(stream.encode(av.VideoFrame.from_ndarray(lying, format="rgb24")))
        file.mux(stream.encode())
    (part,) = parts(origin(tmp_path, "."))
    ((_, shown),) = read(part, ["a.mp4#000000"])
    assert shown.shape == (64, 32, 3)
    assert shown[:28].min() > 200 and shown[36:].max() < 60  # turned clockwise, left is up


def test_a_frame_beyond_the_end_is_missing(tmp_path: Path) -> None:
    corpus.write_clip(tmp_path / "a.mp4", 5)
    (part,) = parts(origin(tmp_path, "."))
    found = dict(read(part, ["a.mp4#000004", "a.mp4#000005", "b.mp4#000000"]))
    assert corpus.number_of(found["a.mp4#000004"]) == 4
    assert found["a.mp4#000005"].reason == "missing frame"
    assert found["b.mp4#000000"].reason == "missing file"


def test_damage_in_a_clip_spoils_frames_up_to_the_next_key_frame(tmp_path: Path) -> None:
    data = bytearray(corpus.write_clip(tmp_path / "a.mp4", 60, keys=10).read_bytes())
    start = data.index(b"mdat") + 4
    third = (data.index(b"moov") - start) // 3
    data[start + third : start + third + 40] = b"\xff" * 40
    (tmp_path / "a.mp4").write_bytes(data)
    (part,) = parts(origin(tmp_path, "."))
    assert frame_count(part, "a.mp4") == 60
    found = [raw for _, raw in read(part, [frame_name("a.mp4", i) for i in range(60)])]
    good = {i: corpus.number_of(raw) for i, raw in enumerate(found) if isinstance(raw, np.ndarray)}
    assert all(shown == i for i, shown in good.items())
    assert 45 <= len(good) < 60 and set(range(20, 60)) <= set(good)
    assert {raw.reason for raw in found if isinstance(raw, BadImage)} == {"unreadable"}


def test_video_without_pyav_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    (part,) = parts(origin(tmp_path, "."))
    assert names(contents(part, clips=True)) == ["a.mp4"]
    with pytest.raises(InputError, match="pip install"):
        frame_count(part, "a.mp4")


def test_a_png_of_every_container_is_the_same_pixels(tmp_path: Path) -> None:
    data = encode_image(corpus.NOISE)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "1.png").write_bytes(data)
    (tmp_path / "l.txt").write_text("files/1.png\n")
    corpus.write_tar(tmp_path / "a.tar", [("1.png", data)])
    pq.write_table(pa.table({"image": [data]}), tmp_path / "a.parquet")
    for written in ("files", "l.txt", "a.tar", "a.parquet"):
        (part,) = parts(origin(tmp_path, written))
        ((_, raw),) = read(part, names(contents(part, clips=False)))
        assert not isinstance(raw, BadImage)
        assert np.array_equal(read_image(raw, size=32), corpus.NOISE)
