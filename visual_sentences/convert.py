"""Sentences of LVM and DeLVM to shards, and back (`exchange` says how they are stored).

    python -m visual_sentences.convert dataset.jsonl --out shards
    python -m visual_sentences.convert tokens/train --val tokens/val --out shards --tokenizer vqvae
    python -m visual_sentences.convert shards --to delvm --out tokens

A file becomes a source of kind "imported", whose images are named by file, line and place. What
goes out is SPLIT/SOURCE.jsonl, or SPLIT/vision/SOURCE/train.bin for DeLVM, and comes back equal:
the same sentences, in the same order where all are of one length. Shorter ones share rows.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tokenizer.cli import InputError, Progress, run
from tokenizer.files import sync_folder, temporary_name
from visual_sentences.exchange import DelvmWriter, JsonlWriter
from visual_sentences.importer import Geometry, describe, find_files, import_files
from visual_sentences.manifest import FILE as MANIFEST
from visual_sentences.manifest import Manifest, SourceEntry
from visual_sentences.shards import open_shard

CODEBOOK, CODES, SIZE, IMAGES = 8192, 256, 256, 16  # of both their tokenizer, and of LVM's rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Convert:
    """Turn LVM's .jsonl or DeLVM's .bin and .meta into shards, or shards into either.

    A sentence that cannot be used is counted by its reason, listed in unusable.tsv, and does not
    stop the work. The result is whole or absent.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """A .jsonl or .bin file, a folder with such files at any depth, or a folder of shards."""
    out: Path
    """Folder to write: new or empty."""
    to: Literal["shards", "jsonl", "delvm"] = "shards"
    """Format to write."""
    val: Path | None = None
    """More files, as SRC, whose sentences become the split "val"; those of SRC are "train"."""
    tokenizer: Path | None = None
    """Folder of the tokenizer that made the codes. It decides the next three, and the shards get
    its id, by which another one is refused; without it nothing watches that."""
    codebook_size: int | None = None
    """Codes are below this; 8192 without a tokenizer."""
    codes_per_image: int | None = None
    """Codes of an image; 256 without a tokenizer."""
    image_size: int | None = None
    """Side of the images in pixels; 256 without a tokenizer."""
    row_len: int | None = None
    """Codes of a row, by default those of 16 images (4096); DeLVM trained on 2048."""
    long: Literal["refuse", "cut"] = "refuse"
    """What becomes of a sentence that is longer than a row; cut: several, between images."""
    shard_rows: int = 16384
    """Most rows of a shard; 16384 of 4096 codes are 128 MiB."""


def main(command: Convert) -> None:
    convert(command, log=print)


def convert(command: Convert, *, log: Callable[[str], None]) -> None:
    """Do what `command` says."""
    source, out = command.source, command.out
    shards = (source / MANIFEST).is_file()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} already holds something; name a new or empty folder")
    if command.to == "shards":
        if shards:
            raise InputError(f"{source} is a folder of shards; wanted --to jsonl or --to delvm")
        lines = _import(command)
    else:
        if not shards:
            raise InputError(
                f"{source} has no {MANIFEST}, so it is no folder of finished shards, which --to "
                f"{command.to} reads; to make shards of it leave out --to"
            )
        with _whole(out) as draft:
            lines = export_shards(source, draft, to=command.to)
    log("\n".join([*lines, f"{out} is finished"]))


def _import(command: Convert) -> list[str]:
    geometry = _geometry(command)
    splits = {"train": find_files(command.source)}
    if command.val is not None:
        splits["val"] = find_files(command.val)
    cut = command.long == "cut"
    with _whole(command.out) as draft:
        tallies = import_files(splits, draft, geometry, shard_rows=command.shard_rows, cut=cut)
    lines = describe(tallies)
    if any(tally.bad["longer than a row"] for tally in tallies.values()):
        lines.append("for those that are longer than a row: a larger --row-len, or --long cut")
    return lines


def export_shards(folder: Path, out: Path, *, to: Literal["jsonl", "delvm"]) -> list[str]:
    """Write the sentences of each source and split to its own file; returns a line on each."""
    manifest = Manifest.load(folder)
    if manifest.form != "codes":
        raise InputError(f"{folder} holds {manifest.form}, wanted codes, which both formats store")
    lines = []
    total = sum(entry.rows for entry in manifest.shards)
    with Progress("export", total=total, unit="rows") as progress:
        for split in manifest.splits:
            for source in manifest.sources:
                if not manifest.shards_of(source.name, split):
                    continue
                if to == "jsonl":
                    path = out / split / f"{source.name}.jsonl"
                else:
                    path = out / split / "vision" / source.name / "train.bin"
                path.parent.mkdir(parents=True, exist_ok=True)
                count = _export(folder, manifest, source, split, path, progress)
                lines.append(f"{path.relative_to(out)}: {count} sentences")
    return lines


def _export(
    folder: Path,
    manifest: Manifest,
    source: SourceEntry,
    split: str,
    path: Path,
    progress: Progress,
) -> int:
    count = 0
    writer = JsonlWriter(path) if path.suffix == ".jsonl" else DelvmWriter(path)
    with writer:
        for entry in manifest.shards_of(source.name, split):
            shard = open_shard(folder / entry.name)
            for row in range(shard.rows):
                edges = [*shard.starts(row).tolist(), int(shard.length[row])]
                for start, end in pairwise(edges):
                    writer.write(shard.tokens[row, start:end])
                count += len(edges) - 1
            progress.update(shard.rows)
    return count


def _geometry(command: Convert) -> Geometry:
    """Take what the codes mean from the tokenizer, or from the options and LVM's values."""
    given = (command.codebook_size, command.codes_per_image, command.image_size)
    if command.tokenizer is None:
        usual = (CODEBOOK, CODES, SIZE)
        codebook, codes, size = (
            default if value is None else value for value, default in zip(given, usual, strict=True)
        )
        name = ""
    else:
        if any(value is not None for value in given):
            raise InputError(
                "--tokenizer decides the codebook size, the codes of an image and the image size; "
                "leave out those options"
            )
        import tokenizer

        tok = tokenizer.load(command.tokenizer)
        codebook, codes, size = tok.codebook_size, tok.codes_per_image, tok.image_size
        name = tok.id
    row_len = IMAGES * codes if command.row_len is None else command.row_len
    if min(codebook, codes, size, row_len, command.shard_rows) < 1:
        raise InputError("codes, sizes, --row-len and --shard-rows are 1 or more")
    if row_len % codes:
        raise InputError(
            f"--row-len {row_len} does not hold whole images of {codes} codes; wanted a multiple, "
            f"such as {max(1, row_len // codes) * codes}"
        )
    return Geometry(
        tokenizer=name,
        codebook_size=codebook,
        codes_per_image=codes,
        image_size=size,
        row_len=row_len,
    )


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Give a folder to write into, which becomes `out` when the block ends well."""
    draft = temporary_name(out.absolute())
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"--out {out} cannot be made: {error}") from error
    try:
        yield draft
        os.replace(draft, out)
        sync_folder(out.absolute().parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


if __name__ == "__main__":
    run(Convert, main, prog="python -m visual_sentences.convert")
