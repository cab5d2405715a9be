"""Jobs on a Slurm cluster: `python -m launch {render,submit,status,cancel,sweep}`.

`render` prints a job's script; `submit` checks what it needs before anything waits in a queue, and
submits it; `sweep` does so for every combination of values; `status` and `cancel` take run folders.
What the jobs do is in the scripts of this folder, above all common.sh.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from launch import runs, script, slurm, sweep
from launch.script import Job
from tokenizer.cli import InputError, guarded

PROG = "python -m launch"
Folders = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN…")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Render(Job):
    """Print the script of a job: RECIPE [options] [-- options of the trainer]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit(Job):
    """Check what a job needs, write RUN/job.sh, submit it: RECIPE [options] [-- the trainer's]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep(Job):
    """Submit a run for each combination of values, as an array: RECIPE --vary … [-- the trainer's].

    The run folder holds one folder a run; `status` and `cancel` take it as they take one run.
    """

    vary: tuple[str, ...] = ()
    """Values to combine, as `--vary optim.lr=1e-4,3e-4 seed=1,2`."""
    at_once: int | None = None
    """Jobs that may run at the same time."""
    dry_run: bool = False
    """Only print the combinations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Say where runs stand: step, loss, tokens/s, time left, and the state of their jobs."""

    folders: Folders = (Path("runs"),)
    """Run folders, or folders of those."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Let jobs save and end; nothing is requeued. The same submission goes on from there."""

    folders: Folders
    """Run folders, or folders of those."""
    now: bool = False
    """Do not wait for an update to end: the job has Slurm's KillWait, usually 30 s, to save."""


def submit(job: Job, extra: Sequence[str]) -> None:
    """Submit one run. Raises InputError for all that the job itself would find missing."""
    text = script.render(job, extra)
    script.check_options(job, extra)
    folder = job.folder
    _refuse_queued([folder])
    script.check_files(text)
    if (folder / "DONE").exists():
        print(f"{folder} is finished; nothing to do")
        return
    path = _write(folder, text)
    number = slurm.submit(path, cwd=folder / "logs")
    (folder / runs.JOB).write_text(f"{number}\n", encoding="utf-8")
    print(f"job {number}: {path}\nsee {PROG} status {folder}")


def submit_sweep(job: Sweep, extra: Sequence[str]) -> None:
    """Submit one array for all combinations; raises InputError as `submit`."""
    tasks = sweep.combinations(job.vary)
    for values in tasks:
        script.check_options(job, [*extra, *sweep.options_of(values)])
    if job.dry_run:
        print("\n".join(sweep.name_of(values) for values in tasks))
        return
    folder = job.folder
    folders = [folder / sweep.name_of(values) for values in tasks]
    _refuse_queued(folders)
    at_once = str(job.at_once or "")
    text = script.render(job, extra, sweep=f"1-{len(tasks)}", at_once=at_once)
    script.check_files(text)
    sweep.write_tasks(folder, tasks)
    number = slurm.submit(_write(folder, text), cwd=folder / "logs")
    for index, each in enumerate(folders, 1):
        each.mkdir(exist_ok=True)
        (each / runs.JOB).write_text(f"{number}_{index}\n", encoding="utf-8")
    print(f"job {number}: {len(tasks)} runs in {folder}\nsee {PROG} status {folder}")


def cancel(command: Cancel) -> None:
    """End the jobs of runs; a run without a job in the queue is left alone."""
    for run in runs.standings(runs.find(command.folders)):
        if run.job is None or run.queued is None or not run.queued.active:
            print(f"{run.folder} has no job in the queue")
        elif command.now or not run.queued.running:
            slurm.cancel(run.job)
            print(f"{run.folder}: job {run.job} cancelled")
        else:
            (run.folder / runs.CANCEL).touch()  # first: the script looks for it when it has saved
            slurm.tell(run.job, "USR1")
            print(f"{run.folder}: job {run.job} saves and ends")


def _refuse_queued(folders: Sequence[Path]) -> None:
    for run in runs.standings([folder for folder in folders if folder.is_dir()]):
        if run.queued is not None and run.queued.active:
            raise InputError(
                f"{run.folder} has job {run.job} in the queue ({run.state}); cancel that with "
                f"{PROG} cancel {run.folder}, or give another --run-dir"
            )


def _write(folder: Path, text: str) -> Path:
    """Write a job's script into its run folder, beside a folder for the logs."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    path = folder / "job.sh"
    path.write_text(text, encoding="utf-8")
    return path


def main(args: Sequence[str]) -> None:
    """Parse and run one command; what follows `--` is the trainer's, or the variable EXTRA."""
    words = list(args)
    at = words.index("--") if "--" in words else len(words)
    mine, extra = words[:at], words[at + 1 :] or os.environ.get("EXTRA", "").split()
    commands: dict[str, Callable[..., Any]] = {
        "render": Render, "submit": Submit, "status": Status, "cancel": Cancel, "sweep": Sweep
    }  # fmt: skip
    command = tyro.extras.subcommand_cli_from_dict(commands, prog=PROG, args=mine)
    match command:
        case Render():
            script.check_options(command, extra)
            sys.stdout.write(script.render(command, extra))
        case Submit():
            submit(command, extra)
        case Sweep():
            submit_sweep(command, extra)
        case Status():
            print(runs.table(runs.standings(runs.find(command.folders))))
        case Cancel():
            cancel(command)


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:]), prog=PROG))
