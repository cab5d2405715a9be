"""The launch scripts under a real Slurm: two emulated nodes on this machine, fake GPUs, gloo.

The first tests train; the later ones are about the scripts alone and put a few lines of bash where
the trainer is. About two minutes, of which half are starts of torch and half a minute is Slurm's
own time to miss a dead node. Waits are for marks in files; the seconds beside them are only bounds.
"""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lvm.checkpoint import load_model_state

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(p.name for p in (ROOT / "launch").glob("*.sh") if "#SBATCH" in p.read_text())

pytestmark = pytest.mark.slow

# 150 updates of two ranks, each with a line of metrics; a checkpoint every 10.
TINY = (
    "--device cpu --precision fp32 --batch-rows 4 --steps 150 --save-every 10 --log-every 1"
    " --model.width 16 --model.ffn 32 --model.layers 1 --workers 1"
)


@pytest.fixture(scope="session")
def training(tmp_path_factory):
    """The variables of a small run on shards of this test."""
    data = tmp_path_factory.mktemp("data") / "shards"
    runpy.run_path(str(ROOT / "tests/lvm/conftest.py"))["write_data"](data)
    return {
        "RECIPE": "tiny", "DATA": str(data), "ENV": sys.prefix, "EXTRA": TINY,
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip


@pytest.fixture(scope="session")
def unbroken(slurm, submit, training, tmp_path_factory):
    """The same run, left alone."""
    job = submit(tmp_path_factory.mktemp("unbroken"), **training)
    assert slurm.ended(job.id) == "COMPLETED", job.text
    assert len(job.nodes()) == 1
    return job.run


def learnt(run):
    """What a run has learnt from which samples: a line an update, and the last checkpoint's own."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "samples", "tokens", "loss", "nll", "accuracy", "lr", "grad_norm")
    name = (run / "latest").read_text().strip()
    trainer = json.loads((run / "checkpoints" / name / "trainer.json").read_text())
    return [tuple(line[key] for key in keys) for line in lines], {
        key: trainer[key] for key in ("step", "samples", "tokens", "phases")
    }


def assert_same_run(run, unbroken):
    """Bit by bit: at the same number of ranks the same samples are added up in the same order."""
    lines, trainer = learnt(run)
    assert [line[0] for line in lines] == list(range(1, 151))
    assert (lines, trainer) == learnt(unbroken)
    mine, theirs = load_model_state(run), load_model_state(unbroken)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_every_script_is_accepted(slurm):
    assert len(SCRIPTS) == 9
    for name in SCRIPTS:
        nodes = 1 if name == "build_array.sh" else 2
        slurm.call("sbatch", "--test-only", f"--nodes={nodes}", f"launch/{name}")


def test_the_scripts_are_clean():
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck here: apt-get install shellcheck")
    names = [*SCRIPTS, "health.sh"]  # and, with -x, what they source
    command = ["shellcheck", "-x", "-S", "warning", *(f"launch/{name}" for name in names)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_run_stopped_by_the_time_limit_ends_as_an_unbroken_one(
    slurm, submit, training, unbroken, tmp_path
):
    job = submit(tmp_path, **training)
    job.reached(10)
    slurm.call("scancel", "--batch", "--signal=USR1", job.id)  # as --signal=B:USR1@300 does
    assert slurm.ended(job.id) == "COMPLETED", job.text
    assert "before the time limit; requeued" in job.text and len(job.nodes()) == 2
    logs = {path.name for path in (job.run / "logs").iterdir()}
    assert {f"{job.id}-{start}-{rank}.log" for start in (0, 1) for rank in (0, 1)} <= logs
    first = (job.run / "logs" / f"{job.id}-0-0.log").read_text()
    assert "told to stop; the same command goes on" in first
    assert_same_run(job.run, unbroken)


def test_a_run_whose_node_dies_ends_as_an_unbroken_one(slurm, submit, training, unbroken, tmp_path):
    """Slurm itself requeues it when it has missed the node; the script must let it."""
    job = submit(tmp_path, **training)
    job.reached(10)
    slurm.local("crash-node", "node2")
    slurm.wait("the job waits again", lambda: slurm.state(job.id) == "PENDING")
    slurm.local("start-node", "node2")
    assert slurm.ended(job.id) == "COMPLETED", job.text
    assert len(job.nodes()) == 2
    assert_same_run(job.run, unbroken)


# The scripts without a trainer


@pytest.fixture
def standing_in(tmp_path):
    """Return a function that makes a job's variables with a trainer of a few lines of bash."""

    def make(name: str, body: str) -> dict[str, str]:
        path = tmp_path / name / "bin/python"
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data/manifest.json").touch()
        return {"ENV": str(tmp_path / name), "DATA": str(tmp_path / "data")}

    return make


# Saves when it is told to; a run that has been stopped before ends at once.
SAVES = """
if [[ -f $RUN_DIR/latest ]]; then touch "$RUN_DIR/DONE"; exit; fi
trap 'echo step-7 > "$RUN_DIR/latest"; exit 0' USR1 TERM
touch "$RUN_DIR/started"
while true; do read -t 0.05 <> <(:); done
"""


def test_every_task_knows_its_place(slurm, submit, standing_in, tmp_path):
    """All wait for the last one, since the end of one task may be the end of the job."""
    body = """
    echo "$RANK/$WORLD_SIZE $LOCAL_RANK $(hostname) $MASTER_ADDR $CUDA_VISIBLE_DEVICES" \\
        > "$RUN_DIR/rank-$RANK"
    touch "$RUN_DIR/ready-$RANK"
    until [[ $(ls "$RUN_DIR"/ready-* | wc -l) == 4 ]]; do read -t 0.05 <> <(:); done
    touch "$RUN_DIR/DONE"
    """
    job = submit(tmp_path, tasks=2, **standing_in("env", body))
    assert slurm.ended(job.id) == "COMPLETED", job.text
    assert [(job.run / f"rank-{rank}").read_text() for rank in range(4)] == [
        f"{rank}/4 {rank % 2} node{1 + rank // 2} node1 0,1\n" for rank in range(4)
    ]


def test_a_bad_node_is_named_and_left_out(slurm, submit, standing_in, tmp_path):
    env = standing_in("env", 'touch "$RUN_DIR/DONE"')
    smi = tmp_path / "bin/nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(
        "#!/bin/bash\n"
        "errors=0; [[ $SLURMD_NODENAME != node1 ]] || errors=4\n"
        'echo "0, 3, $errors, Not Active"\n'
    )
    smi.chmod(0o755)
    path = f"{smi.parent}:{slurm.env['PATH']}"
    job = submit(tmp_path / "job", nodes=1, PATH=path, HEALTH_GPU="1", **env)
    assert slurm.ended(job.id) == "COMPLETED", job.text
    assert "health: node1 bad: GPU 0: 4 uncorrected memory errors" in job.text
    assert "the nodes node1 failed the health check; requeued, 1 of 5" in job.text
    assert job.nodes() == ["node1", "node2"] and (job.run / "DONE").exists()


def test_a_crash_loop_stops(slurm, submit, standing_in, tmp_path):
    """At the bound while checkpoints move on, and at once where none is new. Both run at once."""
    moves = 'echo "step-$RANDOM$SLURM_RESTART_COUNT" > "$RUN_DIR/latest"; exit 7'
    moving = submit(tmp_path / "moving", nodes=1, MAX_RESTARTS="2", **standing_in("env1", moves))
    stuck = submit(tmp_path / "stuck", nodes=1, MAX_RESTARTS="2", **standing_in("env2", "exit 7"))
    assert slurm.ended(stuck.id) == slurm.ended(moving.id) == "FAILED"
    assert len(stuck.nodes()) == 1 and "after 0 requeues" in stuck.text
    assert len(moving.nodes()) == 3 and "after 2 requeues" in moving.text


def test_a_preempted_job_comes_back_and_a_cancelled_one_does_not(
    slurm, submit, standing_in, tmp_path
):
    env = standing_in("env", SAVES)
    cancelled = submit(tmp_path / "cancelled", nodes=1, **env)
    preempted = submit(tmp_path / "preempted", nodes=1, **env)
    for job in (cancelled, preempted):
        slurm.wait(f"{job.run} starts", (job.run / "started").exists)
    slurm.call("scancel", cancelled.id)
    assert slurm.ended(cancelled.id) == "CANCELLED"
    # A job of a partition with a higher tier needs both nodes. Jobs of `main` have 20 s of grace,
    # in which Slurm tells the tasks alone. They save; the script must requeue: Slurm does that only
    # to jobs that use up their grace, and calls the others finished.
    urgent = slurm.call(
        "sbatch", "--parsable", "-p", "urgent", "--nodes=2", "--exclusive", "--output=/dev/null",
        "--wrap", "true",
    ).strip()  # fmt: skip
    assert slurm.ended(urgent) == "COMPLETED"
    assert slurm.ended(preempted.id) == "COMPLETED"
    assert "stopped at step-7 by the scheduler; requeued" in preempted.text
    assert len(preempted.nodes()) == 2 and (preempted.run / "DONE").exists()
    assert len(cancelled.nodes()) == 1 and slurm.state(cancelled.id) == "CANCELLED"


def test_submit_status_and_cancel(slurm, standing_in, tmp_path):
    env = standing_in("env", SAVES)
    run = tmp_path / "run"
    slurm.launch(
        "submit", "lvm_3b", "--nodes", "1", "--gpus-per-node", "1", "--cpus-per-task", "1",
        "--run-dir", str(run), HEALTH_GPU="0", **env,
    )  # fmt: skip
    slurm.wait(f"{run} starts", (run / "started").exists)
    job = (run / "job").read_text().strip()
    assert f"{job} running" in " ".join(slurm.launch("status", str(run)).split())
    assert f"job {job} saves and ends" in slurm.launch("cancel", str(run))
    assert slurm.ended(job) == "COMPLETED"
    assert (run / "latest").read_text() == "step-7\n" and not (run / "CANCEL").exists()
    log = (run / f"logs/lvm_3b-{job}.log").read_text()
    assert "cancelled at step-7; submit again to go on" in log and "requeued" not in log
    assert f"{job} stopped" in " ".join(slurm.launch("status", str(run)).split())


def test_a_sweep_runs_each_combination(slurm, standing_in, tmp_path):
    env = standing_in("env", 'echo "$@" > "$RUN_DIR/args"; touch "$RUN_DIR/DONE"')
    sweep = tmp_path / "sweep"
    slurm.launch(
        "sweep", "lvm_300m", "--gpus-per-node", "1", "--run-dir", str(sweep),
        "--vary", "seed=1,2", HEALTH_GPU="0", **env,
    )  # fmt: skip
    array = (sweep / "seed=1/job").read_text().partition("_")[0]
    for task in (1, 2):
        assert slurm.ended(f"{array}_{task}") == "COMPLETED"
        args = (sweep / f"seed={task}/args").read_text()
        assert args.endswith(f"--out {sweep}/seed={task} --seed {task}\n")
    assert slurm.launch("status", str(sweep)).count("finished") == 2
