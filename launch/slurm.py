"""The few commands of Slurm that are used, on a login node."""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizer.cli import CommandError, InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued:
    """A job that Slurm still knows."""

    state: str
    """PENDING, RUNNING, COMPLETING, COMPLETED, CANCELLED, …"""
    reason: str
    """Why it waits."""
    left: str
    """Time to its limit, as Slurm writes it."""

    @property
    def active(self) -> bool:
        """Whether it will still run, or runs."""
        return self.state in ACTIVE

    @property
    def running(self) -> bool:
        """Whether its script runs, and can be told something."""
        return self.state in {"RUNNING", "SIGNALING"}


ACTIVE = frozenset({
    "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD",
    "REQUEUE_FED", "SPECIAL_EXIT", "STOPPED", "STAGE_OUT", "SIGNALING", "RESIZING",
})  # fmt: skip


def call(*command: str, cwd: Path | None = None) -> str:
    """Run a command of Slurm and return what it prints; raises InputError where there is none."""
    if shutil.which(command[0]) is None:
        raise InputError(f"there is no {command[0]} here; run this where Slurm's commands are")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise CommandError(f"{command[0]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def submit(script: Path, *, cwd: Path) -> str:
    """Submit a script and return its job's number; its own log goes to `cwd`."""
    return call("sbatch", "--parsable", str(script), cwd=cwd).strip().partition(";")[0]


def cancel(job: str) -> None:
    call("scancel", job)


def tell(job: str, signal: str) -> None:
    """Send a signal to a job's script alone."""
    call("scancel", "--batch", f"--signal={signal}", job)


def queue(jobs: Sequence[str]) -> dict[str, Queued]:
    """Return what Slurm says of these jobs (numbers, or 12_3 for task 3 of an array).

    A job is left out that it has forgotten, and every job where there is no Slurm.
    """
    if not jobs or shutil.which("squeue") is None:
        return {}
    wanted = ("-h", "-r", "-t", "all", "-j", ",".join(jobs), "-o", "%i|%T|%r|%L")
    try:
        lines = call("squeue", *wanted).splitlines()
    except CommandError as error:
        if "Invalid job id" in str(error):  # it says so of one that is forgotten, not of several
            return {}
        raise
    found = {}
    for line in lines:
        job, state, reason, left = line.split("|")
        found[job] = Queued(state=state, reason=reason, left=left)
    return found
