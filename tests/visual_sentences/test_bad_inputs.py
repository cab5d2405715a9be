"""Bad inputs: each is refused for its reason, none stops the rest, none leads outside."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tokenizer.images import BadImage, read_image
from visual_sentences.containers import (
    contents,
    frame_count,
    frame_name,
    is_clip,
    parts,
    read,
    recognise,
)

spec = importlib.util.spec_from_file_location("corpus", Path(__file__).with_name("corpus.py"))
assert spec is not None and spec.loader is not None
corpus = importlib.util.module_from_spec(spec)
spec.loader.exec_module(corpus)

opened: list[str] | None = None  # what this process opens, while somebody listens


def listen(event: str, args: tuple[object, ...]) -> None:
    if event == "open" and opened is not None and isinstance(args[0], str | bytes | os.PathLike):
        opened.append(os.path.realpath(os.fsdecode(args[0])))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("corpus").resolve() / "here"
    return folder, corpus.corpus(folder)


@pytest.fixture
def files_opened() -> Iterator[list[str]]:
    global opened
    if not getattr(sys, "_listening", False):
        sys.addaudithook(listen)  # cannot be taken away again
        sys._listening = True  # type: ignore[attr-defined]
    opened = []
    yield opened
    opened = None


def survey(folder: Path, origin: str) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Read all of an origin as a build does: reasons of the bad, pixels of the good, by name."""
    found = recognise(corpus.ORIGINS[origin], base=folder, where="mix.toml", role="path")
    bad: dict[str, str] = {}
    good: dict[str, np.ndarray] = {}
    for part in parts(found):
        listing = contents(part, clips=origin == "clips")
        bad |= dict(listing.bad)
        names = []
        for entry in listing.entries:
            try:
                names += (
                    [frame_name(entry.name, i) for i in range(frame_count(part, entry.name))]
                    if is_clip(entry.name)
                    else [entry.name]
                )
            except BadImage as error:
                bad[entry.name] = error.reason
        for name, raw in read(part, names):
            try:
                if isinstance(raw, BadImage):
                    raise raw
                good[name] = read_image(raw, size=32)
            except BadImage as error:
                bad[name] = error.reason
    return bad, good


@pytest.mark.parametrize("origin", corpus.ORIGINS)
def test_each_is_refused_for_its_reason_and_the_good_ones_are_read(made, origin: str) -> None:
    folder, reasons = made
    bad, good = survey(folder, origin)
    wanted = {
        name.removeprefix(f"{origin}/"): reason
        for name, reason in reasons.items()
        if name.startswith(f"{origin}/")
    }
    assert bad == wanted
    assert {name.partition("#")[0] for name in good} == corpus.GOOD[origin]


def test_the_corpus_is_large_and_varied(made) -> None:
    _, reasons = made
    assert len(reasons) >= 60 and len(set(reasons.values())) >= 20


def test_nothing_outside_is_opened(made, files_opened: list[str]) -> None:
    folder, _ = made
    for origin in corpus.ORIGINS:
        _, good = survey(folder, origin)
        for pixels in good.values():
            assert np.abs(pixels.astype(int) - corpus.CANARY).mean() > 40  # of 85 for black
    inside = [path for path in files_opened if path.startswith(f"{folder}/")]
    assert len(inside) > 50  # the hook hears
    assert not [path for path in inside if path.startswith(f"{folder}/outside")]


def test_listing_says_the_same_twice(made) -> None:
    folder, _ = made
    for written in corpus.ORIGINS.values():
        for part in parts(recognise(written, base=folder, where="mix.toml", role="path")):
            assert contents(part, clips=True) == contents(part, clips=True)
