"""What a path of the spec names, and the files it is made of."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A folder, a list of files, or several tars or Parquet files.

    path     the folder; the list; of tars and Parquet files the folder that the pattern starts from
    pattern  of tars and Parquet files: what their names below `path` match
    field    of a tar's samples the extension, of Parquet the column; "" for the usual one
    """

    kind: Literal["folder", "list", "tar", "parquet"]
    path: Path
    pattern: str = ""
    field: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What is read by itself: a whole folder or list (name ""), one tar, one Parquet file.

    `id` is what is equal in the parts of several roles that belong together: what the wildcards of
    the pattern stand for ("rgb-0017.tar" of "rgb-*.tar": 0017).
    """

    origin: Origin
    name: str = ""
    id: str = ""
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """An image, or a file of video, in a part.

    name   unique in its origin, "/" between parts: "3/17.jpg", "0017.tar/0001.jpg"
    stem   what equals in all modalities of one sample: "3/17", "0017/0001"
    group  its class: a tar's .cls, a Parquet label, otherwise the folder it is in ("" at the top)
    """

    name: str
    stem: str
    group: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The entries of a part in storage order, and (name, reason) of what cannot be used."""

    entries: tuple[Entry, ...]
    bad: tuple[tuple[str, str], ...]
