"""What a build will do, and what the folder it writes to is being built from.

A plan is a list of units. It depends on the spec, the tokenizer's geometry and the names of the
files alone, so that a second run makes the same one and goes on where the first was stopped.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizer.cli import InputError
from visual_sentences.manifest import FILE as MANIFEST
from visual_sentences.sentence import Sample
from visual_sentences.sources import Listing, list_source, split_of
from visual_sentences.spec import Source, Spec
from visual_sentences.unit import Job, Unit

FILE = "build.json"
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    spec: Spec
    job: Job
    row_len: int
    listings: Sequence[Listing]  # one a source
    units: Sequence[Unit]

    @property
    def inputs(self) -> dict[str, Any]:
        """Files of each source, as the identity of a build has them."""
        return {
            source.name: {"files": listing.inputs, "names": listing.digest()}
            for source, listing in zip(self.spec.sources, self.listings, strict=True)
        }


def make_plan(spec: Spec, job: Job, *, row_len: int, shard_rows: int) -> Plan:
    """List all sources and cut each split into units that fill about `shard_rows` rows."""
    listings = [list_source(source, seed=spec.seed) for source in spec.sources]
    units = [
        unit
        for source, listing in zip(spec.sources, listings, strict=True)
        for unit in _units(source, listing, rows=shard_rows, images_per_row=job.images_per_row)
    ]
    return Plan(spec=spec, job=job, row_len=row_len, listings=listings, units=units)


def _units(source: Source, listing: Listing, *, rows: int, images_per_row: int) -> Iterator[Unit]:
    each = {  # items that fill `rows` rows where all of them are good
        "image": rows * images_per_row,
        "pair": rows * (images_per_row // 2),
        "video": max(1, rows // len(source.stride)),
    }[source.kind]
    splits: dict[str, list[Sample]] = {"train": [], **{name: [] for name in source.splits}}
    for item in listing.items:
        splits[split_of(item.stem, source.splits)].append(item)
    for split, items in splits.items():
        for number, first in enumerate(range(0, len(items), each)):
            yield Unit(source=source, split=split, number=number, items=items[first : first + each])


def identity(spec: Spec, job: Job, *, row_len: int, shard_rows: int) -> dict[str, Any]:
    """Return all that the bytes of a build depend on, but for the files' names and contents."""
    sources = {entry["name"]: dict(entry) for entry in spec.raw["source"]}
    return {
        "version": VERSION,
        "seed": spec.seed,
        "row_len": row_len,
        "image_size": job.image_size,
        "source": sources,
        "tokenizer": job.tokenizer_id,
        "device": job.device,
        "precision": job.precision,
        "batch": job.batch,
        "shard_rows": shard_rows,
    }


def refuse_another(out: Path, wanted: Mapping[str, Any]) -> None:
    """Raise InputError with the differences if `out` holds a build of something else."""
    try:
        found = json.loads((out / FILE).read_text(encoding="utf-8"))
        found.setdefault("precision", "exact")  # the only one, before there was a choice
    except FileNotFoundError:
        if (out / MANIFEST).exists():
            raise InputError(
                f"{out} has a {MANIFEST} but no {FILE}, so it cannot be told what it was built "
                "from; choose another --out"
            ) from None
        return
    except ValueError as error:
        raise InputError(f"{out / FILE} is not valid JSON ({error}); delete {out}") from error
    old, new = _flat(found), _flat(wanted)
    if "inputs" not in wanted:
        old = {key: value for key, value in old.items() if not key.startswith("inputs.")}
    changed = [
        f"  {key}: there {_show(old.get(key))}, now {_show(new.get(key))}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]
    if changed:
        raise InputError(
            f"{out} is being built from something else:\n" + "\n".join(changed) + "\n"
            "go back to what is there, or choose another --out"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def _show(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:  # a checksum
        return value[:12] + "…"
    return "nothing" if value is None else repr(value)
