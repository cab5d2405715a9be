"""What the server does for a page: keeps pictures, remembers prompts, starts answers."""

import hashlib
import io
import json
from collections.abc import Generator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from PIL import Image

from lvm.generate import reads_of
from lvm.playground.answers import Answerer
from lvm.playground.asked import LIMITS, Asked
from lvm.playground.examples import Example
from lvm.playground.jobs import Event
from lvm.playground.pictures import MOST_BYTES, clean
from lvm.playground.store import Store
from tokenizer.cli import InputError
from tokenizer.images import Preprocess, encode_image


class Gone(Exception):
    """Something that was stored here once is not any more."""


class Service:
    """Used by several threads at once, none of them the event loop's; `ask` runs no model."""

    def __init__(
        self,
        answerer: Answerer,
        store: Store,
        examples: Sequence[Example],
        *,
        name: str,
        preprocess: Preprocess,
    ) -> None:
        self.answerer, self.store, self.preprocess = answerer, store, preprocess
        reads = reads_of(answerer.model)
        self.room = reads.images_per_row - 1
        # In memory, so that no upload drops them from the store.
        files = [[encode_image(picture) for picture in e.pictures] for e in examples]
        keys = [[hashlib.sha256(file).hexdigest() for file in some] for some in files]
        self.built_in = {
            k: f for ks, fs in zip(keys, files, strict=True) for k, f in zip(ks, fs, strict=True)
        }
        limits = {key: asdict(limit) for key, limit in LIMITS.items()}
        limits["top_k"]["high"] = min(limits["top_k"]["high"], reads.codes)
        self.about = {
            "model": name,
            "parameters": sum(p.numel() for p in answerer.model.parameters()),
            "device": str(answerer.device),
            "size": answerer.size,
            "codes": reads.codes_per_image,
            "room": self.room,
            "preprocess": preprocess,
            "limits": limits,
            "most_bytes": MOST_BYTES,
            "examples": [
                {"name": e.name, "kind": e.kind, "images": k}
                for e, k in zip(examples, keys, strict=True)
            ],
        }

    def add(self, data: bytes, name: str) -> str:
        """Keep a picture file as the model sees it; returns its id. Raises InputError."""
        size = self.answerer.size
        file = clean(data, name=name, size=size, preprocess=self.preprocess)
        return self.store.put(file, suffix=".png")

    def picture(self, key: str) -> bytes | None:
        return self.built_in.get(key) or self.store.get(key, suffix=".png")

    def ask(self, found: object) -> tuple[str, Generator[Event, None, None]]:
        """Check a request, remember it, and return its id and the work that answers it."""
        asked = Asked.parse(found)
        if len(asked.images) > self.room:
            raise InputError(
                f"a prompt of {len(asked.images)} pictures is too long: a row of this model has "
                f"{self.room + 1}, one of them the answer; give at most {self.room} frames, or "
                f"{max(0, self.room - 1) // 2} pairs and a query"
            )
        files = [self.picture(key) for key in asked.images]
        missing = files.count(None)
        if missing:
            raise Gone(
                f"{missing} of the {len(files)} pictures are not stored any more (the store has a "
                "bounded size); drop them in again"
            )
        pictures = [_pixels(file) for file in files if file is not None]
        size = self.answerer.size
        if any(picture.shape != (size, size, 3) for picture in pictures):
            raise Gone(
                f"pictures of this prompt were made for another tokenizer, not {size} × {size}; "
                "drop them in again"
            )
        for key in asked.images:
            if key in self.built_in:
                self.store.put(self.built_in[key], suffix=".png")
        model = self.answerer.id
        key = self.store.put(asked.record(model), suffix=".json", key=asked.id(model))
        return key, self.answerer.answer(np.stack(pictures), asked)

    def recall(self, key: str) -> dict[str, Any] | None:
        """Return the prompt of a link; None where it is not known."""
        data = self.store.get(key, suffix=".json")
        if data is None:
            return None
        found = json.loads(data)
        same = found.pop("model") == self.answerer.id
        asked = Asked.parse(found)
        return {**asdict(asked), "same_model": same}


def _pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
