"""What the bytes of a build depend on, so that no folder ever holds parts of two builds."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizer.cli import InputError
from tokenizer.files import atomic_write
from visual_sentences.job import Job
from visual_sentences.manifest import FILE as MANIFEST
from visual_sentences.spec import MANIFEST_KEYS, Spec

FILE = "build.json"
VERSION = 2  # 1: the plan was made anew in each run


def identity(spec: Spec, job: Job, *, row_len: int, shard_rows: int) -> dict[str, Any]:
    """Return all that the bytes of a build depend on, but for the files themselves."""
    return {
        "version": VERSION,
        "form": job.form,
        "seed": spec.seed,
        "row_len": row_len,
        "image_size": job.image_size,
        "source": {
            entry["name"]: {k: v for k, v in entry.items() if k not in MANIFEST_KEYS}
            for entry in spec.raw["source"]
        },
        "tokenizer": job.tokenizer_id,
        "device": job.device,
        "precision": job.precision,
        "batch": job.batch,
        "shard_rows": shard_rows,
    }


def refuse_another(out: Path, wanted: Mapping[str, Any]) -> None:
    """Raise InputError with the differences if `out` holds a build of something else.

    A source that is new is no difference: what it holds is added.
    """
    try:
        found = json.loads((out / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (out / MANIFEST).exists():
            raise InputError(
                f"{out} has a {MANIFEST} but no {FILE}, so it cannot be told what it was built "
                "from; choose another --out"
            ) from None
        return
    except ValueError as error:
        raise InputError(f"{out / FILE} is not valid JSON ({error}); delete {out}") from error
    if changed := _differences(found, wanted):
        raise InputError(
            f"{out} is being built from something else:\n" + "\n".join(changed) + "\n"
            "go back to what is there, or choose another --out"
        )


def save_identity(out: Path, wanted: Mapping[str, Any]) -> None:
    """Write what `out` is built from, before its first plan."""
    with atomic_write(out / FILE, "w") as file:
        json.dump(wanted, file, indent=1)


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    known = set(found.get("source", ()))
    sources = {name: entry for name, entry in wanted["source"].items() if name in known}
    old, new = _flat(found), _flat({**wanted, "source": sources})
    return [
        f"  {key}: there {_show(old.get(key))}, now {_show(new.get(key))}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]


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
