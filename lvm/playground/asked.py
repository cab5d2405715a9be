"""What a page may ask for: a prompt of stored pictures and how to draw, checked value by value."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from lvm.generate import Sampling
from tokenizer.cli import InputError

Kind = Literal["pairs", "frames"]
IMAGE_ID = re.compile(r"[0-9a-f]{64}")
PROMPT_ID = re.compile(r"[0-9a-f]{20}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Range of one setting: what the server takes, and what the page offers as a slider."""

    low: float
    high: float
    step: float
    start: float
    whole: bool = False


LIMITS: dict[str, Limit] = {
    "candidates": Limit(low=1, high=16, step=1, start=4, whole=True),
    "new": Limit(low=1, high=8, step=1, start=1, whole=True),
    "temperature": Limit(low=0, high=2, step=0.05, start=1),
    "top_k": Limit(low=0, high=1024, step=1, start=0, whole=True),
    "top_p": Limit(low=0.05, high=1, step=0.01, start=1),
    "min_p": Limit(low=0, high=0.5, step=0.01, start=0),
    "guidance": Limit(low=0, high=5, step=0.1, start=1),
    "seed": Limit(low=0, high=2**31 - 1, step=1, start=0, whole=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A prompt and its settings; equal ones have equal ids, and with one model equal answers."""

    kind: Kind
    images: tuple[str, ...]  # SHA-256 of stored pictures: x1, y1, …, query, or frames in order
    settings: Mapping[str, float]  # every key of LIMITS

    @classmethod
    def parse(cls, found: object) -> Self:
        """Check what a client sent; raises InputError that names the value and its range."""
        if not isinstance(found, dict):
            raise InputError("the request is no JSON object; wanted kind, images and settings")
        kind, images, settings = (found.get(k) for k in ("kind", "images", "settings"))
        if kind != "pairs" and kind != "frames":
            raise InputError(f'kind {kind!r}: wanted "pairs" or "frames"')
        if not isinstance(images, list) or not all(
            isinstance(image, str) and IMAGE_ID.fullmatch(image) for image in images
        ):
            raise InputError("images: wanted a list of ids, as the upload of each picture gave it")
        if not isinstance(settings, dict):
            raise InputError("settings: wanted an object of numbers")
        asked = cls(kind=kind, images=tuple(images), settings=_numbers(settings))
        asked.check()
        return asked

    def check(self) -> None:
        count = len(self.images)
        if self.kind == "pairs" and (count < 3 or count % 2 == 0):
            raise InputError(
                f"{count} pictures make no analogy; wanted at least one whole pair and the query: "
                "fill every place of the prompt, or ask for the next frames instead"
            )
        if self.kind == "frames" and not count:
            raise InputError("no frames; wanted at least one picture to go on from: add one")
        if self.kind == "pairs" and self.settings["new"] != 1:
            raise InputError("a query has one answer; wanted new = 1, or the next frames instead")

    def sampling(self) -> Sampling:
        """Return the settings for the engine."""
        values: dict[str, Any] = dict(self.settings)
        return Sampling(**values)

    def record(self, model: str) -> bytes:
        """Return what is stored of it, with the fingerprint of the model that was asked."""
        return json.dumps({"version": 1, **asdict(self), "model": model}, sort_keys=True).encode()

    def id(self, model: str) -> str:
        """Return the name of the prompt in links, 20 hex digits."""
        return hashlib.sha256(self.record(model)).hexdigest()[:20]


def _numbers(found: Mapping[str, object]) -> dict[str, float]:
    unknown = sorted(map(str, found.keys() - LIMITS.keys()))
    if unknown:
        raise InputError(f"unknown settings {', '.join(unknown)}; there are {', '.join(LIMITS)}")
    numbers = {}
    for key, limit in LIMITS.items():
        value: Any = found.get(key, limit.start)
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if (
            not good
            or not limit.low <= value <= limit.high
            or (limit.whole and value != int(value))
        ):
            kind = "a whole number" if limit.whole else "a number"
            raise InputError(
                f"{key} {value!r}: wanted {kind} from {limit.low:g} to {limit.high:.10g}"
            )
        numbers[key] = int(value) if limit.whole else float(value)
    return numbers
