"""Render the demo's pictures into ordinary folders.

    DIR/train/rgb/map07-03/005.png            frame 5 of walk 3 in map07
    DIR/train/questions/segment/...           the frames that have answers in a family of tasks
    DIR/train/segment-b/map07-03/005.png      an answer, under the same name
    DIR/train/photos/chelsea/0123.png         crops of photographs
    DIR/heldout/...                           the same from other maps and other photographs
    DIR/render.json                           what is there, what was dropped and why

One child process a map: should the engine die, one map is lost, not the work. A map is written
elsewhere and moved into place when it is whole, so the same command after a crash goes on with the
maps that are missing.
"""

import json
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from examples import photos, tasks, walk
from examples.child import render_all, report_path
from examples.place import Look, Place, places, png
from tokenizer.cli import CommandError, InputError, Progress, run
from tokenizer.files import TEMPORARY, atomic_write

FORMAT = 1  # of render.json
SPLITS = ("train", "heldout")


@dataclass(frozen=True, kw_only=True)
class Render:
    """Render frames with depth and segmentation, and crop photographs, for the demo.

    Frames come from the maps of Freedoom in the ViZDoom engine. Without the package vizdoom, views
    gliding over photographs take their place, with the tasks that need no renderer.
    """

    out: Path
    """Folder to write. A rendering with the same options that was begun there is continued."""
    frames: int = 12_000
    """Frames in all; every eighth map is held out."""
    size: int = 32
    """Side of the pictures in pixels, up to 192."""
    photos: int = 2_000
    """Crops of photographs in all."""
    share: float = 0.5
    """Part of the frames that a family of tasks gets questions and answers for. All frames are in
    `rgb`."""
    seed: int = 0
    workers: int = 2
    """Processes that render at the same time; does not change the result."""


def main(command: Render) -> None:
    began = time.monotonic()
    if not 8 <= command.size <= walk.HEIGHT or not 0.0 < command.share <= 1.0:
        raise InputError(
            f"--size {command.size} --share {command.share}: wanted a size of 8 to {walk.HEIGHT}"
            " and a share above 0, at most 1"
        )
    rendered = find_spec("vizdoom") is not None
    if not rendered and not photos.names():
        raise InputError(
            "neither vizdoom nor scikit-image is installed, so there is nothing to render from;"
            " install the extra `demo`"
        )
    options = _claim(command, rendered=rendered)
    if (command.out / "render.json").is_file():
        print(f"{command.out} is already rendered")
        return
    if not rendered:
        print("no vizdoom here: views over photographs stand in, without depth and segmentation")
    _crop_photos(command)
    todo = places(command.frames, rendered=rendered)
    failed = _render(command, todo)
    reports = {
        p.name: json.loads(report_path(command.out, p).read_text(encoding="utf-8"))
        for p in todo
        if p.name not in failed
    }
    frames, walks = ({s: _total(reports, s, f) for s in SPLITS} for f in ("frames", "walks"))
    if not all(frames.values()):
        raise CommandError(f"nothing to train on or nothing held out: {frames}; failed: {failed}")
    dropped: Counter[str] = Counter()
    for report in reports.values():
        dropped.update(report["dropped"])
    summary = {
        "format": FORMAT,
        "options": options,
        "frames": frames,
        "walks": walks,
        "tasks": [asdict(task) for task in tasks.tasks_for(geometry=rendered)],
        "dropped": dict(sorted(dropped.items())),
        "failed": failed,
        "places": reports,
        "seconds": round(time.monotonic() - began, 1),
        "versions": _versions(),
    }
    with atomic_write(command.out / "render.json", "w") as file:
        json.dump(summary, file, indent=1)
    print(
        f"{frames['train']} frames of {walks['train']} walks to train on,"
        f" {frames['heldout']} of {walks['heldout']} held out, from {len(reports)} places"
        + (f"; {len(failed)} failed: {failed}" if failed else "")
    )


def _render(command: Render, todo: list[Place]) -> dict[str, str]:
    """Render what is not there yet; return the places that failed, and how."""
    missing = [p for p in todo if not report_path(command.out, p).is_file()]
    total, left = (sum(p.frames for p in some) for some in (todo, missing))
    look = Look(size=command.size, share=command.share, seed=command.seed)
    failed: dict[str, str] = {}
    with Progress("render", total=total, unit="frames", done=total - left) as progress:

        def finished(place: Place, failure: str) -> None:
            if failure:
                failed[place.name] = failure
            progress.update(place.frames, failed=len(failed))

        render_all(missing, look, command.out, workers=command.workers, finished=finished)
    return failed


def _crop_photos(command: Render) -> None:
    names = photos.names()
    for i, name in enumerate(names):
        split = "heldout" if name in photos.HELD_OUT else "train"
        final = command.out / split / "photos" / name
        count = command.photos * (i + 1) // len(names) - command.photos * i // len(names)
        if final.is_dir() or not count:
            continue
        part = command.out / f"photos{TEMPORARY}{name}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        cut = photos.crops(name, count=count, size=command.size, seed=command.seed)
        for number, picture in enumerate(cut):
            (part / f"{number:04d}.png").write_bytes(png(picture))
        final.parent.mkdir(parents=True, exist_ok=True)
        part.rename(final)


def _claim(command: Render, *, rendered: bool) -> dict[str, Any]:
    """Write the options into the folder, or make sure that it was begun with the same ones."""
    options = {k: v for k, v in asdict(command).items() if k not in ("out", "workers")}
    options["source"] = "vizdoom" if rendered else "photographs"
    path = command.out / ".render" / "options.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        other = {k: (before.get(k), v) for k, v in options.items() if before.get(k) != v}
        if other:
            seen = ", ".join(f"{k} {a}, now {b}" for k, (a, b) in other.items())
            raise InputError(f"{command.out} was rendered with {seen}; use another --out")
    else:
        with atomic_write(path, "w") as file:
            json.dump(options, file)
    return options


def _total(reports: dict[str, dict[str, Any]], split: str, field: str) -> int:
    return sum(r[field] for r in reports.values() if r["split"] == split)


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in ("vizdoom", "scikit-image", "numpy", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    run(Render, main, prog="python -m examples.render")
