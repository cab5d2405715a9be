"""Where runs stand: what their folders say, beside what Slurm says of their jobs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import slurm
from tokenizer.cli import InputError, duration

JOB, CANCEL = "job", "CANCEL"
"""In a run folder: the job that has it, written by launch/common.sh and by `submit`; the mark that
keeps common.sh from requeueing a job that was told to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One run. What is not known yet is None."""

    folder: Path
    job: str | None
    queued: slurm.Queued | None
    finished: bool
    starts: int
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    left: float | None = None
    """Seconds of training that are left at this rate."""

    @property
    def state(self) -> str:
        """One word or two: finished, running, pending (why), stopped."""
        if self.finished:
            return "finished"
        if self.queued is None or not self.queued.active:
            return "stopped"
        state = "running" if self.queued.running else self.queued.state.lower()
        shown = self.queued.reason not in ("None", "")
        return f"{state} ({self.queued.reason})" if state == "pending" and shown else state


def find(folders: Sequence[Path]) -> list[Path]:
    """Return the run folders among these and one or two levels below them.

    Raises InputError where one of `folders` holds none.
    """
    found: list[Path] = []
    for folder in folders:
        below = [folder, *folder.glob("*"), *folder.glob("*/*")]
        runs = sorted(path for path in below if is_run(path))
        if not runs:
            raise InputError(
                f"{folder} holds no run, there or up to two levels below; wanted a folder of "
                "`python -m lvm.train` or `python -m launch submit`"
            )
        found += [run for run in runs if run not in found]
    return found


def is_run(folder: Path) -> bool:
    """Say whether a job or the trainer has been in a folder."""
    return (folder / JOB).is_file() or all(
        (folder / name).is_file() for name in ("config.json", "lvm.json", "environment.json")
    )


def job_of(folder: Path) -> str | None:
    path = folder / JOB
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def standing(folder: Path, queued: slurm.Queued | None) -> Standing:
    """Read one run folder."""
    config, last = _read(folder / "config.json"), last_train_line(folder / "metrics.jsonl")
    figures: dict[str, Any] = {}
    if config:
        figures["steps"] = config["steps"]
    if last:
        figures |= {key: last[key] for key in ("step", "loss", "tokens_per_s")}
    if config and last:
        tokens = (config["steps"] - last["step"]) * last["tokens"] / last["step"]
        left = tokens / last["tokens_per_s"]
        if config["seconds"]:
            left = min(left, config["seconds"] - last["elapsed"])
        figures["left"] = max(0.0, left)
    return Standing(
        folder=folder,
        job=job_of(folder),
        queued=queued,
        finished=(folder / "DONE").exists(),
        starts=len(_read(folder / "environment.json") or []),
        **figures,
    )


def standings(folders: Sequence[Path]) -> list[Standing]:
    """Read run folders, and ask Slurm once about all of their jobs."""
    jobs = {folder: job_of(folder) for folder in folders}
    queue = slurm.queue([job for job in jobs.values() if job])
    return [standing(folder, queue.get(job or "")) for folder, job in jobs.items()]


def last_train_line(path: Path, *, size: int = 1 << 16) -> dict[str, Any] | None:
    """Return the last whole line of metrics.jsonl that is about training, of its last bytes."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        lines = file.read().split(b"\n")
    for line in reversed(lines):
        try:
            found = json.loads(line)
        except ValueError:  # empty, cut off at the start, or being written
            continue
        if found.get("split") == "train":
            return found
    return None


def table(runs: Sequence[Standing]) -> str:
    """Write runs as plain lines, one each."""
    head = ("run", "job", "state", "step", "loss", "tokens/s", "left", "limit", "starts")
    rows = [head]
    for run in runs:
        rows.append((
            str(run.folder),
            run.job or "-",
            run.state,
            "-" if run.step is None else f"{run.step}/{run.steps}",
            "-" if run.loss is None else f"{run.loss:.4f}",
            "-" if run.tokens_per_s is None else f"{run.tokens_per_s:,.0f}",
            "-" if run.left is None or run.finished else duration(run.left),
            run.queued.left if run.queued and run.queued.running else "-",
            str(run.starts),
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
