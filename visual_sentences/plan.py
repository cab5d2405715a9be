"""What a build does, cut into units, and kept in a file.

    plan-001.arrow   the units of the first run to its end; plan-002.arrow adds what was new later

A unit of a folder or list is some items of one split; a unit of tars or Parquet files is some whole
files, which its worker lists. A plan depends on the spec, the geometry and what the sources hold
alone. Whoever runs a unit, on whichever machine, reads it from the file.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from tokenizer.cli import CommandError
from tokenizer.files import atomic_write
from visual_sentences.cut import Listed, cut_items, cut_parts, identity_of
from visual_sentences.job import Job
from visual_sentences.sentence import Item
from visual_sentences.sources import is_streamed
from visual_sentences.spec import Source, Spec

FORMAT, VERSION = "visual-sentences-plan", 1
SCHEMA = pa.schema(
    [("stem", pa.string()), ("group", pa.string()), ("names", pa.list_(pa.string()))]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Work that one process does at once. `split` is "" where the unit has items of all splits.

    `images` counts the files of its items, of tars and Parquet files about.
    """

    source: Source
    split: str
    number: int
    generation: int
    place: int  # in the plan file
    images: int

    @property
    def name(self) -> str:
        # A source has no "--" in its name, so that no two units share theirs.
        return f"{self.source.name}-{self.split}-{self.number:05d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One generation of a build."""

    generation: int
    units: Sequence[Unit]
    listed: Mapping[str, Listed]
    batches: Sequence[pa.RecordBatch] = ()  # the items of each unit, until they are written


def plan_file(out: Path, generation: int) -> Path:
    return out / f"plan-{generation:03d}.arrow"


def make_plan(spec: Spec, job: Job, *, shard_rows: int, before: Sequence[Plan], out: Path) -> Plan:
    """List all sources and cut what no earlier plan has into units; `out` has these plans.

    The plan has no unit where nothing is new. It is not in its file yet.
    """
    generation = len(before) + 1
    units: list[Unit] = []
    batches: list[pa.RecordBatch] = []
    listed: dict[str, Listed] = {}
    for source in spec.sources:
        earlier = [u for plan in before for u in plan.units if u.source.name == source.name]
        numbers = Counter({unit.split: unit.number + 1 for unit in earlier})
        classes = [c for plan in before[-1:] if (c := plan.listed.get(source.name))]
        cut = cut_parts if is_streamed(source) else cut_items
        some, listed[source.name] = cut(
            source,
            known={identity_of(i, source) for u in earlier for i in planned(out, u)},
            classes=classes[0].classes if classes else (),
            job=job,
            rows=shard_rows,
        )
        for split, items, images in some:
            units.append(
                Unit(
                    source=source,
                    split=split,
                    number=numbers[split],
                    generation=generation,
                    place=len(units),
                    images=images,
                )
            )
            numbers[split] += 1
            batches.append(_batch(items))
    return Plan(generation=generation, units=units, listed=listed, batches=batches)


def load_plans(spec: Spec, out: Path) -> list[Plan]:
    """Read all plans of a build in order; raises CommandError where one cannot be read."""
    plans: list[Plan] = []
    sources = {source.name: source for source in spec.sources}
    while (path := plan_file(out, len(plans) + 1)).exists():
        try:
            notes = json.loads(_reader(path, path.stat().st_mtime_ns).schema.metadata[b"plan"])
            if (seen := (notes["format"], notes["version"])) != (FORMAT, VERSION):
                raise ValueError(f"format and version {seen}, wanted {(FORMAT, VERSION)}")
            units = [Unit(source=sources[u.pop("source")], **u) for u in notes["units"]]
            listed = {
                name: Listed(**entry | {"bad": [tuple(b) for b in entry["bad"]]})
                for name, entry in notes["listed"].items()
            }
        except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
            raise CommandError(
                f"the plan {path} cannot be read ({error!r}); choose another --out, or delete "
                f"{out} to build it anew"
            ) from error
        plans.append(Plan(generation=len(plans) + 1, units=units, listed=listed))
    return plans


def planned(out: Path, unit: Unit) -> list[Item]:
    """Return a unit's items; of tars and Parquet files their sets, one name a role."""
    path = plan_file(out, unit.generation)
    batch = _reader(path, path.stat().st_mtime_ns).get_batch(unit.place)
    columns = [batch.column(name).to_pylist() for name in SCHEMA.names]
    return [Item(stem, tuple(names), group) for stem, group, names in zip(*columns, strict=True)]


@lru_cache(8)
def _reader(path: Path, changed: int) -> Any:
    return pa.ipc.open_file(pa.memory_map(str(path)))


def write_plan(plan: Plan, out: Path) -> None:
    """Write a plan to its file, from which workers read it; where there is one, that one stays."""
    notes = {
        "format": FORMAT,
        "version": VERSION,
        "units": [
            {
                "source": u.source.name,
                "split": u.split,
                "number": u.number,
                "generation": u.generation,
                "place": u.place,
                "images": u.images,
            }
            for u in plan.units
        ],
        "listed": {
            name: {"bad": entry.bad, "classes": entry.classes}
            for name, entry in plan.listed.items()
        },
    }
    schema = SCHEMA.with_metadata({"plan": json.dumps(notes)})
    with (
        suppress(FileExistsError),
        atomic_write(plan_file(out, plan.generation), first=True) as file,
        pa.ipc.new_file(file, schema) as writer,
    ):
        for batch in plan.batches:
            writer.write_batch(batch)


def _batch(items: Sequence[Item]) -> pa.RecordBatch:
    columns = [[i.stem for i in items], [i.group for i in items], [i.names for i in items]]
    arrays = [pa.array(c, field.type) for c, field in zip(columns, SCHEMA, strict=True)]
    return pa.record_batch(arrays, schema=SCHEMA)
