"""Job scripts: the committed launch/RECIPE.sh with its #SBATCH lines and variables filled in.

A rendered script is the committed file, with values replaced and a few `export` lines; so what
`python -m launch` submits is what `sbatch launch/RECIPE.sh` would run. A recipe without a file of
its own (lvm_13b, tiny, your own package.module.name) takes that of lvm_300m, on one node.
"""

import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lvm.config import Run
from lvm.recipes import recipe
from tokenizer.cli import InputError
from visual_sentences.loader import check_batch

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
BASE = "lvm_300m"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is asked of Slurm for one run; what is not given is as in the recipe's own script."""

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """What to train, as for `python -m lvm.train`. Its own options follow after --."""
    data: Path | None = None
    """Folder of shards with manifest.json (default: the variable DATA)."""
    run_dir: Path | None = None
    """Run folder (default: the variable RUN_DIR, then runs/RECIPE in the checkout)."""
    nodes: int | None = None
    """Machines."""
    gpus_per_node: int | None = None
    """GPUs of each, with one task a GPU; 0 asks for none."""
    tasks_per_node: int | None = None
    """Ranks on each node (default: one a GPU)."""
    cpus_per_task: int | None = None
    """CPU cores of each rank."""
    time: str = ""
    """Time limit, 24:00:00 or 2-00:00:00; a run that needs more is requeued."""
    partition: str = ""
    """Partition (default: the variable SBATCH_PARTITION, or Slurm's)."""
    account: str = ""
    """Account (default: the variable SBATCH_ACCOUNT, or Slurm's)."""
    sbatch: tuple[str, ...] = ()
    """More options for sbatch, without their dashes, as `--sbatch qos=high exclude=node7`."""

    @property
    def folder(self) -> Path:
        """The run folder, absolute; a relative one is of where this command runs."""
        if self.run_dir is not None:
            return self.run_dir.absolute()
        return ROOT / os.environ.get("RUN_DIR", f"runs/{self.recipe}")


def own_script(name: str) -> Path:
    """Return the committed script that a recipe's jobs are made from."""
    path = LAUNCH / f"{name}.sh"
    return path if path.is_file() else LAUNCH / f"{BASE}.sh"


def options(job: Job) -> dict[str, str]:
    """Return the #SBATCH options of a job's script by name, a flag's value being empty."""
    source = own_script(job.recipe)
    found = re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", source.read_text("utf-8"), flags=re.M)
    values = dict(found) | {"job-name": job.recipe}
    tasks = job.tasks_per_node or job.gpus_per_node
    given = {
        "nodes": job.nodes,
        "gpus-per-node": job.gpus_per_node,
        "ntasks-per-node": tasks,
        "cpus-per-task": job.cpus_per_task,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
    }
    values |= {name: str(value) for name, value in given.items() if value not in (None, "")}
    if values["gpus-per-node"] == "0":
        del values["gpus-per-node"]
        if not job.tasks_per_node:
            raise InputError(
                "--gpus-per-node 0 leaves no GPU to start a task for; give --tasks-per-node N"
            )
    for text in job.sbatch:
        name, _, value = text.removeprefix("--").partition("=")
        if not re.fullmatch(r"[a-z][a-z-]*", name):
            raise InputError(f"--sbatch {text} is no option; wanted its long name, as in qos=high")
        values[name] = value
    return values


def render(job: Job, extra: Sequence[str] = (), *, sweep: str = "", at_once: str = "") -> str:
    """Return the script of a job. `extra` are the trainer's options.

    `sweep` and `at_once` make it an array over the tasks.tsv of the run folder: see launch.sweep.
    Raises InputError where the recipe or an option is not one.
    """
    recipe(job.recipe)
    values = options(job)
    if sweep:
        values["array"] = f"{sweep}%{at_once}" if at_once else sweep
    header = [f"#SBATCH --{name}={value}".removesuffix("=") for name, value in values.items()]
    for word in extra:
        if not word or re.search(r"[\s*?\[]", word):
            raise InputError(
                f"the trainer's option {word!r} has a space or a wildcard in it, which the job's "
                "shell would take apart; write a recipe of your own that holds it"
            )
    source = own_script(job.recipe)
    exports = {
        "LVM_ROOT": str(ROOT),
        "SWEEP" if sweep else "RUN_DIR": str(job.folder),
        "RECIPE": job.recipe,
        **({"DATA": str(job.data.absolute())} if job.data else {}),
        **({"EXTRA": " ".join(extra)} if extra else {}),
    }
    body = source.read_text("utf-8").split(f"\nRECIPE=${{RECIPE:-{source.stem}}}\n", 1)
    return "\n".join([
        "#!/usr/bin/env bash",
        *header,
        "",
        f"# launch/{source.name}, filled in by python -m launch. Variables: launch/common.sh.",
        "",
        *(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
        body[1],
    ])  # fmt: skip


def check_options(job: Job, extra: Sequence[str]) -> Run:
    """Return the run that the trainer would start; raises InputError where it would refuse.

    An option that the trainer does not have ends the program with its own message and code 2.
    """
    values = options(job)
    world = int(values["nodes"]) * int(values["ntasks-per-node"])
    run = tyro.cli(
        Run,
        prog=f"python -m lvm.train {job.recipe}",
        default=recipe(job.recipe),
        args=list(extra),
        config=(tyro.conf.AvoidSubcommands,),
    )
    check_batch(run.batch_rows, world=world)
    check_batch(
        run.batch_rows, world=world, micro_rows=min(run.micro_rows, run.batch_rows // world)
    )
    return run


def check_files(script: str) -> None:
    """Let a script look for what it needs, here and now: it starts nothing outside a job.

    Raises InputError with its message where DATA, the manifest or the environment is missing.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    done = subprocess.run(
        ["bash", "-s"], input=script, env=env, cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise InputError(done.stderr.strip().removeprefix("lvm: ") or done.stdout.strip())
