"""The launch scripts run against stand-ins for srun, scontrol and scancel; no Slurm is needed."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from lvm.recipes import recipes

ROOT = Path(__file__).parents[2]
OTHERS = ("common.sh", "build_common.sh", "build_array.sh", "build_ray.sh")  # train nothing
SCRIPTS = sorted(p for p in (ROOT / "launch").glob("*.sh") if p.name not in OTHERS)

SRUN = """#!/bin/bash
echo "$@" > "$T/srun.args"
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=3 SLURM_NTASKS=4 SLURM_LOCALID=1 exec "$@"
"""
PYTHON = """#!/bin/bash
echo "RANK=$RANK WORLD_SIZE=$WORLD_SIZE LOCAL_RANK=$LOCAL_RANK" \
     "MASTER_ADDR=$MASTER_ADDR MASTER_PORT=$MASTER_PORT args $@" > "$T/python.seen"
{body}
"""


class Cluster:
    """A folder with stand-ins on PATH, shards, an environment, and a spooled script."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        for name in ("bin", "data", "env/bin", "spool"):
            (folder / name).mkdir(parents=True)
        (folder / "data/manifest.json").write_text("{}")
        self.tool("bin/srun", SRUN)
        self.tool(
            "bin/scontrol",
            '#!/bin/bash\nif [[ $1 == show ]]; then printf "node7\\nnode8\\n"; '
            'else echo "$@" >> "$T/scontrol.seen"; fi\n',
        )
        self.tool("bin/scancel", "#!/bin/bash\nexit 1\n")
        self.python("exit 0")
        self.script = Path(shutil.copy(ROOT / "launch/lvm_3b.sh", folder / "spool/slurm_script"))
        self.env = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "T": str(folder),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_NTASKS": "4",
            "DATA": str(folder / "data"),
            "ENV": str(folder / "env"),
            "RUN_DIR": str(self.run),
        }

    def tool(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def python(self, body: str) -> None:
        self.tool("env/bin/python", PYTHON.replace("{body}", body))

    def start(self, **env: str | None) -> subprocess.Popen[str]:
        merged = {k: v for k, v in {**self.env, **env}.items() if v is not None}
        pipe = subprocess.PIPE
        return subprocess.Popen(
            ["bash", self.script], env=merged, cwd="/", stdout=pipe, stderr=pipe, text=True
        )

    def submit(self, **env: str | None) -> tuple[int, str, str]:
        process = self.start(**env)
        out, err = process.communicate(timeout=30)
        return process.returncode, out, err

    def seen(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_each_task_gets_its_rank_and_the_command(cluster):
    cluster.python('touch "$T/run/DONE"')
    code, out, err = cluster.submit(EXTRA="--optim.lr 1e-4 --steps 5")
    assert (code, err) == (0, "")
    assert cluster.seen("python.seen").split("args ") == [
        "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 MASTER_ADDR=node7 MASTER_PORT=23456 ",
        f"-m lvm.train lvm_3b --data {cluster.folder}/data --out {cluster.run}"
        " --optim.lr 1e-4 --steps 5\n",
    ]
    assert "--kill-on-bad-exit=1" in cluster.seen("srun.args")
    assert "finished" in out


def test_run_dir_defaults_to_the_recipe_in_the_checkout(cluster):
    checkout = cluster.folder / "checkout"
    shutil.copytree(ROOT / "launch", checkout / "launch")
    code, _, _ = cluster.submit(RUN_DIR=None, LVM_ROOT=str(checkout), RECIPE="lvm_1b")
    assert "lvm_1b" in cluster.seen("python.seen") and (checkout / "runs/lvm_1b/logs").is_dir()
    assert code == 0


def test_cluster_env_is_read(cluster):
    checkout = cluster.folder / "checkout"
    shutil.copytree(ROOT / "launch", checkout / "launch")
    (checkout / "launch/cluster.env").write_text("CONTAINER=/images/lvm.sqsh\n")
    cluster.tool("bin/python", PYTHON.replace("{body}", ""))
    cluster.submit(LVM_ROOT=str(checkout), ENV=None)
    assert "--container-image=/images/lvm.sqsh" in cluster.seen("srun.args")
    assert "python -m lvm.train" in cluster.seen("srun.args")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"DATA": None}, "DATA is not set"),
        ({"DATA": "/nowhere"}, "no manifest.json in DATA=/nowhere"),
        ({"ENV": None}, "neither ENV"),
        ({"ENV": "/nowhere"}, "no python in ENV=/nowhere"),
        ({"SLURM_SUBMIT_DIR": "/nowhere"}, "submit from the checkout, or set LVM_ROOT"),
    ],
)
def test_what_is_missing_fails_before_a_gpu_is_held(cluster, change, message):
    code, _, err = cluster.submit(**change)
    assert code == 2 and message in err
    assert cluster.seen("srun.args") == ""


def test_a_finished_run_is_left_alone(cluster):
    cluster.run.mkdir()
    (cluster.run / "DONE").touch()
    code, out, _ = cluster.submit()
    assert code == 0 and "finished" in out and cluster.seen("srun.args") == ""


def test_usr1_saves_and_requeues(cluster):
    cluster.python(
        "trap 'echo step-7 > \"$T/run/latest\"; exit 0' USR1\n"
        'touch "$T/started"\nwhile true; do read -t 0.05 <> <(:); done'
    )
    process = cluster.start()
    deadline = time.monotonic() + 20
    while not (cluster.folder / "started").exists():
        assert time.monotonic() < deadline, "the step never started"
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and "stopped at step-7 before the time limit; requeued" in out
    assert cluster.seen("scontrol.seen") == "requeue 123456\n"


def test_a_failure_is_requeued_only_while_checkpoints_move_on(cluster):
    cluster.python('echo step-9 > "$T/run/latest"; exit 7')
    code, out, _ = cluster.submit()
    assert code == 0 and "restart 1 of 5" in out
    code, _, err = cluster.submit(SLURM_RESTART_COUNT="1")  # the same checkpoint as before
    assert code == 7 and "failed with code 7 at step-9" in err
    cluster.python('echo step-11 > "$T/run/latest"; exit 7')
    code, _, _ = cluster.submit(SLURM_RESTART_COUNT="5")
    assert code == 7
    assert cluster.seen("scontrol.seen") == "requeue 123456\n"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_a_script_trains_what_its_name_says_and_can_be_requeued(script):
    text = script.read_text()
    assert f"RECIPE=${{RECIPE:-{script.stem}}}" in text and script.stem in recipes()
    header = re.findall(r"^#SBATCH (\S+)", text, flags=re.M)
    wanted = {"--requeue", "--open-mode=append", "--signal=B:USR1@300", f"--job-name={script.stem}"}
    assert wanted <= set(header)
    assert not [h for h in header if "partition" in h or "account" in h]
