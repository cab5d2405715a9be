"""LVM's and DeLVM's files to shards and back. Their formats are read and written here by other
means than the program's, after the rules of those projects' own readers."""

import base64
import json
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer
from tokenizer.cli import CommandError, InputError
from visual_sentences.convert import Convert, convert
from visual_sentences.exchange import LONGEST, BadLine, read_jsonl
from visual_sentences.loader import Loader
from visual_sentences.manifest import Manifest
from visual_sentences.shards import open_shard

ROOT = Path(__file__).parents[2]
CODES = 4  # an image, out of a codebook of 100
SMALL = {"codebook_size": 100, "codes_per_image": CODES, "image_size": 8, "row_len": 16}

Codes = list[int]


def sentences(*images: int, seed: int = 0) -> list[Codes]:
    """Return random sentences of so many images."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 100, n * CODES).tolist() for n in images]


def jsonl_line(codes: Codes) -> bytes:
    packed = base64.b64encode(struct.pack(f"<{len(codes)}i", *codes)).decode("ascii")
    return b'{"tokens": "' + packed.encode() + b'"}\n'


def write_jsonl(path: Path, found: Sequence[Codes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(map(jsonl_line, found)))
    return path


def read_as_lvm(path: Path) -> list[Codes]:
    """Read as LVM does: each line is an object whose tokens are base64 of int32."""
    found = []
    for line in path.read_text().splitlines():
        raw = base64.b64decode(json.loads(line)["tokens"])
        found.append(list(struct.unpack(f"<{len(raw) // 4}i", raw)))
    return found


def write_delvm(path: Path, found: Sequence[Codes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"tokens": codes}).encode() + b"\n" for codes in found]
    path.write_bytes(b"".join(lines))
    places = [(sum(map(len, lines[:i])), len(codes)) for i, codes in enumerate(found)]
    with open(f"{path}.meta", "wb") as file:
        np.save(file, np.array(places, np.int64).reshape(-1, 2))
    return path


def read_as_delvm(path: Path) -> list[Codes]:
    """Read as InternLM does: seek to each offset of the .meta, read one line; its path has a part
    "vision"."""
    assert "/vision/" in path.as_posix() and path.suffix == ".bin"
    meta = np.load(f"{path}.meta")
    assert meta.dtype == np.int64 and meta.shape[1:] == (2,)
    found = []
    with open(path, "rb") as file:
        for offset, count in meta.tolist():
            file.seek(offset)
            tokens = json.loads(file.readline())["tokens"]
            assert len(tokens) == count
            found.append(tokens)
    return found


def run(source: Path, out: Path, **options) -> list[str]:
    """Convert by the small geometry; returns the log."""
    lines: list[str] = []
    geometry = {} if options.get("to") or options.get("tokenizer") else SMALL
    convert(Convert(source=source, out=out, **geometry | options), log=lines.append)
    return "\n".join(lines).splitlines()


def stored(folder: Path, source: str, split: str = "train") -> list[Codes]:
    """Return the sentences in the shards of a source, in order."""
    found = []
    for entry in Manifest.load(folder).shards_of(source, split):
        shard = open_shard(folder / entry.name)
        for row in range(shard.rows):
            edges = [*shard.starts(row).tolist(), int(shard.length[row])]
            found += [shard.tokens[row, a:b].tolist() for a, b in pairwise(edges)]
            assert not shard.tokens[row, edges[-1] :].any()
            assert len(shard.keys(row)) == edges[-1] // CODES
        assert shard.metadata["source"] == source and shard.metadata["split"] == split
        assert entry.rows == shard.rows and entry.documents == len(shard.docs)
    return found


def test_lvm_to_shards_and_back_is_byte_for_byte(tmp_path: Path) -> None:
    whole = sentences(*[4] * 9)
    lvm = write_jsonl(tmp_path / "depth.jsonl", whole)
    assert run(lvm, tmp_path / "s") == [
        "depth: 9 sentences imported",
        f"{tmp_path / 's'} is finished",
    ]
    assert stored(tmp_path / "s", "depth") == whole
    run(tmp_path / "s", tmp_path / "back", to="jsonl")
    assert read_as_lvm(tmp_path / "back/train/depth.jsonl") == whole
    assert (tmp_path / "back/train/depth.jsonl").read_bytes() == lvm.read_bytes()


def test_delvm_to_shards_and_back_is_byte_for_byte(tmp_path: Path) -> None:
    whole = sentences(*[4] * 9)
    delvm = write_delvm(tmp_path / "tokens/vision/Rain13K/train.bin", whole)
    run(tmp_path / "tokens", tmp_path / "s")
    assert stored(tmp_path / "s", "Rain13K") == whole
    run(tmp_path / "s", tmp_path / "back", to="delvm")
    back = tmp_path / "back/train/vision/Rain13K/train.bin"
    assert read_as_delvm(back) == whole
    for suffix in (".bin", ".bin.meta"):
        assert back.with_suffix(suffix).read_bytes() == delvm.with_suffix(suffix).read_bytes()


def test_from_one_format_to_the_other(tmp_path: Path) -> None:
    whole = sentences(4, 1, 3, 2, 2, 4)
    run(write_jsonl(tmp_path / "a.jsonl", whole), tmp_path / "1")
    run(tmp_path / "1", tmp_path / "2", to="delvm")
    assert sorted(read_as_delvm(tmp_path / "2/train/vision/a/train.bin")) == sorted(whole)
    run(tmp_path / "2/train", tmp_path / "3")
    run(tmp_path / "3", tmp_path / "4", to="jsonl")
    assert sorted(read_as_lvm(tmp_path / "4/train/a.jsonl")) == sorted(whole)


def test_short_sentences_share_rows_and_a_training_reads_them(tmp_path: Path) -> None:
    short = sentences(3, 2, 1, 2)
    run(write_jsonl(tmp_path / "a.jsonl", short), tmp_path / "s")
    shard = open_shard(tmp_path / "s/a-train-00000.arrow")
    assert [shard.starts(row).tolist() for row in range(2)] == [[0, 12], [0, 8]]
    assert shard.keys(0) == [*(f"a.jsonl/1/{n}" for n in range(3)), "a.jsonl/3/0"]
    rows = next(iter(Loader(tmp_path / "s", batch_rows=2, seed=0)))
    assert sorted(rows.tokens.tolist()) == sorted(shard.tokens.tolist())


@settings(max_examples=40, deadline=None)
@given(
    images=st.lists(st.integers(1, 4), min_size=1, max_size=30),
    shard_rows=st.integers(1, 5),
    form=st.sampled_from(["jsonl", "delvm"]),
)
def test_every_sentence_is_there_once_whatever_the_shards(
    images: list[int], shard_rows: int, form: str
) -> None:
    whole = sentences(*images)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if form == "jsonl":
            source = write_jsonl(folder / "a.jsonl", whole)
        else:
            source = write_delvm(folder / "a.bin", whole)
        run(source, folder / "s", shard_rows=shard_rows)
        manifest = Manifest.load(folder / "s")
        assert sorted(stored(folder / "s", "a")) == sorted(whole)
        sizes = [shard.rows for shard in manifest.shards]
        assert all(size == shard_rows for size in sizes[:-1]) and sizes[-1] <= shard_rows
        assert sum(shard.images for shard in manifest.shards) == sum(images)
        assert sum(shard.documents for shard in manifest.shards) == len(images)
        run(folder / "s", folder / "back", to=form)
        if form == "jsonl":
            back = read_as_lvm(folder / "back/train/a.jsonl")
        else:
            back = read_as_delvm(folder / "back/train/vision/a/train.bin")
        assert back == stored(folder / "s", "a")


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


GOOD = list(range(8))
BAD_LVM = {  # a line of the file: the reason it is counted by
    b"{": "not JSON",
    b"\xff\xfe": "not JSON",
    b"[" * 100_000: "not JSON",  # deeper than a parser goes
    b"[1, 2]": "no tokens",
    b'{"text": "a"}': "no tokens",
    b'{"tokens": [1, 2, 3, 4]}': "not base64",
    b'{"tokens": null}': "not base64",
    b'{"tokens": "!!!!"}': "not base64",
    b'{"tokens": "AAAAA"}': "not base64",  # cut short
    json.dumps({"tokens": b64(b"\0" * 15)}).encode(): "not int32",
    b'{"tokens": ""}': "no codes",
    jsonl_line([1] * 7).strip(): "not whole images",
    jsonl_line([1, 2, 3, 100]).strip(): "code out of range",
    jsonl_line([1, 2, 3, -1]).strip(): "code out of range",
    jsonl_line([1] * 20).strip(): "longer than a row",
}
BAD_DELVM = {
    b"{": "not JSON",
    b"": "not JSON",
    b'"tokens"': "no tokens",
    b'{"tokens": "AAAA"}': "not a list of integers",
    b'{"tokens": [1, 2, 3, 4.0]}': "not a list of integers",
    b'{"tokens": [1, 2, 3, null]}': "not a list of integers",
    b'{"tokens": [[1, 2], [3, 4]]}': "not a list of integers",
    b'{"tokens": [[1, 2], [3]]}': "not a list of integers",
    b'{"tokens": [true, false, true, true]}': "not a list of integers",
    b'{"tokens": []}': "no codes",
    b'{"tokens": [1, 2, 3]}': "not whole images",
    b'{"tokens": [1, 2, 3, 8192]}': "code out of range",
    json.dumps({"tokens": [1] * 20}).encode(): "longer than a row",
}


def check_bad(out: Path, name: str, file: str, wanted: list[str], good: int) -> None:
    [source] = Manifest.load(out).sources
    assert source.bad == {reason: wanted.count(reason) for reason in sorted(set(wanted))}
    assert (source.good, source.inputs) == (good, good + len(wanted))
    lines = [line.split("\t") for line in (out / "unusable.tsv").read_text().splitlines()]
    assert [reason for _, reason, _ in lines] == wanted
    assert all(place.startswith(f"{file}/") and n == name for n, _, place in lines)
    assert stored(out, name) == [GOOD] * good


def test_bad_lines_of_lvm_are_counted_and_stop_nothing(tmp_path: Path) -> None:
    lines = [line for bad in BAD_LVM for line in (bad, jsonl_line(GOOD).strip(), b"")]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    log = run(tmp_path / "a.jsonl", tmp_path / "s")
    assert log[0].startswith("a: 15 sentences imported") and "1 not: no codes" in log[0]
    assert "--long cut" in log[1]
    check_bad(tmp_path / "s", "a", "a.jsonl", list(BAD_LVM.values()), len(BAD_LVM))


@pytest.mark.parametrize("meta", [True, False])
def test_bad_lines_of_delvm_are_counted_and_stop_nothing(tmp_path: Path, meta: bool) -> None:
    good = json.dumps({"tokens": GOOD}).encode()
    lines = [line + b"\n" for bad in BAD_DELVM for line in (bad, good)]
    (tmp_path / "a.bin").write_bytes(b"".join(lines))
    wanted = list(BAD_DELVM.values())
    if meta:
        ends = np.cumsum([0, *map(len, lines)])[:-1]
        counts = [line.count(b",") + 1 if b"[" in line else 0 for line in lines]
        counts = [
            0 if line == b'{"tokens": []}\n' else n for line, n in zip(lines, counts, strict=True)
        ]
        with open(tmp_path / "a.bin.meta", "wb") as file:
            np.save(file, np.stack([ends, counts], 1).astype(np.int64))
    else:
        wanted = ["missing .meta", *wanted]
    run(tmp_path / "a.bin", tmp_path / "s")
    check_bad(tmp_path / "s", "a", "a.bin", wanted, len(BAD_DELVM))


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", pickle.dumps([1]), b"text"])
def test_a_meta_that_cannot_be_read_is_counted_and_the_lines_are_used(
    tmp_path: Path, content: bytes
) -> None:
    write_delvm(tmp_path / "a.bin", [GOOD, GOOD])
    (tmp_path / "a.bin.meta").write_bytes(content)
    run(tmp_path / "a.bin", tmp_path / "s")
    check_bad(tmp_path / "s", "a", "a.bin", ["unreadable .meta"], 2)


def test_a_meta_that_runs_no_code_and_says_other_things_than_the_lines(tmp_path: Path) -> None:
    write_delvm(tmp_path / "a.bin", [GOOD, GOOD, GOOD])
    meta = np.load(tmp_path / "a.bin.meta")
    meta[1, 1] += 1
    meta = np.concatenate([meta, [[-1, 8], [meta[2, 0] + 3, 8], [10**9, 8]]])
    with open(tmp_path / "a.bin.meta", "wb") as file:
        np.save(file, meta)
    run(tmp_path / "a.bin", tmp_path / "s")
    wanted = ["not as .meta says", "not as .meta says", "not JSON", "not JSON"]
    check_bad(tmp_path / "s", "a", "a.bin", wanted, 2)
    with open(tmp_path / "a.bin.meta", "wb") as file:  # objects would be unpickled: refused
        np.save(file, np.array([[0, None]], object), allow_pickle=True)
    run(tmp_path / "a.bin", tmp_path / "s2")
    check_bad(tmp_path / "s2", "a", "a.bin", ["unreadable .meta"], 3)


def test_a_file_without_line_breaks_is_read_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.truncate(LONGEST + 10)  # a hole: takes no disk
    found = list(read_jsonl(path))
    assert [line.bytes for line in found] == [LONGEST, 10]
    assert all(isinstance(line.codes, BadLine) for line in found)


def test_long_sentences_can_be_cut_between_images(tmp_path: Path) -> None:
    long = sentences(11, 2)
    write_jsonl(tmp_path / "a.jsonl", long)
    run(tmp_path / "a.jsonl", tmp_path / "s", long="cut")
    cut = [long[0][:16], long[0][16:32], long[0][32:], long[1]]
    assert stored(tmp_path / "s", "a") == cut
    [source] = Manifest.load(tmp_path / "s").sources
    assert (source.good, source.bad) == (2, {})
    run(tmp_path / "a.jsonl", tmp_path / "whole", row_len=44)
    assert stored(tmp_path / "whole", "a") == long


def test_folders_become_sources_and_val_a_split(tmp_path: Path) -> None:
    for name in ("coco seg/a", "coco seg/b", "i1k_depth"):
        write_jsonl(tmp_path / f"train/{name}.jsonl", sentences(4, 4))
    write_jsonl(tmp_path / "val/i1k_depth.jsonl", sentences(4, seed=1))
    run(tmp_path / "train", tmp_path / "s", val=tmp_path / "val")
    manifest = Manifest.load(tmp_path / "s")
    assert manifest.rows("train") == {"coco_seg-a": 2, "coco_seg-b": 2, "i1k_depth": 2}
    assert manifest.rows("val") == {"coco_seg-a": 0, "coco_seg-b": 0, "i1k_depth": 1}
    assert stored(tmp_path / "s", "i1k_depth", "val") == sentences(4, seed=1)
    assert {source.kind for source in manifest.sources} == {"imported"}
    run(tmp_path / "s", tmp_path / "back", to="delvm")
    files = sorted(p.relative_to(tmp_path / "back") for p in (tmp_path / "back").rglob("*.bin"))
    assert list(map(str, files)) == [
        "train/vision/coco_seg-a/train.bin",
        "train/vision/coco_seg-b/train.bin",
        "train/vision/i1k_depth/train.bin",
        "val/vision/i1k_depth/train.bin",
    ]


def test_the_geometry_is_lvms_or_the_tokenizers(tmp_path: Path, tok_dir: Path) -> None:
    rng = np.random.default_rng(0)
    full = write_jsonl(tmp_path / "a.jsonl", [rng.integers(0, 8192, 4096).tolist()])
    convert(Convert(source=full, out=tmp_path / "s"), log=lambda line: None)
    manifest = Manifest.load(tmp_path / "s")
    assert (manifest.codebook_size, manifest.codes_per_image, manifest.image_size) == (
        8192,
        256,
        256,
    )
    assert (manifest.row_len, manifest.tokenizer) == (4096, "")
    tok = tokenizer.load(tok_dir)
    small = write_jsonl(tmp_path / "b.jsonl", [rng.integers(0, 64, 128).tolist()])
    run(small, tmp_path / "t", tokenizer=tok_dir, row_len=256)
    manifest = Manifest.load(tmp_path / "t")
    assert (manifest.tokenizer, manifest.codebook_size, manifest.row_len) == (tok.id, 64, 256)
    assert open_shard(tmp_path / "t/b-train-00000.arrow").metadata["tokenizer"] == tok.id
    wide = write_jsonl(tmp_path / "c.jsonl", [[70_000, 1, 2, 3]])
    run(wide, tmp_path / "w", codebook_size=70_001)
    assert stored(tmp_path / "w", "c") == [[70_000, 1, 2, 3]]


def test_nothing_usable_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_bytes(b"{\n")
    with pytest.raises(CommandError, match=r"no sentence to import:\n.*a: 0 .*1 not: not JSON"):
        run(tmp_path / "in", tmp_path / "s")
    assert os.listdir(tmp_path) == ["in"]


def test_what_cannot_be_converted_is_refused(tmp_path: Path, tok_dir: Path) -> None:
    lvm = write_jsonl(tmp_path / "a.jsonl", sentences(4))
    run(lvm, tmp_path / "s")
    manifest = Manifest.load(tmp_path / "s")
    (tmp_path / "images").mkdir()
    replace(manifest, form="images").save(tmp_path / "images")
    write_jsonl(tmp_path / "mixed/a.jsonl", sentences(4))
    write_jsonl(tmp_path / "same/x y.jsonl", sentences(4))
    write_jsonl(tmp_path / "same/x_y.jsonl", sentences(4))
    write_delvm(tmp_path / "mixed/b.bin", sentences(4))
    (tmp_path / "empty").mkdir()
    new = tmp_path / "new"
    wrong: list[tuple[Path, Path, dict, str]] = [
        (tmp_path / "s", new, {}, "is a folder of shards; wanted --to jsonl or --to delvm"),
        (lvm, new, {"to": "delvm"}, "has no manifest.json.*leave out --to"),
        (lvm, tmp_path / "s", {}, "already holds something"),
        (tmp_path / "empty", new, {}, "has neither; wanted LVM's .jsonl or DeLVM's .bin"),
        (tmp_path / "gone", new, {}, "has neither"),
        (tmp_path / "mixed", new, {}, r"has .bin and .jsonl files"),
        (tmp_path / "same", new, {}, 'both become the source "x_y"'),
        (tmp_path / "images", new, {"to": "jsonl"}, "images.*wanted codes"),
        (lvm, new, {"row_len": 18}, "does not hold whole images of 4 codes.*such as 16"),
        (lvm, new, {"codes_per_image": 0}, "are 1 or more"),
        (lvm, new, {"tokenizer": tok_dir, "codebook_size": 64}, "leave out those options"),
    ]
    for source, out, options, message in wrong:
        with pytest.raises(InputError, match=message):
            run(source, out, **options)
        assert not new.exists()


def test_memory_is_that_of_a_shard(tmp_path: Path) -> None:
    """12 MB of codes, which are 48 MB as they are read, in shards of 0.25 MB."""
    line = jsonl_line(np.random.default_rng(0).integers(0, 8192, 4096).tolist())
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.writelines([line] * 1500)
    command = Convert(source=tmp_path / "a.jsonl", out=tmp_path / "s", shard_rows=32)
    tracemalloc.start()
    convert(command, log=lambda line: None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(Manifest.load(tmp_path / "s").shards) == 47
    # 1 MB was measured: the codes of a shard twice, and the names of its images. Arrow's copy of
    # the shard, as it is written, is not seen here.
    assert peak < 3e6, peak


def test_the_command_line(tmp_path: Path) -> None:
    """Some seconds: real programs."""
    write_jsonl(tmp_path / "a.jsonl", sentences(4, 4))

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "visual_sentences.convert", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    lvm, out = str(tmp_path / "a.jsonl"), str(tmp_path / "s")
    size = ["--codebook-size", "100", "--codes-per-image", "4"]
    done = command(lvm, "--out", out, *size)
    assert (done.returncode, done.stderr) == (0, "")
    assert "a: 2 sentences imported" in done.stdout
    again = command(lvm, "--out", out, *size)
    assert again.returncode == 2 and "already holds something" in again.stderr
