"""From a path as the spec has it to an origin, and from an origin to the files it is made of."""

import glob
import re
from pathlib import Path
from typing import Literal

from tokenizer.cli import InputError
from tokenizer.images import natural_key
from visual_sentences.containers.origin import Origin, Part

LISTS = frozenset({".txt", ".tsv", ".lst"})
FIELD = re.compile(r"(.+\.(?:tar|parquet))#(.+)")
COMPRESSED = re.compile(r".+\.(tgz|tbz2?|txz|tar\.\w+)")
WANTED = (
    "wanted a folder, a list of files (.txt, .tsv, .lst), or .tar or .parquet files, "
    "as in tars/*.tar"
)


def recognise(written: str, *, base: Path, where: str, role: str) -> Origin:
    """Return what `written` names: a folder, a list, or the tars or Parquet files of a pattern.

    Relative paths start at `base`, the folder of the spec. A field stands behind "#". `where` and
    `role` say in the InputError which line of the spec to mend.
    """
    line = f'{where}: {role} = "{written}"'
    text, field = written, ""
    if not _absolute(written, base, line).exists() and (match := FIELD.fullmatch(written)):
        text, field = match.groups()
    path = _absolute(text, base, line)
    there = path.exists()
    if field and not text.endswith((".tar", ".parquet")):
        raise InputError(f"{line} has a field behind #, which only tars and Parquet files take")
    if there and path.is_dir():
        return Origin(kind="folder", path=path)
    if there and path.suffix.lower() in LISTS:
        return Origin(kind="list", path=path)
    if COMPRESSED.fullmatch(path.name.lower()):
        raise InputError(
            f"{line} is compressed, so that no image in it can be found without unpacking all; "
            "unpack it to a .tar (gzip -d, zstd -d)"
        )
    if path.suffix not in (".tar", ".parquet"):
        found = "is another kind of file" if there else f"is not there ({path})"
        raise InputError(f"{line} {found}; {WANTED}")
    kind: Literal["tar", "parquet"] = "tar" if path.suffix == ".tar" else "parquet"
    if there:
        return Origin(kind=kind, path=path.parent, pattern=glob.escape(path.name), field=field)
    if not glob.has_magic(text):
        hint = "; write * where the numbers are" if "{" in text else ""
        raise InputError(f"{line} is not there ({path}){hint}")
    fixed = next(i for i, name in enumerate(path.parts) if glob.has_magic(name))
    origin = Origin(
        kind=kind, path=Path(*path.parts[:fixed]), pattern="/".join(path.parts[fixed:]), field=field
    )
    if not parts(origin):
        raise InputError(f"{line}: no file matches {path}")
    return origin


def parts(origin: Origin) -> list[Part]:
    """Return the folder or list, or the files that the pattern matches now, in natural order.

    The files themselves may be links that lead anywhere: the spec names them, and the cache of
    Hugging Face is made of such links.
    """
    if origin.kind in ("folder", "list"):
        return [Part(origin=origin)]
    names = glob.glob(origin.pattern, root_dir=origin.path, recursive=True)
    wild = _capturing(origin.pattern)
    found = []
    for name in sorted(names, key=natural_key):
        path, match = origin.path / name, wild.fullmatch(name)
        if match is not None and path.is_file():
            stands_for = "/".join(group for group in match.groups() if group)
            found.append(Part(origin=origin, name=name, id=stands_for, bytes=path.stat().st_size))
    return found


def path_of(part: Part) -> Path:
    """Return the folder, the list, or the one file of a part."""
    return part.origin.path / part.name if part.name else part.origin.path


def _absolute(text: str, base: Path, line: str) -> Path:
    try:
        return (base / Path(text).expanduser()).absolute()
    except RuntimeError as error:
        raise InputError(f"{line}: {error}; write the whole path") from error


def _capturing(pattern: str) -> re.Pattern[str]:
    """Translate a glob pattern to one whose groups are what its wildcards stand for."""
    pieces = re.split(r"(\*\*/|\*+|\?|\[[^]]\]|\[!?\]?[^]]*\])", pattern)
    return re.compile("".join(_piece(piece) for piece in pieces))


def _piece(piece: str) -> str:
    if piece == "**/":
        return "(?:(.+)/)?"
    if piece.startswith("*"):
        return "([^/]*)"
    if piece == "?":
        return "([^/])"
    if len(piece) == 3 and piece[0] == "[" and piece[1] in "*?[":  # what glob.escape writes
        return re.escape(piece[1])
    if piece.startswith("["):
        inside = piece[1:-1].replace("\\", "\\\\")
        return f"([{'^' + inside[1:] if inside.startswith('!') else inside}])"
    return re.escape(piece)
