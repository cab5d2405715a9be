"""The scripts that build shards run against stand-ins for srun and scontrol; no Slurm is needed."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ("build_array", "build_ray")

SRUN = """#!/bin/bash
echo "$@" > "$T/srun.args"
while [[ $1 == --* ]]; do shift; done
setsid "$@" &
trap 'kill -- -$!' TERM  # a signal goes to all processes of a step
wait $!
"""
RAY = """#!/bin/bash
echo "$RAY_ADDRESS $RAY_AUTH_MODE ${#RAY_AUTH_TOKEN} $RAY_USAGE_STATS_ENABLED $@" > "$T/ray.seen"
while [[ $1 != -- ]]; do shift; done
shift
exec "$@"
"""
PYTHON = """#!/bin/bash
echo "$@" > "$T/python.seen"
{body}
"""


class Cluster:
    """A folder with stand-ins on PATH, a spec, a tokenizer, an environment, and spooled scripts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "shards"
        for name in ("bin", "tok", "env/bin", "spool"):
            (folder / name).mkdir(parents=True)
        (folder / "mix.toml").touch()
        self.tool("bin/srun", SRUN)
        self.tool(
            "bin/scontrol",
            '#!/bin/bash\nif [[ $1 == show ]]; then printf "node7\\nnode8\\n"; '
            'else echo "$@" >> "$T/scontrol.seen"; fi\n',
        )
        self.tool("bin/getent", '#!/bin/bash\nprintf "127.0.1.1 STREAM $2\\n10.1.2.7 STREAM\\n"\n')
        self.tool("env/bin/ray", RAY)
        self.python("exit 0")
        for name in SCRIPTS:
            shutil.copy(ROOT / f"launch/{name}.sh", folder / "spool" / name)
        self.env = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "T": str(folder),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "6",
            "SPEC": str(folder / "mix.toml"),
            "TOKENIZER": str(folder / "tok"),
            "OUT": str(self.out),
            "ENV": str(folder / "env"),
        }

    def tool(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def python(self, body: str) -> None:
        self.tool("env/bin/python", PYTHON.replace("{body}", body))

    def start(self, script: str, **env: str | None) -> subprocess.Popen[str]:
        merged = {k: v for k, v in {**self.env, **env}.items() if v is not None}
        pipe = subprocess.PIPE
        command = ["bash", str(self.folder / "spool" / script)]
        return subprocess.Popen(command, env=merged, cwd="/", stdout=pipe, stderr=pipe, text=True)

    def submit(self, script: str, **env: str | None) -> tuple[int, str, str]:
        process = self.start(script, **env)
        out, err = process.communicate(timeout=30)
        return process.returncode, out, err

    def seen(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def task(number: int, count: int) -> dict[str, str | None]:
    return {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_COUNT": str(count)}


def test_a_task_of_an_array_builds_its_part(cluster):
    code, out, err = cluster.submit("build_array", **task(3, 64), EXTRA="--batch 8 --shard-rows 9")
    assert (code, err) == (0, "") and "part 3 of 64" in out and "done" in out
    f = cluster.folder
    assert cluster.seen("python.seen") == (
        f"-m visual_sentences.build {f}/mix.toml --out {f}/shards --tokenizer {f}/tok"
        " --batch 8 --shard-rows 9 --part 3/64\n"
    )
    assert "--cpus-per-task=6" in cluster.seen("srun.args")
    assert not list((cluster.out / "logs").iterdir())


def test_without_an_array_it_seals(cluster):
    code, _, _ = cluster.submit("build_array")
    assert code == 0 and "--part" not in cluster.seen("python.seen")


def test_some_parts_again_need_to_know_of_how_many(cluster):
    code, _, err = cluster.submit("build_array", **task(17, 2))
    assert code == 2 and "task 17 of 2; wanted --array=1-2, or PARTS=n" in err
    assert cluster.seen("srun.args") == ""
    code, _, _ = cluster.submit("build_array", **task(17, 2), PARTS="64")
    assert code == 0 and cluster.seen("python.seen").endswith("--part 17/64\n")
    code, _, err = cluster.submit("build_array", **task(0, 4))
    assert code == 2 and "task 0 of 4" in err


def test_ray_starts_on_every_node_and_the_build_knows_where(cluster):
    code, out, err = cluster.submit("build_ray", EXTRA="--device cuda")
    assert (code, err) == (0, ""), out
    srun = cluster.seen("srun.args")
    assert "--nodes=2 --ntasks-per-node=1" in srun and "--kill-on-bad-exit=1" in srun
    # Not 127.0.1.1, by which a node may know itself; 20000 + 123456 % 10000.
    assert cluster.seen("ray.seen").startswith(
        "10.1.2.7:23456 token 64 0 symmetric-run --address 10.1.2.7:23456 --min-nodes 2"
        " --num-cpus 6 -- "
    )
    assert cluster.seen("python.seen").endswith("/tok --device cuda --engine ray\n")


def test_a_name_that_is_known_on_the_node_alone_is_replaced(cluster):
    cluster.tool("bin/getent", '#!/bin/bash\necho "127.0.1.1 STREAM node7"\n')
    cluster.tool("bin/hostname", '#!/bin/bash\n[[ $1 == -I ]] && echo "10.9.9.9 172.17.0.1 "\n')
    cluster.submit("build_ray")
    assert cluster.seen("ray.seen").startswith("10.9.9.9:23456 ")


def test_a_cluster_that_did_not_start_is_no_success(cluster):
    """ray symmetric-run exits with 0 where Ray does not start on the first node."""
    cluster.tool("env/bin/ray", "#!/bin/bash\necho 'Failed to start Ray'\nexit 0\n")
    code, _, err = cluster.submit("build_ray")
    assert code == 1 and "failed with code 1 at 0 units" in err


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SPEC": None}, "SPEC is not set"),
        ({"SPEC": "/nowhere"}, "there is no spec SPEC=/nowhere"),
        ({"OUT": None}, "OUT is not set"),
        ({"TOKENIZER": None}, 'TOKENIZER is not set; give its folder, or EXTRA="--images"'),
        ({"TOKENIZER": "/nowhere"}, "there is no folder TOKENIZER=/nowhere"),
        ({"ENV": None}, "neither ENV"),
        ({"ENV": "/nowhere"}, "no python in ENV=/nowhere"),
        ({"SLURM_SUBMIT_DIR": "/nowhere"}, "submit from the checkout, or set LVM_ROOT"),
    ],
)
def test_what_is_missing_fails_before_anything_starts(cluster, script, change, message):
    code, _, err = cluster.submit(script, **change)
    assert code == 2 and message in err
    assert cluster.seen("srun.args") == ""


def test_no_ray_in_the_environment_fails_before_anything_starts(cluster):
    (cluster.folder / "env/bin/ray").unlink()
    code, _, err = cluster.submit("build_ray")
    assert code == 2 and "pip install 'large-vision-models[ray]'" in err
    assert cluster.seen("srun.args") == ""


def test_images_need_no_tokenizer(cluster):
    code, _, _ = cluster.submit("build_array", TOKENIZER=None, EXTRA="--images")
    assert code == 0 and cluster.seen("python.seen").endswith("shards --images\n")


def test_cluster_env_is_read_and_a_container_used(cluster):
    checkout = cluster.folder / "checkout"
    shutil.copytree(ROOT / "launch", checkout / "launch")
    (checkout / "launch/cluster.env").write_text("CONTAINER=/images/lvm.sqsh\nMOUNTS=/photos\n")
    cluster.tool("bin/python", PYTHON.replace("{body}", ""))
    code, _, _ = cluster.submit("build_array", LVM_ROOT=str(checkout), ENV=None)
    assert code == 0 and "--container-image=/images/lvm.sqsh" in cluster.seen("srun.args")
    mounts = f"{checkout},{cluster.out},{cluster.folder}/tok,/photos"
    assert f"--container-mounts={mounts} " in cluster.seen("srun.args")


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_time_limit_requeues_while_units_get_finished(cluster, script):
    cluster.python(
        'touch "$OUT/photos-train-0000$(ls "$OUT" | wc -l).json" "$T/started"\n'
        "while true; do read -t 0.05 <> <(:); done"
    )
    assert at_the_time_limit(cluster, script)[0] == 0
    assert cluster.seen("scontrol.seen") == "requeue 123456\n"
    cluster.python('touch "$T/started"\nwhile true; do read -t 0.05 <> <(:); done')
    code, err = at_the_time_limit(cluster, script)
    assert code == 2 and "no unit was finished within the time limit" in err
    assert cluster.seen("scontrol.seen") == "requeue 123456\n"


def at_the_time_limit(cluster: Cluster, script: str) -> tuple[int, str]:
    (cluster.folder / "started").unlink(missing_ok=True)
    process = cluster.start(script)
    deadline = time.monotonic() + 20
    while not (cluster.folder / "started").exists():
        assert time.monotonic() < deadline, "the step never started"
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=20)
    return process.returncode, err


def test_a_stop_is_neither_success_nor_requeued(cluster):
    """Success would let a job start that waits for all parts."""
    cluster.python('touch "$T/started"\nwhile true; do read -t 0.05 <> <(:); done')
    process = cluster.start("build_array", **task(1, 2))
    deadline = time.monotonic() + 20
    while not (cluster.folder / "started").exists():
        assert time.monotonic() < deadline, "the step never started"
        time.sleep(0.01)
    process.terminate()
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 143 and "submit again to go on" in out
    assert cluster.seen("scontrol.seen") == ""


def test_a_failure_is_requeued_only_while_units_get_finished(cluster):
    cluster.python('touch "$OUT/depth-train-00001.json"; exit 1')
    code, out, _ = cluster.submit("build_array")
    assert code == 0 and "failed with code 1 at 1 units; requeued" in out
    code, _, err = cluster.submit("build_array")  # nothing new
    assert code == 1 and "failed with code 1 at 1 units" in err
    cluster.python('touch "$OUT/depth-train-00002.json"; exit 1')
    code, _, _ = cluster.submit("build_array", SLURM_RESTART_COUNT="5")
    assert code == 1
    cluster.python('touch "$OUT/depth-train-00003.json"; exit 2')
    code, _, _ = cluster.submit("build_array")  # wrong options do not get better
    assert code == 2
    assert cluster.seen("scontrol.seen") == "requeue 123456\n"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_can_be_requeued_and_names_no_partition(name):
    text = (ROOT / f"launch/{name}.sh").read_text()
    header = set(re.findall(r"^#SBATCH (\S+)", text, flags=re.M))
    assert {"--requeue", "--open-mode=append", "--signal=B:USR1@60", f"--job-name={name}"} <= header
    assert not [h for h in header if "partition" in h or "account" in h or "--array" in h]
    assert ("--exclusive" in header) == (name == "build_ray")  # `ray stop` spares no job beside it
