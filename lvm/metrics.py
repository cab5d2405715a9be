"""What a run writes down: metrics.jsonl, one object a line, and environment.json.

A train line sums up the updates since the line before. `loss` is what is minimised and `nll` its
likelihood part, both a mean over predicted codes; perplexity = exp(nll). A model of patches has in
their place `distance`, the mean of its term over predicted patches. `tokens` counts positions
of all rows so far, padding included, and `tokens_per_s` follows it. `mfu` is

    tokens_per_s x flops_per_token / (devices x peak FLOP/s of a device in bf16, dense)

with lvm.config's flops_per_token: 6 a matrix weight, attention counted by its causal half;
`mfu_full` counts all pairs of positions. Both are left out where the device's peak is not known.

`time_data`, `time_model` (forward and backward) and `time_optimiser` (clipping too) are shares of
the time since the line before, on a GPU by its own clock; `time_rest` is what the loop adds.
"""

import itertools
import json
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lvm.dashboards import Sink
from tokenizer.cli import CommandError
from tokenizer.files import atomic_write
from tokenizer.provenance import git_commit
from tokenizer.world import World

PEAKS = {"B200": 2.25e15, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
"""Dense bf16 FLOP/s by a part of the device's name, from the makers' data sheets (SXM parts)."""

PACKAGES = ("torch", "numpy", "pyarrow", "triton", "safetensors", "tyro", "torchtitan")


class Log:
    """Appends to metrics.jsonl, and gives each line to `sinks`.

    A resumed run first drops the lines behind its checkpoint.
    """

    def __init__(self, path: Path, *, step: int, enabled: bool, sinks: Sequence[Sink] = ()) -> None:
        self.path, self.enabled, self.sinks = path, enabled, sinks
        if enabled and path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
            kept = [line for line in kept if _step(line) <= step]
            with atomic_write(path, "w") as file:
                file.writelines(line + "\n" for line in kept)

    def write(self, values: dict[str, Any]) -> None:
        if self.enabled:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
            for sink in self.sinks:
                sink(values)


def _step(line: str) -> float:
    """Return the update that a line is about; of a line cut off by a crash, infinity."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


class Clock:
    """Where the time of updates goes: on a GPU's own time line, which nobody waits for."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        """Give the time since the mark before to `name`; "" begins."""
        moment: Any = time.perf_counter()
        if self.cuda:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self.marks.append((name, moment))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each name; waits for the device."""
        found: dict[str, float] = {}
        if self.cuda:
            torch.cuda.synchronize()
        for (_, before), (name, after) in itertools.pairwise(self.marks):
            if name:
                took = before.elapsed_time(after) / 1e3 if self.cuda else after - before
                found[name] = found.get(name, 0.0) + took
        return found


class Window:
    """The updates since the last line. Tensors stay on their device until `close`."""

    def __init__(self, device: torch.device) -> None:
        self.sums: list[torch.Tensor] = []
        self.steps: list[int] = []
        self.tokens = 0
        self.waited = 0.0
        self.clock = Clock(device)
        self.start = time.perf_counter()

    def add(self, sums: torch.Tensor, *, step: int, tokens: int, waited: float) -> None:
        """Take an update's sums [loss, nll, correct, count] of this rank; tokens are all ranks'."""
        self.sums.append(sums)
        self.steps.append(step)
        self.tokens += tokens
        self.waited += waited

    def pause(self, seconds: float) -> None:
        """Leave time that was not spent on updates out of the line's rates."""
        self.start += seconds

    def close(
        self, world: World, *, batch_rows: int, measures: Callable[..., dict[str, float]]
    ) -> dict[str, float]:
        """Return the line's values; every rank calls, and waits for its device.

        `measures` makes values of the sums nll, correct and count, as the learner's does.

        Raises CommandError where a loss was not finite, with the update and its samples.
        """
        per_update = world.total(torch.stack(self.sums)).double().cpu()
        finite = per_update[:, 0].isfinite()
        if not finite.all():
            bad = self.steps[int((~finite).nonzero()[0])] + 1
            first = (bad - 1) * batch_rows
            raise CommandError(
                f"the loss of update {bad} (samples {first} to {first + batch_rows - 1}) is not "
                "finite; the last checkpoint is from before it. Try a lower --optim.lr or "
                "--optim.muon_lr, a longer --optim.warmup, --precision fp32, or --spike-limit 10, "
                "which leaves such updates out"
            )
        loss, nll, correct, count = per_update.sum(0).tolist()
        seconds = time.perf_counter() - self.start
        parts = {f"time_{name}": took / seconds for name, took in self.clock.seconds().items()}
        return {
            "loss": loss / count,
            **measures(nll, correct, count),
            "tokens_per_s": self.tokens / seconds,
            "data_wait": self.waited / seconds,
            **parts,
            "time_rest": 1.0 - sum(parts.values()),
        }


def means(nll: float, correct: float, count: float) -> dict[str, float]:
    """Return nll, perplexity and accuracy of sums over `count` predicted codes."""
    mean = nll / count
    return {
        "nll": mean,
        "perplexity": math.exp(min(mean, 700.0)),  # beyond that a double overflows
        "accuracy": correct / count,
    }


def utilisation(
    flops_per_token: Callable[..., float], world: World, *, tokens_per_s: float, row_len: int
) -> dict[str, float]:
    """Return `mfu` and `mfu_full` as the module's text says, or nothing on an unknown device."""
    if world.device.type != "cuda":
        return {}
    name = torch.cuda.get_device_name(world.device)
    peak = next((peak for part, peak in PEAKS.items() if part in name), None)
    if peak is None:
        return {}
    share = tokens_per_s / (world.size * peak)
    return {
        "mfu": share * flops_per_token(row_len),
        "mfu_full": share * flops_per_token(row_len, causal=False),
    }


def memory_gib(world: World) -> float:
    """Return the most memory held so far: of the device, or of this process on a CPU."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def environment(world: World, *, step: int) -> dict[str, Any]:
    """Return what this start of a run stands on: code, packages, command and hardware."""
    cuda = world.device.type == "cuda"
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "command": sys.argv,
        "git": git_commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "world": world.size,
        "device": torch.cuda.get_device_name(world.device) if cuda else platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "mfu": "tokens_per_s x flops_per_token / (devices x peak); causal half, full beside it",
    }


def record_environment(path: Path, found: dict[str, Any]) -> None:
    """Add a start to environment.json, a list with one entry a start."""
    starts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    with atomic_write(path, "w") as file:
        json.dump([*starts, found], file, indent=1)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
