"""TensorBoard and Weights & Biases: the numbers of metrics.jsonl where people look at them.

metrics.jsonl is the record; these are copies of it, and a run without them loses nothing. Both are
imported when they are asked for.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lvm.config import Run
from tokenizer.cli import InputError

Sink = Callable[[Mapping[str, Any]], None]


def numbers(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a line by name, as `train/loss` or `val/by_kind/pair/nll`."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}/{key}")
        elif isinstance(value, int | float) and key != "step":
            yield f"{prefix}/{key}", float(value)


def tensorboard(folder: Path, *, step: int) -> Sink:
    """Return a function that adds a line; what an earlier start wrote behind `step` is dropped."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(f"--tensorboard: {error}; pip install tensorboard") from error
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def add(values: Mapping[str, Any]) -> None:
        for name, value in numbers(values, str(values["split"])):
            writer.add_scalar(name, value, int(values["step"]))
        writer.flush()

    return add


def wandb(run: Run) -> Sink:
    """Return a function that logs a line to the project `run.wandb`, one W&B run a run folder.

    Without a network set WANDB_MODE=offline, and `wandb sync` the folder later.
    """
    try:
        import wandb as service
    except ImportError as error:
        raise InputError(f"--wandb {run.wandb}: {error}; pip install wandb") from error
    folder = Path(run.out).resolve()
    name = "-".join(folder.parts[-2:])
    opened = service.init(
        project=run.wandb,
        dir=str(folder),
        id=name,
        name=name,
        resume="allow",
        config=run.to_json(),
        mode=os.environ.get("WANDB_MODE", "online"),
    )

    def add(values: Mapping[str, Any]) -> None:
        opened.log(dict(numbers(values, str(values["split"]))), step=int(values["step"]))

    return add


def sinks(run: Run, *, step: int) -> list[Sink]:
    """Return what each line is also given to."""
    made: list[Sink] = []
    if run.tensorboard:
        made.append(tensorboard(Path(run.out), step=step))
    if run.wandb:
        made.append(wandb(run))
    return made
