"""The manifest: what a folder of shards holds. It is written last, so where it is, all is there."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from tokenizer.cli import InputError
from tokenizer.files import atomic_write
from visual_sentences.vocab import Vocab

FORMAT, VERSION = "visual-sentences", 2
READABLE = (1, 2)
SINCE_1: Mapping[str, Any] = {"form": "codes", "generation": 1}
SOURCE_SINCE_1: Mapping[str, Any] = {"augment": 1, "classes": ()}
FILE = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceEntry:
    """A source: its place in the mixture, its terms of use, and its image files by fate.

    inputs = good + all of bad + (clips) frames that no pass drew; images counts places in rows, so
    an image that two passes use counts twice. A file of video counts once, and is good if a frame
    of it is used; a frame of it that cannot be decoded is in bad besides.
    """

    name: str
    kind: str
    weight: float | None
    repeat: float | str | None
    preprocess: str
    license: str
    note: str
    inputs: int
    good: int
    bad: Mapping[str, int]
    augment: int = 1
    classes: tuple[str, ...] = ()  # of image shards: what the labels 0, 1, … stand for


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """A shard file: one source, kind and split. `offset` is the byte where its tokens start."""

    name: str
    source: str
    split: str
    rows: int
    documents: int
    images: int
    bytes: int
    sha256: str
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    tokenizer: str
    codebook_size: int
    codes_per_image: int
    image_size: int
    row_len: int
    seed: int
    sources: tuple[SourceEntry, ...]
    shards: tuple[ShardEntry, ...]
    form: Literal["codes", "images"] = "codes"
    generation: int = 1  # counts the times that data was added

    @property
    def vocab(self) -> Vocab:
        return Vocab(self.codebook_size, self.codes_per_image)

    @property
    def images_per_row(self) -> int:
        """Return the places of a row; 0 in shards of images, whose rows have any number."""
        return self.row_len // self.codes_per_image if self.codes_per_image else 0

    @property
    def splits(self) -> list[str]:
        """Splits that have a shard, "train" first."""
        return sorted({s.split for s in self.shards}, key=lambda split: (split != "train", split))

    @property
    def hash(self) -> str:
        """Return 64 hex digits that change with anything a training run could notice.

        What version 1 had not counts where it is not as it was then, so that a run on data of that
        version still knows it.
        """
        values = self._values() | {"version": 1}
        for table, since in [(values, SINCE_1), *((s, SOURCE_SINCE_1) for s in values["sources"])]:
            for name, before in since.items():
                if table[name] == before:
                    del table[name]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def shards_of(self, source: str, split: str) -> list[ShardEntry]:
        return [s for s in self.shards if s.source == source and s.split == split]

    def rows(self, split: str) -> dict[str, int]:
        """Return the rows of each source in `split`, in the order of the sources, zeros too."""
        counts = {source.name: 0 for source in self.sources}
        for shard in self.shards:
            if shard.split == split:
                counts[shard.source] += shard.rows
        return counts

    def save(self, folder: Path | str) -> None:
        with atomic_write(Path(folder) / FILE, "w") as file:
            json.dump(self._values(), file, indent=1)
            file.write("\n")

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Read the manifest of `folder`; raises InputError where there is none that we can read."""
        path = Path(folder) / FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(
                f"there is no {FILE} in {folder}: wanted the --out of a finished "
                "`python -m visual_sentences.build`; if one was interrupted, run it again"
            ) from error
        except ValueError as error:
            raise InputError(
                f"{path} is not valid JSON ({error}); delete it and run the build again"
            ) from error
        seen = (values.get("format"), values.get("version")) if isinstance(values, dict) else None
        if seen is None or seen[0] != FORMAT or seen[1] not in READABLE:
            raise InputError(
                f"{path} has format and version {seen}; this program reads {FORMAT!r} of versions "
                f"{READABLE}: build the folder again, or use the version of the program that wrote "
                "it"
            )
        del values["format"], values["version"]
        values["sources"] = tuple(
            SourceEntry(**entry | {"classes": tuple(entry.get("classes", ()))})
            for entry in values["sources"]
        )
        values["shards"] = tuple(ShardEntry(**entry) for entry in values["shards"])
        return cls(**values)

    def _values(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **asdict(self)}
