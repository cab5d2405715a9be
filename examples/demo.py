"""The whole pipeline on real pictures, as a user would run it: `make demo`.

    render     frames with depth and segmentation, photographs           examples.render
    tokenizer  a small VQ-GAN, bounded by time                           tokenizer.train
    sentences  shards to train on, and shards of maps never seen         visual_sentences.build
    model      a small transformer, bounded by time                      lvm.train
    evaluate   perplexity of held-out targets: right, wrong, no prompt   lvm.evaluate
    answers    pictures: analogies, sequences, sentences                 examples.answers
    report     one HTML page, and results.json                           examples.report

Each stage is a command that is printed and can be run by hand. A stage whose result is there is
skipped; after an interruption the same command goes on.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from examples.mix import write_mix
from examples.report import RATIOS, verdict, write_report
from tokenizer.cli import CommandError, duration, run
from tokenizer.files import atomic_write

MAP = "^(?:.*/)?([^/]+)-[^/-]+/"  # of a key such as targets/map07-03/005.png: map07


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """Render pictures, train a tokenizer and a model on them, and show what they can do."""

    out: Path = Path("runs/demo")
    """Folder of everything that is made."""
    size: Literal["quick", "full"] = "quick"
    """quick: 32 pixels, 64 codes an image, 8 images a sentence, about 12 minutes on two cores.
    full: 64 pixels, 256 codes, 16 images; wants a GPU."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What a demo of one size asks of each stage; times are in seconds."""

    frames: int
    share: float  # of the frames that each family of tasks has
    pixels: int
    images_per_row: int
    codes_per_image: int
    tokenizer: tuple[str, ...]
    model: tuple[str, ...]
    prompts: int


SIZES = {
    "quick": Size(
        frames=12_000,
        share=0.3,
        pixels=32,
        images_per_row=8,
        codes_per_image=64,
        tokenizer=("--seconds", "110", "--limit", "24000"),
        model=("--seconds", "330"),
        prompts=360,
    ),
    "full": Size(
        frames=60_000,
        share=1.0,
        pixels=64,
        images_per_row=16,
        codes_per_image=256,
        tokenizer=("--seconds", "1800", "--image-size", "64", "--channels", "128"),
        model=(
            "--seconds",
            "3600",
            "--model.width",
            "512",
            "--model.layers",
            "12",
            "--model.heads",
            "8",
            "--model.ffn",
            "1376",
            "--batch-rows",
            "32",
        ),
        prompts=720,
    ),
}

# Training steps several times slower have been seen where glibc gave every freed block back to the
# system; the cause was not isolated, and these settings cost nothing.
MALLOC = {
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    name: str
    commands: tuple[tuple[str, ...], ...]  # module and arguments of each


def stages(command: Demo) -> list[Stage]:
    """Return the stages of a demo, in order."""
    size, out, seed = SIZES[command.size], command.out, str(command.seed)
    pictures, tok, model = out / "pictures", out / "tokenizer", out / "model"

    def build(name: str) -> tuple[str, ...]:
        folder = out / name
        return (
            "visual_sentences.build", f"{folder}.toml", "--tokenizer", f"{tok}", "--out",
            f"{folder}",
        )  # fmt: skip

    render = (
        "examples.render", "--out", f"{pictures}", "--frames", str(size.frames), "--size",
        str(size.pixels), "--share", str(size.share), "--seed", seed,
    )  # fmt: skip
    evaluate = (
        "lvm.evaluate", f"{model}", "--data", f"{out / 'heldout'}", "--split", "train",
        "--rows", "200", "--prompts", str(size.prompts), "--group-by", MAP, "--seed", seed,
        "--out", f"{out / 'evaluation.json'}",
    )  # fmt: skip
    answers = (
        "examples.answers", "--model", f"{model}", "--tokenizer", f"{tok}", "--data",
        f"{out / 'heldout'}", "--out", f"{out / 'answers'}", "--group-by", MAP, "--seed", seed,
    )  # fmt: skip
    train_tokenizer = (
        "tokenizer.train", "tiny_f4", "--data", f"{pictures / 'train'}", "--val",
        f"{pictures / 'heldout'}", "--out", f"{tok}", "--seed", seed, *size.tokenizer,
    )  # fmt: skip
    train_model = (
        "lvm.train", "demo", "--data", f"{out / 'sentences'}", "--out", f"{model}", "--seed",
        seed, *size.model,
    )  # fmt: skip
    return [
        Stage(name="render", commands=(render,)),
        Stage(name="tokenizer", commands=(train_tokenizer,)),
        Stage(name="sentences", commands=(build("sentences"), build("heldout"))),
        Stage(name="model", commands=(train_model,)),
        Stage(name="evaluate", commands=(evaluate,)),
        Stage(name="answers", commands=(answers,)),
    ]


def run_stage(stage: Stage, *, out: Path, number: int, count: int) -> float:
    """Run a stage unless it was run before; returns the seconds it took when it ran."""
    record = out / "stages" / f"{stage.name}.json"
    title = f"[{number}/{count}] {stage.name}"
    if record.is_file():
        seconds = json.loads(record.read_text(encoding="utf-8"))["seconds"]
        print(f"{title}: there already, made in {duration(seconds)}", flush=True)
        return seconds
    start = time.monotonic()
    for arguments in stage.commands:
        print(f"{title}: python -m {shlex.join(arguments)}", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", *arguments], env={**os.environ, **MALLOC}, check=False
        )
        if done.returncode:
            raise CommandError(
                f"the stage {stage.name} ended with code {done.returncode}; its message is above. "
                f"Once that is mended, the same command goes on from here"
            )
    seconds = time.monotonic() - start
    write_json(record, {"seconds": round(seconds, 1), "commands": stage.commands})
    print(f"{title}: {duration(seconds)}\n", flush=True)
    return seconds


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=1)


def write_specs(command: Demo) -> None:
    """Write the two mixture specs, of the maps to train on and of those held out."""
    size = SIZES[command.size]
    for name, split in (("sentences", "train"), ("heldout", "heldout")):
        write_mix(
            command.out / "pictures",
            command.out / f"{name}.toml",
            split="train" if split == "train" else "heldout",
            row_len=size.images_per_row * size.codes_per_image,
            image_size=size.pixels,
            seed=command.seed,
        )


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Read a metrics.jsonl; a run too short for a line has none."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def collect(command: Demo, todo: Sequence[Stage], seconds: Mapping[str, float]) -> dict[str, Any]:
    """Return all figures of a demo, as `examples.report` and results.json have them."""
    out = command.out

    def read(name: str) -> dict[str, Any]:
        return json.loads((out / name).read_text(encoding="utf-8"))

    environment = json.loads((out / "model/environment.json").read_text(encoding="utf-8"))[-1]
    rendered = read("pictures/render.json")
    curve = [line for line in lines_of(out / "model/metrics.jsonl") if line["split"] == "train"]
    notes = [
        f"Trained for a set time, not a set number of steps: the tokenizer made "
        f"{read('tokenizer/results.json')['steps']:,} steps, the model {curve[-1]['step']:,} "
        f"({curve[-1]['tokens']:,} tokens). A slower machine makes fewer; its figures are worse.",
        "Targets come from maps that no stage has seen. Intervals are 95 %, from redrawing whole "
        "maps; ratios are paired, target by target.",
    ]
    if rendered["options"]["source"] != "vizdoom":
        notes.append("No renderer here: views over photographs stand in for its frames.")
    evaluation = read("evaluation.json")
    measured = ("corpus", "perplexity", "paired", "shots", "tasks")
    return {
        **{name: evaluation[name] for name in measured if name in evaluation},
        **read("answers/answers.json"),
        "tokenizer": read("tokenizer/results.json"),
        "stages": [
            {
                "name": stage.name,
                "seconds": seconds[stage.name],
                "commands": [["python", "-m", *words] for words in stage.commands],
            }
            for stage in todo
        ],
        "about": {
            "machine": {k: str(environment[k]) for k in ("device", "cpus", "threads")},
            "versions": {
                "python": environment["python"],
                **{k: v for k, v in environment["packages"].items() if v},
                **{k: v for k, v in rendered["versions"].items() if k in ("vizdoom", "pillow")},
            },
            "data": {
                "frames to train on": f"{rendered['frames']['train']:,}",
                "frames held out": f"{rendered['frames']['heldout']:,}",
                "places that failed": str(len(rendered["failed"])),
            },
            "demo": {"size": command.size, "seed": str(command.seed), "date": environment["time"]},
        },
        "notes": notes,
    }


def write(command: Demo, results: dict[str, Any]) -> Path:
    """Write results.json and the page; returns the page's path."""
    out = command.out
    write_json(out / "results.json", results)
    pictures: dict[str, np.ndarray | Path] = {p.name: p for p in (out / "answers").glob("*.png")}
    if (out / "tokenizer/samples.png").is_file():
        pictures["reconstructions"] = out / "tokenizer/samples.png"
    curves = {name: lines_of(out / name / "metrics.jsonl") for name in ("tokenizer", "model")}
    curves["model"] = [line for line in curves["model"] if line["split"] == "train"]
    return write_report({**results, "curves": curves}, pictures, out / "report.html")


def main(command: Demo) -> None:
    start = time.monotonic()
    todo = stages(command)
    seconds = {}
    for number, stage in enumerate(todo, 1):
        if stage.name == "sentences":
            write_specs(command)
        seconds[stage.name] = run_stage(stage, out=command.out, number=number, count=len(todo) + 1)
    print(f"[{len(todo) + 1}/{len(todo) + 1}] report\n", flush=True)
    results = collect(command, todo, seconds)
    report = write(command, results)
    for ratio, text in RATIOS.items():
        found = verdict(results["paired"].get(ratio), text)
        print(f"{found['ratio']}  {found['line']} ({found['word']})")
    for note in results["notes"]:
        print(note)
    print(f"\n{duration(time.monotonic() - start)} in all")
    print(f"figures  {command.out / 'results.json'}")
    print(f"report   {report}")


if __name__ == "__main__":
    run(Demo, main, prog="python -m examples.demo")
