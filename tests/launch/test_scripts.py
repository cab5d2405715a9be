"""The launch scripts run against stand-ins for srun, scontrol and scancel; no Slurm is needed."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from lvm.recipes import recipe, recipes

ROOT = Path(__file__).parents[2]
GPUS = {
    "lvm_300m": 8, "lvm_600m": 16, "lvm_1b": 32, "lvm_3b": 128, "lvm_7b": 256,
    "aim_1b": 64, "delvm_300m_kd": 8,
}  # fmt: skip
PER_ROW = {"lvm": 4096, "aim": 1, "delvm": 2048}  # what a row counts in the script's words
SCRIPTS = sorted(p for name in PER_ROW for p in (ROOT / "launch").glob(f"{name}_*.sh"))

# The health check runs on node7 and node8, with $T/bin/nvidia-smi of that node.
SRUN = """#!/bin/bash
echo "$@" >> "$T/srun.args"
while [[ $1 == --* ]]; do shift; done
if [[ $2 == */health.sh ]]; then
    for node in ${ANSWER-node7 node8}; do SLURMD_NODENAME=$node "$@"; done
    exit
fi
SLURM_PROCID=3 SLURM_NTASKS=4 SLURM_LOCALID=1 exec "$@"
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
    "show hostnames") printf "node7\nnode8\n" ;;
    "show job") echo "JobId=$4 ExcNodeList=${EXCLUDED:-(null)} Features=(null)" ;;
    *) echo "$@" >> "$T/scontrol.seen" ;;
esac
"""
# With KILLED it dies of its first question about the state, as if hit by a signal for its job.
SQUEUE = """#!/bin/bash
if [[ $5 == %L ]]; then echo "${LEFT-4:59}"
elif [[ -n ${KILLED:-} && ! -f $T/killed ]]; then touch "$T/killed"; kill -TERM $$
else echo "${STATE:-RUNNING}"; fi
"""
NVIDIA_SMI = """#!/bin/bash
for i in 0 1 2 3 4 5 6 7; do echo "$i, 3, 0, Not Active"; done
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
        self.tool("bin/scontrol", SCONTROL)
        self.tool("bin/nvidia-smi", NVIDIA_SMI)
        self.tool("bin/squeue", SQUEUE)
        self.tool("bin/getent", "#!/bin/bash\nexit 0\n")
        self.tool("bin/scancel", '#!/bin/bash\necho "$@" >> "$T/scancel.seen"; exit 1\n')
        self.python("exit 0")
        self.script = Path(shutil.copy(ROOT / "launch/lvm_3b.sh", folder / "spool/slurm_script"))
        self.env = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "T": str(folder),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_NTASKS": "4",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "8",
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
    health, step = cluster.seen("srun.args").splitlines()
    assert "--ntasks=2 --ntasks-per-node=1" in health and health.endswith("launch/health.sh")
    assert "--kill-on-bad-exit=1 --open-mode=append" in step
    assert f"--output={cluster.run}/logs/%j-0-%t.log" in step
    assert "finished" in out and (cluster.run / "job").read_text() == "123456\n"


def test_srun_is_told_the_cores_of_a_task(cluster):
    """Since Slurm 22.05 it does not take them from the batch job by itself."""
    cluster.submit(SLURM_CPUS_PER_TASK="6", HEALTH="0")
    assert "--cpus-per-task=6 " in cluster.seen("srun.args")


def test_run_dir_defaults_to_the_recipe_in_the_checkout(cluster):
    checkout = cluster.folder / "checkout"
    shutil.copytree(ROOT / "launch", checkout / "launch")
    cluster.python("exit 7")
    code, _, _ = cluster.submit(RUN_DIR=None, LVM_ROOT=str(checkout), RECIPE="lvm_1b")
    assert "lvm_1b" in cluster.seen("python.seen") and (checkout / "runs/lvm_1b/logs").is_dir()
    assert code == 7


def test_cluster_env_is_read(cluster):
    checkout = cluster.folder / "checkout"
    shutil.copytree(ROOT / "launch", checkout / "launch")
    (checkout / "launch/cluster.env").write_text("CONTAINER=/images/lvm.sqsh\nMOUNTS=/scratch\n")
    cluster.tool("bin/python", PYTHON.replace("{body}", ""))
    cluster.submit(LVM_ROOT=str(checkout), ENV=None)
    assert "--container-image=/images/lvm.sqsh" in cluster.seen("srun.args")
    mounts = f"{checkout},{cluster.folder}/data,{cluster.run},/scratch"
    assert f"--container-mounts={mounts} " in cluster.seen("srun.args")
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


def test_outside_a_job_it_checks_and_starts_nothing(cluster):
    code, out, _ = cluster.submit(SLURM_JOB_ID=None)
    assert code == 0 and "nothing is missing for lvm_3b" in out
    code, _, err = cluster.submit(SLURM_JOB_ID=None, DATA=None)
    assert code == 2 and "DATA is not set" in err
    assert cluster.seen("srun.args") == "" and not (cluster.run / "job").exists()


def test_two_jobs_do_not_train_one_run(cluster):
    cluster.run.mkdir()
    (cluster.run / "job").write_text("99\n")
    code, _, err = cluster.submit()
    assert code == 2 and "job 99 is training" in err and cluster.seen("srun.args") == ""
    cluster.python('touch "$T/run/DONE"')
    code, _, _ = cluster.submit(STATE="CANCELLED")
    assert code == 0


def test_a_task_of_an_array_takes_its_line_of_the_sweep(cluster):
    cluster.run.mkdir()
    (cluster.run / "tasks.tsv").write_text("seed=1\t--seed 1\nseed=2\t--seed 2\n")
    array = {"SLURM_ARRAY_JOB_ID": "120", "SLURM_ARRAY_TASK_ID": "2", "RUN_DIR": None}
    cluster.python('touch "$T/run/seed=2/DONE"')
    code, out, _ = cluster.submit(SWEEP=str(cluster.run), EXTRA="--steps 5", **array)
    assert code == 0 and "seed=2 is finished" in out
    assert cluster.seen("python.seen").endswith(f"--out {cluster.run}/seed=2 --steps 5 --seed 2\n")
    assert (cluster.run / "seed=2/job").read_text() == "120_2\n"  # as squeue and scancel name it
    array["SLURM_ARRAY_TASK_ID"] = "3"
    code, _, err = cluster.submit(SWEEP=str(cluster.run), **array)
    assert code == 2 and "task 3 is not in" in err


SAVES = """
trap 'echo step-7 > "$T/run/latest"; exit 0' USR1
touch "$T/started"
while true; do read -t 0.05 <> <(:); done
"""


def signalled(cluster: Cluster, number: signal.Signals, **env: str | None) -> tuple[int, str, str]:
    """Send a signal to the script once its step runs."""
    (cluster.folder / "started").unlink(missing_ok=True)
    process = cluster.start(**env)
    deadline = time.monotonic() + 20
    while not (cluster.folder / "started").exists():
        assert time.monotonic() < deadline, "the step never started"
        time.sleep(0.01)
    if env.get("HELD"):
        (cluster.run / "CANCEL").touch()
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    return process.returncode, out, err


def test_usr1_saves_and_requeues(cluster):
    cluster.python(SAVES)
    code, out, _ = signalled(cluster, signal.SIGUSR1)
    assert code == 0 and "stopped at step-7 before the time limit; requeued" in out
    assert cluster.seen("scontrol.seen") == "requeue 123456\n"
    code, _, err = signalled(cluster, signal.SIGUSR1)  # step-7 again: nothing new
    assert code == 2 and "no checkpoint is newer than step-7" in err and "--save-every" in err
    assert cluster.seen("scontrol.seen") == "requeue 123456\n"


def test_term_of_a_scheduler_saves_and_requeues(cluster):
    """The tasks get USR1: of a second TERM, beside Slurm's own, the trainer would die."""
    cluster.python(SAVES)
    code, out, _ = signalled(cluster, signal.SIGTERM)
    assert code == 0 and "stopped at step-7 by the scheduler; requeued" in out
    assert cluster.seen("scancel.seen") == "--signal=USR1 123456\n"
    for time_ in (1, 2):  # nothing new is no fault of the run, but is counted
        code, out, _ = signalled(cluster, signal.SIGTERM, MAX_RESTARTS="2")
        assert code == 0 and f"requeued, {time_} of 2" in out
    code, _, err = signalled(cluster, signal.SIGTERM, MAX_RESTARTS="2")
    assert code == 1 and "after 2 requeues" in err
    assert cluster.seen("scontrol.seen") == "requeue 123456\n" * 3


def test_usr1_long_before_the_time_limit_is_a_preemption(cluster):
    cluster.python(SAVES)
    code, out, _ = signalled(cluster, signal.SIGUSR1, LEFT="1:04:59")
    assert code == 0 and "stopped at step-7 by the scheduler; requeued" in out


@pytest.mark.parametrize("state", ["RUNNING", "SIGNALING"])
def test_tasks_that_were_told_without_the_script_are_a_preemption(cluster, state):
    cluster.python('echo step-7 > "$T/run/latest"; exit 0')
    code, out, _ = cluster.submit(STATE=state, KILLED="1")
    assert code == 0 and "stopped at step-7 by the scheduler; requeued" in out
    assert cluster.seen("scontrol.seen") == "requeue 123456\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_job_that_slurm_is_ending_is_not_requeued(cluster, number):
    """Slurm would take a requeue after scancel, and bring back what a user has cancelled."""
    cluster.python(SAVES)
    code, out, _ = signalled(cluster, number, STATE="COMPLETING", KILLED="1")
    assert code == 0 and "Slurm ended this job at step-7" in out
    assert (cluster.folder / "killed").exists()
    assert cluster.seen("scontrol.seen") == ""


def test_a_run_that_was_told_to_end_is_not_requeued(cluster):
    cluster.python(SAVES)
    code, out, _ = signalled(cluster, signal.SIGUSR1, HELD="1")
    assert code == 0 and "cancelled at step-7" in out and not (cluster.run / "CANCEL").exists()
    assert cluster.seen("scontrol.seen") == ""


def test_a_failure_is_requeued_only_while_checkpoints_move_on(cluster):
    cluster.python('echo step-9 > "$T/run/latest"; exit 7')
    code, out, _ = cluster.submit()
    assert code == 0 and "failed with code 7 after step-9; requeued, 1 of 5" in out
    code, _, err = cluster.submit(SLURM_RESTART_COUNT="1")  # the same checkpoint as before
    assert code == 7 and "failed with code 7 at step-9, after 1 requeues" in err
    assert cluster.seen("scontrol.seen") == "requeue 123456\n"


def test_failures_are_counted_and_other_restarts_are_not(cluster):
    """A run of a month is requeued by its time limit every day; that is no failure."""
    body = 'n=$(ls "$T/run/logs" | wc -l); echo "step-$RANDOM$n" > "$T/run/latest"; exit 7'
    cluster.python(body)
    for time_ in (1, 2):
        code, out, _ = cluster.submit(SLURM_RESTART_COUNT="40", MAX_RESTARTS="2")
        assert code == 0 and f"requeued, {time_} of 2" in out
    code, _, err = cluster.submit(SLURM_RESTART_COUNT="42", MAX_RESTARTS="2")
    assert code == 7 and "after 2 requeues" in err
    (cluster.run / "job").unlink()
    code, out, _ = cluster.submit(SLURM_JOB_ID="123457")  # submitted again: a new count
    assert code == 0 and "requeued, 1 of 5" in out


def test_a_bad_node_is_named_and_left_out(cluster):
    cluster.tool(
        "bin/nvidia-smi",
        NVIDIA_SMI + '[[ $SLURMD_NODENAME != node8 ]] || echo "7, 3, 2, Active"\n',
    )
    code, out, _ = cluster.submit(EXCLUDED="node3")
    assert code == 0 and "health: node8 bad: GPU 7: 2 uncorrected memory errors" in out
    assert "health: node8 bad: GPU 7 is slowed down by heat" in out and "node7" not in out
    assert "the nodes node8 failed the health check; requeued, 1 of 5" in out
    assert cluster.seen("scontrol.seen") == (
        "requeue 123456\nupdate JobId=123456 ExcNodeList=node3,node8\n"
    )
    code, _, err = cluster.submit(MAX_RESTARTS="1")
    assert code == 1 and "the nodes node8 failed the health check, after 1 requeues" in err
    assert cluster.seen("python.seen") == ""
    cluster.python('touch "$T/run/DONE"')
    assert cluster.submit(HEALTH="0")[0] == 0


def test_a_node_that_does_not_answer_is_bad(cluster):
    code, out, _ = cluster.submit(ANSWER="node8")
    assert code == 0 and "the nodes node7 failed the health check; requeued" in out


@pytest.mark.parametrize(
    ("smi", "env", "message"),
    [
        ("echo 0, 3, 0, Not Active", {}, "1 of 8 GPUs answer"),
        ("echo no devices; exit 9", {}, "nvidia-smi failed: no devices"),
        ("echo 0, 9000, '[N/A]', Not Active", {}, "GPU 0: 9000 MiB are held by others"),
        ("echo 0, '[Unknown Error]', 0, Not Active", {}, "GPU 0 says [Unknown Error]"),
        ("exit 9", {"HEALTH_GPU": "0", "HEALTH_TMP_GIB": "9000000"}, "wanted 9000000"),
        ("exit 9", {"HEALTH_GPU": "0", "DATA": "/nowhere"}, "cannot read DATA=/nowhere/manifest"),
        ("exit 9", {"HEALTH_GPU": "0", "RUN_DIR": "/nowhere"}, "cannot write to RUN_DIR=/nowhere"),
        ("exit 9", {"HEALTH_GPU": "0", "ENV": "/nowhere"}, "no python in ENV=/nowhere"),
        ("exit 9", {"HEALTH_GPU": "0", "MASTER_ADDR": "node7"}, "does not know the host node7"),
    ],
)
def test_what_makes_a_node_bad(cluster, smi, env, message):
    cluster.tool("bin/nvidia-smi", f"#!/bin/bash\n{smi}\n")
    cluster.tool("bin/getent", "#!/bin/bash\nexit 2\n")
    (cluster.run / "logs").mkdir(parents=True)
    script = ["bash", ROOT / "launch/health.sh"]
    merged = {**cluster.env, "SLURMD_NODENAME": "node8", **env}
    done = subprocess.run(script, env=merged, capture_output=True, text=True)
    assert done.returncode == 1 and "health: node8 bad: " in done.stdout
    assert message in done.stdout
    merged |= cluster.env | {"HEALTH_GPU": "0", "HEALTH_TMP_GIB": "0"}
    merged.pop("MASTER_ADDR", None)
    done = subprocess.run(script, env=merged, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "health: node8 ok\n")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_a_script_trains_what_its_name_says_and_can_be_requeued(script):
    text = script.read_text()
    assert f"RECIPE=${{RECIPE:-{script.stem}}}" in text and script.stem in recipes()
    header = re.findall(r"^#SBATCH (\S+)", text, flags=re.M)
    wanted = {"--requeue", "--open-mode=append", "--signal=B:USR1@300", f"--job-name={script.stem}"}
    assert wanted <= set(header)
    assert not [h for h in header if "partition" in h or "account" in h]
    nodes, gpus = (int(re.search(rf"--{n}=(\d+)", text)[1]) for n in ("nodes", "gpus-per-node"))
    assert nodes * gpus == GPUS[script.stem] and f"{nodes * gpus} GPUs" in text
    run = recipe(script.stem)
    assert f"--ntasks-per-node={gpus}" in header and run.batch_rows % (nodes * gpus) == 0
    count = run.model.num_params(embeddings=run.patches is None)
    written = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.0f} M"
    assert f"{written} parameters" in text
    billions = run.steps * run.batch_rows * PER_ROW[script.stem.split("_")[0]] / 1e9
    said = re.search(r"parameters, (\d+(?:\.\d)?) B (tokens|images)", text)
    assert said is not None and float(said[1]) == pytest.approx(billions, rel=0.01)


def test_the_scripts_are_those_that_were_promised():
    assert {script.stem for script in SCRIPTS} == set(GPUS)


def test_distillation_takes_its_teacher_from_the_environment(cluster):
    shutil.copy(ROOT / "launch/delvm_300m_kd.sh", cluster.script)
    code, _, err = cluster.submit()
    assert code == 2 and "neither TEACHER nor LOGITS is set" in err
    code, _, err = cluster.submit(TEACHER="runs/t", TOKENIZER="tok", EXTRA="--seed 7")
    assert code == 0, err
    seen = cluster.seen("python.seen")
    assert "delvm_300m_kd" in seen
    assert "--codebook tok --distil.teacher runs/t --seed 7" in seen
    code, _, err = cluster.submit(LOGITS="logits", TEACHER="runs/t")
    assert code == 0, err
    assert "--distil.logits logits" in cluster.seen("python.seen")
    assert "--distil.teacher" not in cluster.seen("python.seen")
