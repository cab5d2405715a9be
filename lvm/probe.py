"""Probe a frozen model: how much of a label do small heads read from its features?

    python -m lvm.probe runs/aim --data imagenet --kind linear attentive knn --out runs/aim-probe
    python -m lvm.probe runs/lvm --tokenizer tok --data tree --kind linear --baseline random pixels

MODEL is of patches (AIM and its kin) or of codes. Heads, features and what is chosen by what:
`lvm.probing`, docs/probing.md.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from lvm import models
from lvm.evaluation.in_context import bootstrap_mean, group_keys
from lvm.probing.data import Labelled, open_split, same_classes
from lvm.probing.experiment import PARTS, STATE, Experiment
from lvm.probing.features import Dtype, Precision
from lvm.probing.fit import Schedule, Setting
from lvm.probing.score import chance, summary, table
from lvm.probing.settings import Kind, Settings, Splits, hold_out
from lvm.probing.trunk import PixelTrunk, Trunk, untrained, wrap
from tokenizer.cli import InputError, run
from tokenizer.devices import Device
from tokenizer.files import atomic_write
from tokenizer.world import World, world

FORMAT, VERSION = "lvm-probe", 1
FREE = frozenset(
    {"model", "data", "tokenizer", "out", "cache", "device", "workers", "save_seconds"}
)
"""What may differ when a probe is resumed: no figure depends on it. Model and data are compared by
their contents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Train linear and attentive probes on a frozen model, or ask its nearest neighbours.

    Features are the raw mean of some blocks' outputs. Rates, decays and blocks are chosen on a
    held-out part of the training split; the chosen head is then trained on all of it and asked once
    about the probed split. An existing OUT goes on where it was stopped. Under torchrun the ranks
    share the computing of features and stop; the same command without it goes on from there.
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Run folder, export, or released weights (a folder, or Apple's .pth): of patches, or of
    codes."""
    data: Path
    """Image shards with classes (visual_sentences.build --images), or pictures as
    SPLIT/CLASS/picture."""
    out: Path
    """Folder for results.json, the heads and, unless --cache says otherwise, the features."""
    kind: tuple[Kind, ...] = ("linear",)
    """linear: on the mean over positions; attentive: AIM's, a learned query over all positions;
    knn: cosine, nothing learnt."""
    tokenizer: Path | None = None
    """Tokenizer folder, for a model of codes."""
    train: str = "train"
    """Split to learn from."""
    split: str = "val"
    """Split to be probed by."""
    source: str = ""
    """Source of the image shards, where there are several."""
    label_by: str = ""
    """Regular expression on an image's key: its first group (or whole match) is the label, in place
    of the class that the data give."""
    group_by: str = ""
    """Regular expression on an image's key: images with equal first group (or whole match) are held
    out together, and drawn together in the bootstrap. Default: every image for itself."""
    blocks: tuple[str, ...] = ("last",)
    """last: the last --window blocks; best: searched among all runs of so many, on the held-out
    part of train; or numbers from 0."""
    window: int = 6
    """Blocks whose outputs are averaged; all, of a model of fewer."""
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    """Peak learning rates, trained side by side."""
    decays: tuple[float, ...] = (0.1,)
    """Weight decays of AdamW, each with every rate."""
    epochs: int = 100
    batch: int = 1024
    """Images a step of the heads."""
    held_out: float = 0.1
    """Part of the training split that chooses."""
    neighbours: int = 20
    temperature: float = 0.07
    """Of k-NN: how many vote, and how much less the farther ones count."""
    augment: bool = False
    """Learn from random crops and mirror images, new in every epoch: all features are then computed
    in every epoch, and kept nowhere. k-NN is as ever."""
    head: Path | None = None
    """Ask a trained attentive head, such as Apple's head_last_layers.pth or one of OUT/heads; no
    images to learn from are wanted, and nothing is trained."""
    stream: bool = False
    """Keep no features of all positions on disk: the attentive probe computes them in every
    epoch."""
    cache: Path | None = None
    """Folder for features, which several probes may share (default: OUT/features)."""
    dtype: Dtype = "fp16"
    """Number type of features on disk."""
    precision: Precision = "fp32"
    """What the model computes in: bf16 is autocast."""
    trunk_batch: int = 64
    """Images that the model reads at once."""
    baseline: tuple[Literal["pixels", "random"], ...] = ()
    """Probe too: raw pixels, at most 32 a side; the same model before any training."""
    workers: int = 4
    """Threads that decode images."""
    save_seconds: float = 60.0
    """Between saved states of a head in training."""
    seed: int = 0
    device: Device = "auto"


def main(command: Probe) -> None:
    _check(command)
    with world(command.device) as here:
        _probe(command, here)


def _probe(command: Probe, here: World) -> None:
    model = models.load(command.model)
    trunk = wrap(model.to(here.device), command.tokenizer, here.device)
    splits = _splits(command)
    command.out.mkdir(parents=True, exist_ok=True)
    resolved = _resolved(command, trunk, splits)
    if here.main:
        _compare(command.out, resolved)
    finished = command.out / "results.json"
    if finished.is_file():
        print(table(json.loads(finished.read_text(encoding="utf-8"))))
        print(f"finished before: {finished}")
        return
    settings = _settings(command, here.device)
    subjects: dict[str, Callable[[bool], Trunk]] = {"model": lambda tokens: trunk}
    if "random" in command.baseline:
        fresh = untrained(model, seed=command.seed).to(here.device)
        other = wrap(fresh, command.tokenizer, here.device)
        subjects["random"] = lambda tokens: other
    if "pixels" in command.baseline:
        subjects["pixels"] = lambda tokens: PixelTrunk(trunk, whole=not tokens)
    experiments = {
        name: Experiment(name, subject, splits, settings, show=here.main)
        for name, subject in subjects.items()
    }
    if here.size > 1:
        for experiment in experiments.values():
            experiment.fill(command.kind, rank=here.rank, world=here.size)
        if here.main:
            print("this rank's features are ready; run the same command without torchrun to go on")
        return
    report = _report(command, resolved, splits, experiments)
    with atomic_write(finished, "w") as file:
        json.dump(report, file, indent=1)
    print(table(report))
    print(f"wrote {finished}")


def _splits(command: Probe) -> Splits:
    def opened(split: str) -> Labelled:
        return open_split(command.data, split, source=command.source, label_by=command.label_by)

    val = opened(command.split)
    if command.head is not None:
        return Splits(train=val, val=val, held_out=np.zeros(len(val), bool))
    train, val = same_classes(opened(command.train), val)
    groups = group_keys(train.keys, command.group_by)
    held_out = hold_out(groups, share=command.held_out, seed=command.seed)
    return Splits(train=train, val=val, held_out=held_out)


def _report(
    command: Probe, resolved: dict[str, Any], splits: Splits, experiments: dict[str, Experiment]
) -> dict[str, Any]:
    """Run every probe and put the figures together."""
    val = splits.val
    groups = np.array(group_keys(val.keys, command.group_by))
    results: dict[str, dict[str, Any]] = {}
    right: dict[tuple[str, str], np.ndarray] = {}
    for name, experiment in experiments.items():
        results[name] = {}
        for kind in command.kind:
            found = experiment.run(kind)
            right[name, kind] = found.top1.astype(float)
            figures = summary(
                found.top1,
                found.top5,
                val.labels,
                classes=val.classes,
                groups=groups,
                seed=command.seed,
            )
            results[name][kind] = {"chosen": found.chosen, **figures, "sweep": found.sweep}
    paired = {
        f"model - {name}": {
            kind: bootstrap_mean(
                right["model", kind] - right[name, kind], groups, seed=command.seed
            )
            for kind in command.kind
        }
        for name in experiments
        if name != "model"
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        **resolved,
        "model": str(command.model),
        "data": str(command.data),
        "device": command.device,
        "torch": torch.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "images": {
            "train": len(splits.train),
            "held_out": int(splits.held_out.sum()),
            "val": len(val),
            "groups": len(np.unique(groups)),
        },
        "classes": list(val.classes),
        "chance": chance(splits.train.labels, val.labels),
        "results": results,
        "paired": paired,
    }


def _settings(command: Probe, device: torch.device) -> Settings:
    return Settings(
        out=command.out,
        cache=command.cache or command.out / "features",
        blocks=command.blocks,
        window=command.window,
        settings=[Setting(rate, decay) for rate in command.rates for decay in command.decays],
        schedule=Schedule(
            epochs=command.epochs,
            batch=command.batch,
            seed=command.seed,
            save_seconds=command.save_seconds,
        ),
        held_out=command.held_out,
        neighbours=command.neighbours,
        temperature=command.temperature,
        dtype=command.dtype,
        precision=command.precision,
        head=command.head,
        stream=command.stream,
        augment=command.augment,
        batch=command.trunk_batch,
        workers=command.workers,
        device=device,
    )


def _resolved(command: Probe, trunk: Trunk, splits: Splits) -> dict[str, Any]:
    """Return what the figures depend on, as JSON has it."""
    options = {k: v for k, v in asdict(command).items() if k not in FREE}
    ids = {"trunk": trunk.id, "train_images": splits.train.id, "val_images": splits.val.id}
    return json.loads(json.dumps({"options": options, "ids": ids}, default=str))


def _compare(out: Path, resolved: dict[str, Any]) -> None:
    """Write what this probe is, or refuse a folder in which another one has begun."""
    path = out / "config.json"
    if not any((out / name).exists() for name in (STATE, PARTS, "results.json")):
        with atomic_write(path, "w") as file:
            json.dump(resolved, file, indent=1)
    found = json.loads(path.read_text(encoding="utf-8"))
    changed = [
        f"{key}: {found.get(part, {}).get(key)}, now {value}"
        for part, values in resolved.items()
        for key, value in values.items()
        if found.get(part, {}).get(key) != value
    ]
    if changed:
        raise InputError(
            f"{out} holds another probe ({'; '.join(changed)}); use the same options to go on, or "
            "another --out"
        )


def _check(command: Probe) -> None:
    if not command.kind or not command.rates or not command.decays:
        raise InputError("--kind, --rates and --decays want at least one value each")
    if min(command.rates) <= 0 or min(command.decays) < 0 or command.temperature <= 0:
        raise InputError("--rates and --temperature are above 0, and --decays not below")
    if max(*command.rates, *command.decays) > 1e3:
        raise InputError("--rates and --decays are at most 1000; AdamW's best are far below 1")
    counts = ("window", "epochs", "neighbours", "trunk_batch", "workers")
    if low := [name for name in counts if getattr(command, name) < 1]:
        raise InputError(f"--{low[0].replace('_', '-')} is 1 or more")
    if command.batch < 2:
        raise InputError(f"--batch {command.batch}: batch norm needs two images or more")
    if command.head is not None and (
        command.kind != ("attentive",) or command.baseline or command.blocks == ("best",)
    ):
        raise InputError(
            "--head is an attentive probe of chosen blocks: use --kind attentive, no --baseline, "
            "and --blocks last or numbers"
        )
    if command.train == command.split and command.head is None:
        raise InputError(
            f"--train and --split are both {command.split}: a probe must not be asked what it was "
            "told; give two splits"
        )
    if not 0 < command.held_out < 1:
        raise InputError(f"--held-out {command.held_out}: wanted a part of the images in (0, 1)")


if __name__ == "__main__":
    run(Probe, main, prog="python -m lvm.probe")
