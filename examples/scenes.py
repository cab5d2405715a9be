"""What does AIM learn from pictures alone? Probes for the scene that a picture shows.

    python -m examples.render --out runs/pictures
    python -m examples.scenes --pictures runs/pictures --out runs/scenes

A small AIM is trained on frames of walks through 63 maps, without labels; then linear, attentive
and nearest-neighbour probes are asked which map a frame is of, on walks that neither has seen,
beside the same trunk before training and raw pixels. Walks are held out whole: frames of one walk
look alike. Writes results.json, table.md and curve.png; what is there already is not run again.
"""

import json
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.trials import interval, step, written
from tokenizer.cli import InputError, run
from tokenizer.files import atomic_write

SUBJECTS = ("model", "random", "pixels")
KINDS = ("linear", "attentive", "knn")
SPEC = """seed = 0
image_size = {size}
[[source]]
name = "scenes"
kind = "image"
path = "{path}"
license = "BSD-3-Clause"
note = "frames of Freedoom's maps, rendered by ViZDoom"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenes:
    """Train a small AIM on rendered frames and probe it for the map that a frame shows."""

    pictures: Path
    """Folder that examples.render wrote."""
    out: Path
    steps: int = 600
    """Updates of 64 images."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the weights, the order of the images, and the probes."""
    size: int = 32
    """Side of the pictures in pixels."""
    held_out: int = 4
    """Every so many-th walk of a map is probed, not learnt from."""
    epochs: int = 40
    """Of the probes' heads."""
    only: tuple[str, ...] = KINDS
    """Kinds of probes."""


def arrange(command: Scenes) -> Path:
    """Copy the frames as SPLIT/MAP/WALK_FRAME; returns the folder."""
    tree, done = command.out / "tree", command.out / "tree.json"
    if done.exists():
        return tree
    source = command.pictures / "train" / "rgb"
    if not source.is_dir():
        raise InputError(f"{source} is missing; render first: python -m examples.render --out DIR")
    walks: dict[str, list[Path]] = defaultdict(list)
    for walk in sorted(source.iterdir()):
        walks[walk.name.rsplit("-", 1)[0]].append(walk)
    count = {"train": 0, "val": 0}
    for name, folders in walks.items():
        for number, walk in enumerate(folders):
            split = "val" if number % command.held_out == command.held_out - 1 else "train"
            folder = tree / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for frame in sorted(walk.iterdir()):
                shutil.copyfile(frame, folder / f"{walk.name}_{frame.name}")
                count[split] += 1
    with atomic_write(done, "w") as file:
        json.dump({"maps": len(walks), **count}, file)
    return tree


def one_seed(command: Scenes, seed: int, *, data: Path, tree: Path) -> dict[str, Any]:
    """Train and probe with one seed; returns the probe's report."""
    model, probe = command.out / f"aim-{seed}", command.out / f"probe-{seed}"
    step(
        "lvm.train", "aim_tiny", "--data", str(data), "--out", str(model), "--steps",
        str(command.steps), "--seed", str(seed), "--log-every", "25", "--save-every",
        str(command.steps), "--patches.image-size", str(command.size),
        done=model / "DONE", log=command.out / f"aim-{seed}.log",
    )  # fmt: skip
    step(
        "lvm.probe", str(model), "--data", str(tree), "--out", str(probe), "--kind", *command.only,
        "--baseline", "random", "pixels", "--blocks", "last", "--group-by", "^([^_]+)",
        "--epochs", str(command.epochs), "--batch", "512", "--rates", "1e-3", "3e-3", "1e-2",
        "--seed", str(seed), "--workers", "1",
        done=probe / "results.json", log=command.out / f"probe-{seed}.log",
    )  # fmt: skip
    return json.loads((probe / "results.json").read_text(encoding="utf-8"))


def curve(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return [(line["step"], line["loss"]) for line in found if line["split"] == "train"]


def main(command: Scenes) -> None:
    command.out.mkdir(parents=True, exist_ok=True)
    tree = arrange(command)
    spec, data = command.out / "scenes.toml", command.out / "shards"
    spec.write_text(SPEC.format(size=command.size, path=(tree / "train").resolve()), "utf-8")
    step(
        "visual_sentences.build", str(spec), "--images", "--out", str(data),
        done=data / "manifest.json", log=command.out / "build.log",
    )  # fmt: skip
    reports = [one_seed(command, seed, data=data, tree=tree) for seed in command.seeds]
    top1 = {
        subject: {
            kind: interval([r["results"][subject][kind]["top1"]["mean"] for r in reports])
            for kind in command.only
        }
        for subject in SUBJECTS
    }
    gains = {
        f"model - {other}": {
            kind: interval(
                [
                    r["results"]["model"][kind]["top1"]["mean"]
                    - r["results"][other][kind]["top1"]["mean"]
                    for r in reports
                ]
            )
            for kind in command.only
        }
        for other in SUBJECTS[1:]
    }
    results = {
        "images": reports[0]["images"], "chance": reports[0]["chance"], "seeds": command.seeds,
        "steps": command.steps, "top1": top1, "gains": gains,
        "curves": [curve(command.out / f"aim-{seed}") for seed in command.seeds],
    }  # fmt: skip
    with atomic_write(command.out / "results.json", "w") as file:
        json.dump(results, file, indent=1)
    lines = [
        f"| top-1 in %, mean over {len(reports)} seeds | " + " | ".join(command.only) + " |",
        "| --- " * (1 + len(command.only)) + "|",
        *(
            f"| {name} | " + " | ".join(written(row[k], scale=100) for k in command.only) + " |"
            for name, row in {**top1, **gains}.items()
        ),
    ]
    text = "\n".join(lines)
    (command.out / "table.md").write_text(text + "\n", encoding="utf-8")
    _plot(results, command.out / "curve.png")
    print(text)


def _plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3), dpi=110, layout="constrained")
    for seed, points in zip(results["seeds"], results["curves"], strict=True):
        axes.plot(*zip(*points, strict=True), label=f"seed {seed}", linewidth=1)
    axes.set(xlabel="update", ylabel="loss on normalised pixels")
    axes.legend(frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    run(Scenes, main, prog="python -m examples.scenes")
