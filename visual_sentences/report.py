"""What a build tells its user: the plan, the files it could not use, the result; and `verify`."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from tokenizer.cli import CommandError, Progress
from tokenizer.files import sha256_file
from visual_sentences.image_shards import open_images
from visual_sentences.manifest import Manifest
from visual_sentences.shards import open_shard

SHOWN, LONGEST = 5, 80  # names for each reason, their letters; unusable.tsv has all of them

Log = Callable[[str], None]


def describe_unusable(entries: Iterable[tuple[str, str, str]], *, log: Log) -> None:
    """Name the files (source, reason, key) that cannot be used, the first few of each reason."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for source, reason, key in entries:
        groups[source, reason].append(key if len(key) <= LONGEST else f"{key[:LONGEST]}…")
    for (source, reason), keys in groups.items():
        more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
        log(f"{source}: {reason}: {', '.join(keys[:SHOWN])}{more}")


def table(manifest: Manifest) -> str:
    """Write one line a source; waste is the part of its rows that holds no code."""
    lines: list[tuple[str, ...]] = [
        ("source", "kind", "files", "good", "bad", "sentences", "images", "rows", "waste")
    ]
    for source in manifest.sources:
        shards = [shard for shard in manifest.shards if shard.source == source.name]
        rows, images = sum(s.rows for s in shards), sum(s.images for s in shards)
        documents = sum(s.documents for s in shards)
        places = rows * manifest.images_per_row if manifest.form == "codes" else images
        waste = f"{1 - images / places:.1%}" if places else "-"
        numbers = (source.inputs, source.good, sum(source.bad.values()), documents, images, rows)
        lines.append((source.name, source.kind, *map(str, numbers), waste))
    reasons = [f"{s.name}: {_reasons(s.bad)}" for s in manifest.sources if s.bad]
    splits = [f"{split} {sum(manifest.rows(split).values())}" for split in manifest.splits]
    rows = sum(s.rows for s in manifest.shards)
    tokens = f", {rows * manifest.row_len:,} tokens" if manifest.form == "codes" else ""
    size = sum(s.bytes for s in manifest.shards) / 2**20
    total = f"{rows} rows ({', '.join(splits)}){tokens}, {size:.1f} MiB"
    return "\n".join([align(lines), *(f"bad in {reason}" for reason in reasons), total])


def verify(folder: Path, manifest: Manifest, *, log: Log) -> None:
    """Read every shard again; raises CommandError that names those which are not as they were."""
    wrong = []
    size = sum(shard.bytes for shard in manifest.shards)
    with Progress("verify", total=size, unit="bytes") as progress:
        for entry in manifest.shards:
            path = folder / entry.name
            if not path.exists() or path.stat().st_size != entry.bytes:
                wrong.append(f"{path}: wrong size")
            elif sha256_file(path) != entry.sha256:
                wrong.append(f"{path}: wrong content (sha256)")
            elif _shape(path, manifest) != (entry.rows, manifest.row_len):
                wrong.append(f"{path}: wrong shape")
            progress.update(entry.bytes)
    if wrong:
        raise CommandError(
            "\n  ".join([f"{len(wrong)} of {len(manifest.shards)} shards are damaged:", *wrong])
            + "\ndelete these files and run the build again, which makes them anew"
        )
    log(f"{len(manifest.shards)} shards are as the manifest says")


def _shape(path: Path, manifest: Manifest) -> tuple[int, int]:
    if manifest.form == "images":
        return open_images(path).rows, manifest.row_len
    rows, row_len = open_shard(path).tokens.shape
    return rows, row_len


def _reasons(bad: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in Counter(bad).most_common())


def align(lines: Sequence[Sequence[str]]) -> str:
    """Write a table as text; numbers stand on the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if cell[:1].isdigit() or cell == "-" else cell.ljust(width)
            for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in lines
    )
