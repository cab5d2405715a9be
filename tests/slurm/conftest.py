"""A real Slurm of two emulated nodes for the tests of this folder; see slurm_local.sh."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LOCAL = Path(__file__).with_name("slurm_local.sh")


class Slurm:
    """The cluster, and a login shell on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        self.env |= {"SLURM_LOCAL_DIR": str(folder), "SLURM_CONF": str(folder / "etc/slurm.conf")}

    def local(self, *args: str) -> None:
        """Start, stop or break the cluster or a node."""
        done = subprocess.run(["bash", LOCAL, *args], env=self.env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def call(self, *command: str, ok: bool = True, **env: str) -> str:
        """Run a command on the login node and return what it prints."""
        env = {**self.env, **env}
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 or not ok, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout + (done.stderr if not ok else "")

    def wait(self, what: str, found: Callable[[], Any], *, seconds: float = 120) -> Any:
        """Return what `found` returns as soon as that is true; fail after `seconds`, a bound."""
        deadline = time.monotonic() + seconds
        while not (value := found()):
            assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
            time.sleep(0.05)
        return value

    def launch(self, *args: str, **env: str) -> str:
        return self.call(sys.executable, "-m", "launch", *args, **env)

    def state(self, job: str) -> str:
        return self.call("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%T").strip()

    def ended(self, job: str) -> str:
        """Wait until a job has left the queue and return its last state."""
        waiting = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", ""}

        def last() -> str:
            state = self.state(job)
            return "" if state in waiting else state

        return self.wait(f"job {job} ends", last)


class Job:
    """A run folder with a job of launch/lvm_3b.sh on it, shrunk by sbatch's options alone."""

    def __init__(
        self, slurm: Slurm, folder: Path, *, nodes: int = 2, tasks: int = 1, **env: str
    ) -> None:
        self.slurm, self.run, self.log = slurm, folder / "run", folder / "job.log"
        folder.mkdir(parents=True, exist_ok=True)
        sizes = [f"--nodes={nodes}", f"--ntasks-per-node={tasks}", f"--gpus-per-node={tasks}"]
        sizes += ["--cpus-per-task=1", "--time=50", f"--output={self.log}"]  # minutes
        values = {"RUN_DIR": str(self.run), "HEALTH_GPU": "0", **env}
        self.id = slurm.call("sbatch", "--parsable", *sizes, "launch/lvm_3b.sh", **values).strip()

    @property
    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def nodes(self) -> list[str]:
        """Where each start of the job ran."""
        return re.findall(r"tasks on (\S+),", self.text)

    def says(self, words: str) -> None:
        self.slurm.wait(f"{words!r} in {self.log}", lambda: words in self.text)

    def reached(self, step: int) -> None:
        """Wait until the run has saved a checkpoint of this update or a later one."""
        latest = self.run / "latest"

        def saved() -> bool:
            name = latest.read_text().strip() if latest.exists() else "step-0"
            assert not (self.run / "DONE").exists(), "the run ended before it could be disturbed"
            return int(name.removeprefix("step-")) >= step

        self.slurm.wait(f"a checkpoint of update {step}; {self.log}", saved)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Two nodes of 64 CPUs and 8 GPUs each, on this machine; stopped by the pids that it noted."""
    if shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
        pytest.skip("no Slurm here: apt-get install slurm-wlm munge")
    ways = ([], ["--user"])  # of root; of everybody, where the system allows it
    tries = [["unshare", *way, "--uts", "--mount", "true"] for way in ways]
    if all(subprocess.run(command, capture_output=True).returncode for command in tries):
        pytest.skip("no namespaces here: wanted root, or unprivileged user namespaces")
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.local("start", "--nodes", "2", "--gpus", "8", "--cpus", "64")
        yield cluster
    finally:
        cluster.local("stop")


@pytest.fixture(scope="session")
def submit(slurm: Slurm) -> Callable[..., Job]:
    """Return a function that submits a job: `Job` without its first argument."""
    return partial(Job, slurm)
