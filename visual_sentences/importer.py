"""Files of LVM and DeLVM to shards: every sentence is used, or counted by what is wrong with it.

    files → lines → sentences of whole images, each checked → rows, first fit → shards → manifest

One pass, in which memory is that of one shard.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from tokenizer.cli import CommandError, InputError, Progress
from visual_sentences.exchange import BadLine, Line, read_delvm, read_jsonl
from visual_sentences.manifest import Manifest, ShardEntry, SourceEntry
from visual_sentences.sentence import Picture, Sentence, fill_rows
from visual_sentences.shards import code_type, write_shard

KIND = "imported"
UNKNOWN = "unknown"  # how the images were resized, and by what they were encoded
UNUSABLE = "unusable.tsv"
READERS: Mapping[str, Callable[[Path], Iterator[Line]]] = {".jsonl": read_jsonl, ".bin": read_delvm}


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What the codes mean; `tokenizer` is its id, "" where nobody knows it."""

    tokenizer: str
    codebook_size: int
    codes_per_image: int
    image_size: int
    row_len: int

    @property
    def images_per_row(self) -> int:
        return self.row_len // self.codes_per_image

    def fault(self, codes: np.ndarray, *, cut: bool) -> str | None:
        """Return why `codes` is no sentence for such rows, or None."""
        if not codes.size:
            return "no codes"
        if codes.size % self.codes_per_image:
            return "not whole images"
        if codes.min() < 0 or codes.max() >= self.codebook_size:
            return "code out of range"
        if codes.size > self.row_len and not cut:
            return "longer than a row"
        return None


@dataclass(slots=True)
class Tally:
    """Lines of one source by fate, and the files they are from."""

    good: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    files: list[str] = field(default_factory=list)


def find_files(path: Path) -> dict[str, Path]:
    """Return the files of one format at or below `path` by the name of the source they become."""
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in READERS and p.is_file())
    else:
        found = [path] if path.suffix in READERS and path.is_file() else []
    suffixes = sorted({file.suffix for file in found})
    if len(suffixes) != 1:
        seen = f"{' and '.join(suffixes)} files" if suffixes else "neither"
        raise InputError(
            f"{path} is or has {seen}; wanted LVM's .jsonl or DeLVM's .bin, files of one kind"
        )
    names: dict[str, Path] = {}
    for file in found:
        name = _source_name(file, path)
        if name in names:
            raise InputError(
                f'{names[name]} and {file} would both become the source "{name}"; rename one'
            )
        names[name] = file
    return names


def _source_name(file: Path, below: Path) -> str:
    """Name a source by its path, without the "vision" and "train" that are in all of DeLVM's."""
    whole = Path(file.parent.name, file.stem) if file.stem == "train" else Path(file.stem)
    inside = whole if file == below else file.relative_to(below).with_suffix("")
    parts = [part for part in inside.parts if part not in ("vision", "train")]
    words = [re.sub(r"[^A-Za-z0-9_.]+", "_", part).strip("_.") for part in parts]
    return "-".join(filter(None, words)) or KIND


def import_files(
    splits: Mapping[str, Mapping[str, Path]],
    out: Path,
    geometry: Geometry,
    *,
    shard_rows: int,
    cut: bool,
) -> dict[str, Tally]:
    """Write the files of each split as shards and manifest into `out`; what became of each source.

    `cut` makes several sentences of one that is longer than a row. Raises CommandError if there is
    nothing that can be used.
    """
    tallies: dict[str, Tally] = {}
    shards: list[ShardEntry] = []
    total = sum(file.stat().st_size for files in splits.values() for file in files.values())
    with (
        Progress("import", total=total, unit="bytes") as progress,
        open(out / UNUSABLE, "w", encoding="utf-8") as unusable,
    ):
        for split, files in splits.items():
            for source, file in files.items():
                tally = tallies.setdefault(source, Tally())
                tally.files.append(file.name)
                lines = _counted(file, source, tally, unusable, progress, geometry, cut)
                sentences = (piece for line in lines for piece in _pieces(file, line, geometry))
                notes = {"source": source, "split": split}
                shards += _write_shards(out, sentences, notes, geometry, rows=shard_rows)
    if not shards:
        raise CommandError("\n  ".join(["there is no sentence to import:", *describe(tallies)]))
    Manifest(
        tokenizer=geometry.tokenizer,
        codebook_size=geometry.codebook_size,
        codes_per_image=geometry.codes_per_image,
        image_size=geometry.image_size,
        row_len=geometry.row_len,
        seed=0,
        sources=tuple(
            SourceEntry(
                name=name,
                kind=KIND,
                weight=None,
                repeat=None,
                preprocess=UNKNOWN,
                license="",
                note=f"imported from {', '.join(tally.files)}; its counts are of sentences",
                inputs=tally.good + tally.bad.total(),
                good=tally.good,
                bad=dict(sorted(tally.bad.items())),
            )
            for name, tally in tallies.items()
        ),
        shards=tuple(shards),
    ).save(out)
    return tallies


def describe(tallies: Mapping[str, Tally]) -> list[str]:
    """Return a line on each source."""
    return [
        f"{name}: {tally.good} sentences imported"
        + "".join(f", {count} not: {reason}" for reason, count in tally.bad.most_common())
        for name, tally in tallies.items()
    ]


def _counted(
    file: Path,
    source: str,
    tally: Tally,
    unusable: IO[str],
    progress: Progress,
    geometry: Geometry,
    cut: bool,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield number and codes of each line that can be used; count and list the others."""
    for line in READERS[file.suffix](file):
        progress.update(line.bytes, bad=tally.bad.total())
        codes = line.codes
        reason = codes.reason if isinstance(codes, BadLine) else geometry.fault(codes, cut=cut)
        if isinstance(codes, BadLine) or reason:
            tally.bad[str(reason)] += 1
            unusable.write(f"{source}\t{reason}\t{file.name}/{line.number}\n")
        else:
            tally.good += 1
            yield line.number, codes


def _pieces(
    file: Path, line: tuple[int, np.ndarray], geometry: Geometry
) -> Iterator[tuple[Sentence, np.ndarray]]:
    """Yield a sentence, or the pieces of one that is longer than a row: pictures and codes."""
    number, codes = line
    for first in range(0, len(codes), geometry.row_len):
        piece = codes[first : first + geometry.row_len]
        places = range(
            first // geometry.codes_per_image, (first + len(piece)) // geometry.codes_per_image
        )
        pictures = tuple(Picture(f"{file.name}/{number}/{place}") for place in places)
        yield Sentence(pictures), piece


def _write_shards(
    out: Path,
    sentences: Iterable[tuple[Sentence, np.ndarray]],
    notes: Mapping[str, str],
    geometry: Geometry,
    *,
    rows: int,
) -> list[ShardEntry]:
    """Write sentences in shards of `rows` rows as soon as there are enough for one."""
    narrow = code_type(geometry.codebook_size)
    codes: dict[Picture, np.ndarray] = {}  # by the first picture of a sentence
    waiting: list[Sentence] = []
    images = 0
    entries: list[ShardEntry] = []
    for sentence, wide in sentences:
        codes[sentence.pictures[0]] = wide.astype(narrow)
        waiting.append(sentence)
        images += len(sentence.pictures)
        if images >= rows * geometry.images_per_row:  # certainly `rows` rows
            filled = fill_rows(waiting, images_per_row=geometry.images_per_row)
            entries.append(
                _write_shard(out, filled[:rows], codes, notes, geometry, number=len(entries))
            )
            waiting = [sentence for row in filled[rows:] for sentence in row]
            images = sum(len(sentence.pictures) for sentence in waiting)
    filled = fill_rows(waiting, images_per_row=geometry.images_per_row)
    for first in range(0, len(filled), rows):
        some = filled[first : first + rows]
        entries.append(_write_shard(out, some, codes, notes, geometry, number=len(entries)))
    return entries


def _write_shard(
    out: Path,
    rows: list[list[Sentence]],
    codes: dict[Picture, np.ndarray],
    notes: Mapping[str, str],
    geometry: Geometry,
    *,
    number: int,
) -> ShardEntry:
    """Write `rows` and forget their codes."""
    tokens = np.zeros((len(rows), geometry.row_len), code_type(geometry.codebook_size))
    docs, length = [], np.zeros(len(rows), np.int32)
    for i, row in enumerate(rows):
        found = [codes.pop(sentence.pictures[0]) for sentence in row]
        ends = np.cumsum([len(sentence) for sentence in found])
        tokens[i, : ends[-1]] = np.concatenate(found)
        docs.append([0, *ends[:-1].tolist()])
        length[i] = ends[-1]
    name = f"{notes['source']}-{notes['split']}-{number:05d}.arrow"
    keys = [[p.key for sentence in row for p in sentence.pictures] for row in rows]
    written = write_shard(
        out / name,
        tokens=tokens,
        docs=docs,
        length=length,
        keys=keys,
        metadata={
            "source": notes["source"],
            "kind": KIND,
            "split": notes["split"],
            "tokenizer": geometry.tokenizer,
            "encoder": UNKNOWN,
            "codebook_size": geometry.codebook_size,
            "codes_per_image": geometry.codes_per_image,
            "image_size": geometry.image_size,
            "preprocess": UNKNOWN,
        },
    )
    return ShardEntry(
        name=name,
        source=notes["source"],
        split=notes["split"],
        rows=written.rows,
        documents=sum(map(len, docs)),
        images=sum(map(len, keys)),
        bytes=written.bytes,
        sha256=written.sha256,
        offset=written.offset,
    )
