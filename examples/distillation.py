"""Does a trained teacher help a small student? The same student with and without, at equal steps.

    make demo
    python -m examples.distillation --demo runs/demo --out runs/distillation

The teacher is the demo's model. For each seed a student of an eleventh of its size learns from
the codes alone, from codes and teacher (DeLVM's loss), and from codes and the teacher's stored 16
largest logits. Compared is the likelihood of rows of maps that none has seen. Writes results.json,
table.md and curve.png; what is there already is not run again.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.trials import interval, step, written
from tokenizer.cli import InputError, run
from tokenizer.files import atomic_write

ARMS = ("alone", "teacher", "16 logits")


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """Train students with and without a teacher."""

    demo: Path
    """Folder of a finished demo: its sentences are the data, its model the teacher."""
    out: Path
    steps: int = 500
    """Updates of every student, 0.06 M in its blocks."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the students' weights and the order of their rows."""
    rows: int = 400
    """Held-out rows that the students are measured on."""


def data_of(command: Distillation) -> tuple[Path, Path]:
    """Return the demo's sentences to learn from and to be measured on."""
    found = command.demo / "sentences", command.demo / "heldout"
    needed = [path / "manifest.json" for path in found] + [command.demo / "model" / "DONE"]
    if missing := [str(path) for path in needed if not path.is_file()]:
        raise InputError(f"{' and '.join(missing)} missing; run the demo first: make demo")
    return found


def student(command: Distillation, arm: str, seed: int, *, data: Path) -> Path:
    """Train one student; returns its run folder."""
    out = command.out / f"{arm.replace(' ', '-')}-{seed}"
    extra = {
        "alone": (),
        "teacher": ("--distil.teacher", str(command.demo / "model")),
        "16 logits": ("--distil.logits", str(command.out / "logits")),
    }[arm]
    step(
        "lvm.train", "tiny", "--data", str(data), "--out", str(out), "--steps", str(command.steps),
        "--seed", str(seed), "--model.width", "64", "--model.layers", "2", "--model.ffn", "128",
        "--log-every", "20", "--save-every", str(command.steps), *extra,
        done=out / "DONE", log=command.out / f"{out.name}.log",
    )  # fmt: skip
    return out


def measure(command: Distillation, folder: Path, *, held_out: Path, report: Path) -> float:
    """Return the mean NLL in nats of a model on the held-out rows; its figures go to `report`."""
    step(
        "lvm.evaluate", str(folder), "--data", str(held_out), "--split", "train", "--rows",
        str(command.rows), "--prompts", "0", "--out", str(report),
        done=report, log=report.with_suffix(".log"),
    )  # fmt: skip
    found = json.loads(report.read_text(encoding="utf-8"))
    return math.log(found["corpus"]["all"]["perplexity"])


def main(command: Distillation) -> None:
    command.out.mkdir(parents=True, exist_ok=True)
    data, held_out = data_of(command)
    teacher = command.demo / "model"
    step(
        "lvm.distil", str(teacher), "--data", str(data), "--out", str(command.out / "logits"),
        "--kept", "16",
        done=command.out / "logits" / "logits.json", log=command.out / "logits.log",
    )  # fmt: skip
    nll: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in command.seeds:
        for arm in ARMS:
            folder = student(command, arm, seed, data=data)
            report = command.out / f"{folder.name}.json"
            nll[arm].append(measure(command, folder, held_out=held_out, report=report))
    gains = {
        f"{arm} - alone": interval([a - b for a, b in zip(nll[arm], nll["alone"], strict=True)])
        for arm in ARMS[1:]
    }
    taught = measure(command, teacher, held_out=held_out, report=command.out / "teacher.json")
    results: dict[str, Any] = {
        "teacher": {"nll": taught},
        "seeds": command.seeds, "steps": command.steps, "rows": command.rows,
        "nll": {arm: {"seeds": values, **interval(values)} for arm, values in nll.items()},
        "gains": gains,
        "curves": {arm: _curve(command, arm) for arm in ARMS},
    }  # fmt: skip
    with atomic_write(command.out / "results.json", "w") as file:
        json.dump(results, file, indent=1)
    lines = [
        "| held-out NLL, nats a code | mean over seeds |",
        "| --- | --- |",
        f"| the teacher | {results['teacher']['nll']:.4f} |",
        *(f"| {arm} | {written(interval(values), digits=4)} |" for arm, values in nll.items()),
        *(f"| {name} | {written(found, digits=4)} |" for name, found in gains.items()),
    ]
    text = "\n".join(lines)
    (command.out / "table.md").write_text(text + "\n", encoding="utf-8")
    _plot(results, command.out / "curve.png")
    print(text)


def _curve(command: Distillation, arm: str) -> list[list[tuple[int, float]]]:
    """Return for each seed the NLL on the codes in training, by update."""
    curves = []
    for seed in command.seeds:
        folder = command.out / f"{arm.replace(' ', '-')}-{seed}"
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        curves.append([(x["step"], x["nll"]) for x in found if x["split"] == "train"])
    return curves


def _plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3), dpi=110, layout="constrained")
    for color, (arm, curves) in zip(("C0", "C1", "C2"), results["curves"].items(), strict=True):
        for i, points in enumerate(curves):
            axes.plot(*zip(*points, strict=True), color, label=None if i else arm, linewidth=1)
    axes.set(xlabel="update", ylabel="NLL of the codes in training, nats")
    axes.legend(frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    run(Distillation, main, prog="python -m examples.distillation")
