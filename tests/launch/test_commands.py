"""python -m launch against stand-ins for sbatch, squeue and scancel; no Slurm is needed."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from launch.__main__ import PROG, main
from launch.runs import find, last_train_line, standing, table
from launch.script import ROOT, Job, render
from launch.slurm import Queued
from launch.sweep import combinations, name_of, options_of
from lvm.recipes import recipes
from tokenizer.cli import InputError, guarded

GOLDEN = Path(__file__).parent / "golden"


def tool(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def login(tmp_path, monkeypatch):
    """A login node: stand-ins on PATH, shards, an environment; returns its folder."""
    for name in list(os.environ):
        if name.startswith(("SLURM", "SBATCH")) or name in {"CONTAINER", "SWEEP", "RECIPE"}:
            monkeypatch.delenv(name)
    tool(tmp_path / "bin/sbatch", 'echo "$PWD $@" >> "$T/sbatch.seen"; echo "321;cluster"')
    tool(tmp_path / "bin/squeue", 'echo "$@" >> "$T/squeue.seen"; cat "$T/queue" 2>/dev/null; true')
    tool(tmp_path / "bin/scancel", 'echo "$@" >> "$T/scancel.seen"')
    tool(tmp_path / "env/bin/python", "exit 0")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/manifest.json").write_text("{}")
    for name in ("DATA", "RUN_DIR", "EXTRA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("T", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("ENV", str(tmp_path / "env"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def seen(folder: Path, name: str) -> list[str]:
    path = folder / f"{name}.seen"
    return path.read_text().splitlines() if path.exists() else []


def write_run(folder: Path, *, step: int = 30, seconds: float = 0.0, job: str = "321") -> Path:
    """A run folder as the trainer leaves it: 100 updates of 64 tokens, 32 tokens a second."""
    (folder / "logs").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"steps": 100, "seconds": seconds}))
    (folder / "lvm.json").write_text("{}")
    (folder / "environment.json").write_text("[{}, {}]")
    line = {"step": step, "split": "train", "tokens": step * 64, "loss": 2.5, "tokens_per_s": 32.0}
    lines = [{**line, "elapsed": 60.0}, {"step": step, "split": "val", "nll": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"st')
    if job:
        (folder / "job").write_text(job + "\n")
    return folder


# render


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("lvm_3b", []),
        ("lvm_7b", ["--nodes", "4", "--time", "2-00:00:00", "--partition", "gpu", "--account", "v",
                    "--data", "/shared/uvd", "--run-dir", "/shared/runs/a run",
                    "--sbatch", "qos=high", "exclude=node7", "--",
                    "--optim.lr", "1e-4", "--steps", "1000"]),
        ("tiny", ["--gpus-per-node", "0", "--tasks-per-node", "2", "--cpus-per-task", "1"]),
    ],
)  # fmt: skip
def test_rendered_scripts_are_as_they_were(login, capsys, name, args):
    """Change the golden files with the scripts: REWRITE=1 python -m pytest tests/launch."""
    main(["render", name, *args])
    text = capsys.readouterr().out.replace(str(ROOT), "/CHECKOUT")
    path = GOLDEN / f"{name}.sh"
    if os.environ.get("REWRITE"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", sorted(recipes()))
def test_every_recipe_renders_to_a_script_that_bash_reads(login, name):
    text = render(Job(recipe=name))
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert f"#SBATCH --job-name={name}\n" in text and f"export RECIPE={name}\n" in text


def test_a_rendered_script_does_what_the_committed_one_does(login):
    """Equal but for the header's values, the comments and what it exports."""

    def code(text: str) -> list[str]:
        skipped = ("#", "export ", "RECIPE=")
        return [line for line in text.splitlines() if line and not line.startswith(skipped)]

    committed = (ROOT / "launch/lvm_3b.sh").read_text()
    assert code(render(Job(recipe="lvm_3b"))) == code(committed) != []
    header = [line for line in committed.splitlines() if line.startswith("#SBATCH")]
    assert [x for x in render(Job(recipe="lvm_3b")).splitlines() if x.startswith("#SB")] == header


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["lvm_3"], "no recipe 'lvm_3'; did you mean lvm_3b"),
        (["lvm_3b", "--nodes", "3"], "512 rows does not divide over 24 ranks"),
        (["lvm_3b", "--gpus-per-node", "0"], "give --tasks-per-node N"),
        (["lvm_3b", "--sbatch", "Q!"], "--sbatch Q! is no option"),
        (["lvm_3b", "--", "--data", "/a b"], "'/a b' has a space or a wildcard"),
    ],
)
def test_what_cannot_be_rendered_says_why(login, args, message):
    with pytest.raises(InputError) as error:
        main(["render", *args])
    assert message in str(error.value)


# submit


def test_submit_checks_writes_and_submits(login, capsys):
    main(
        [
            "submit",
            "lvm_3b",
            "--nodes",
            "2",
            "--data",
            "data",
            "--run-dir",
            "run",
            "--",
            "--seed",
            "7",
        ]
    )
    script = (login / "run/job.sh").read_text()
    assert f"export DATA={login}/data\n" in script and "export EXTRA='--seed 7'\n" in script
    assert seen(login, "sbatch") == [f"{login}/run/logs --parsable {login}/run/job.sh"]
    assert (login / "run/job").read_text() == "321\n"
    assert "job 321" in capsys.readouterr().out


def test_the_variables_of_sbatch_are_taken_too(login, monkeypatch):
    monkeypatch.setenv("DATA", str(login / "data"))
    monkeypatch.setenv("RUN_DIR", str(login / "other"))
    monkeypatch.setenv("EXTRA", "--seed 7")
    monkeypatch.setenv("SLURM_JOB_ID", "5")  # an interactive job, from which another is submitted
    main(["submit", "lvm_3b"])
    assert "export EXTRA='--seed 7'\n" in (login / "other/job.sh").read_text()


@pytest.mark.parametrize(
    ("args", "env", "message"),
    [
        ([], {}, "DATA is not set"),
        (["--data", "nowhere"], {}, "no manifest.json in DATA="),
        (["--data", "data"], {"ENV": ""}, "neither ENV (a virtual environment) nor CONTAINER"),
        (["--data", "data"], {"ENV": "/nowhere"}, "no python in ENV=/nowhere"),
        (["--data", "data", "--", "--batch-rows", "100"], {}, "100 rows does not divide"),
    ],
)
def test_what_is_missing_is_found_before_anything_waits(login, monkeypatch, args, env, message):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as error:
        main(["submit", "lvm_3b", "--run-dir", "run", *args])
    assert message in str(error.value) and not seen(login, "sbatch")


def test_a_wrong_option_of_the_trainer_is_found_before_anything_waits(login, capsys):
    with pytest.raises(SystemExit) as error:
        main(["submit", "lvm_3b", "--data", "data", "--", "--optim.lrr", "1"])
    assert error.value.code == 2 and "--optim.lr" in capsys.readouterr().err
    assert not seen(login, "sbatch")


def test_a_run_in_the_queue_is_not_submitted_twice(login):
    args = ["submit", "lvm_3b", "--data", "data", "--run-dir", "run"]
    main(args)
    (login / "queue").write_text("321|PENDING|Priority|1-00:00:00\n")
    with pytest.raises(InputError, match=r"has job 321 in the queue \(pending \(Priority\)\)"):
        main(args)
    (login / "queue").write_text("321|CANCELLED|None|0:00\n")
    main(args)
    assert len(seen(login, "sbatch")) == 2


def test_a_finished_run_is_not_submitted(login, capsys):
    write_run(login / "run")
    (login / "run/DONE").touch()
    main(["submit", "lvm_3b", "--data", "data", "--run-dir", "run"])
    assert "is finished; nothing to do" in capsys.readouterr().out and not seen(login, "sbatch")


def test_without_slurm_submit_says_so(login, monkeypatch):
    (login / "bin/sbatch").unlink()
    monkeypatch.setenv("PATH", f"{login / 'bin'}:/usr/bin:/bin")
    for name in ("squeue", "scancel"):
        (login / "bin" / name).unlink()
    monkeypatch.setattr("launch.slurm.shutil.which", lambda name: None)
    with pytest.raises(InputError, match="there is no sbatch here"):
        main(["submit", "lvm_3b", "--data", "data", "--run-dir", "run"])


# status and cancel


def test_a_run_says_where_it_stands(tmp_path):
    run = write_run(tmp_path / "run")
    found = standing(run, Queued(state="RUNNING", reason="None", left="20:00"))
    # 70 updates of 64 tokens are left, at 32 tokens a second
    assert (found.step, found.steps, found.left, found.starts) == (30, 100, 140.0, 2)
    head, line = table([found]).splitlines()
    assert " ".join(head.split()) == "run job state step loss tokens/s left limit starts"
    assert line.split()[1:] == ["321", "running", "30/100", "2.5000", "32", "2:20", "20:00", "2"]
    assert standing(run, Queued(state="PENDING", reason="Priority", left="")).state == (
        "pending (Priority)"
    )
    assert standing(run, Queued(state="FAILED", reason="", left="")).state == "stopped"
    (run / "DONE").touch()
    assert standing(run, None).state == "finished"


def test_a_run_bounded_by_time_has_what_is_left_of_it(tmp_path):
    assert standing(write_run(tmp_path / "run", seconds=100.0), None).left == 40.0


def test_a_run_that_has_not_started_has_no_figures(tmp_path):
    (tmp_path / "job").write_text("321\n")
    found = standing(tmp_path, None)
    assert (found.step, found.left, found.starts, found.state) == (None, None, 0, "stopped")
    assert table([found]).splitlines()[1].split()[1:] == ["321", "stopped", *"-----", "0"]


def test_the_last_line_of_a_long_log_is_found_from_its_end(tmp_path):
    lines = [json.dumps({"step": i, "split": "train"}) for i in range(5000)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines))
    assert last_train_line(path, size=100) == {"step": 4999, "split": "train"}
    assert last_train_line(tmp_path / "none") is None


def test_runs_are_found_below_a_folder_and_other_folders_are_not(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/config.json").write_text("{}")
    runs = [write_run(tmp_path / name) for name in ("a", "sweep/b", "sweep/c")]
    assert find([tmp_path]) == runs and find([runs[1], tmp_path / "sweep"]) == runs[1:]
    with pytest.raises(InputError, match="holds no run"):
        find([tmp_path / "tokenizer"])


def test_status_asks_slurm_once(login, capsys):
    write_run(login / "runs/a", job="321")
    write_run(login / "runs/b", job="300_2")
    write_run(login / "runs/c", job="")
    (login / "queue").write_text("321|RUNNING|None|20:00\n300_2|PENDING|Resources|1:00:00\n")
    main(["status"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines[1:]] == ["running", "pending", "stopped"]
    # -r: a waiting task of an array has a line of its own
    assert [x.split(" -o ")[0] for x in seen(login, "squeue")] == ["-h -r -t all -j 321,300_2"]


def test_a_job_that_slurm_has_forgotten_is_stopped(login, capsys):
    write_run(login / "runs/a")
    tool(login / "bin/squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    main(["status", "runs/a"])
    assert "stopped" in capsys.readouterr().out


def test_cancel_lets_a_job_save_first(login, capsys):
    for name, job in (("a", "1"), ("b", "2"), ("c", "3")):
        write_run(login / "runs" / name, job=job)
    (login / "queue").write_text("1|RUNNING|None|20:00\n2|PENDING|Priority|1:00:00\n")
    main(["cancel", "runs"])
    assert seen(login, "scancel") == ["--batch --signal=USR1 1", "2"]
    assert (login / "runs/a/CANCEL").exists() and not (login / "runs/b/CANCEL").exists()
    assert "runs/c has no job in the queue" in capsys.readouterr().out
    main(["cancel", "runs/a", "--now"])
    assert seen(login, "scancel")[-1] == "1"


# sweep


def test_a_sweep_combines_all_values():
    found = combinations(["optim.lr=1e-4,3e-4", "seed=1,2"])
    assert [name_of(values) for values in found] == [
        "optim.lr=1e-4,seed=1", "optim.lr=1e-4,seed=2", "optim.lr=3e-4,seed=1",
        "optim.lr=3e-4,seed=2",
    ]  # fmt: skip
    assert options_of(found[0]) == ["--optim.lr", "1e-4", "--seed", "1"]


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ([], "--vary is missing"),
        (["seed"], "wanted option=value"),
        (["seed=1,"], "wanted option=value"),
        (["seed=a/b"], "'a/b' cannot be part of a folder's name"),
        (["seed=1,1"], "there twice"),
        (["seed=1", "seed=2"], "there twice"),
    ],
)
def test_what_is_no_sweep_says_why(vary, message):
    with pytest.raises(InputError, match=message):
        combinations(vary)


def test_a_sweep_is_one_array_with_a_folder_a_run(login, capsys):
    args = ["sweep", "lvm_300m", "--data", "data", "--run-dir", "s", "--at-once", "1"]
    main([*args, "--vary", "seed=1,2", "--dry-run"])
    assert capsys.readouterr().out == "seed=1\nseed=2\n" and not seen(login, "sbatch")
    main([*args, "--vary", "seed=1,2", "--", "--steps", "5"])
    script = (login / "s/job.sh").read_text()
    assert "#SBATCH --array=1-2%1\n" in script and f"export SWEEP={login}/s\n" in script
    assert "RUN_DIR" not in script and "export EXTRA='--steps 5'\n" in script
    assert (login / "s/tasks.tsv").read_text() == "seed=1\t--seed 1\nseed=2\t--seed 2\n"
    assert (login / "s/seed=2/job").read_text() == "321_2\n"
    with pytest.raises(InputError, match="lists other runs"):
        main([*args, "--vary", "seed=1,2,3"])
    with pytest.raises(SystemExit):  # no such option of the trainer
        main([*args, "--vary", "sead=1,2"])
    assert len(seen(login, "sbatch")) == 1


def test_the_command_ends_with_code_2_and_no_traceback(tmp_path, capsys):
    assert guarded(lambda: main(["status", str(tmp_path)]), prog=PROG) == 2
    assert capsys.readouterr().err.startswith("python -m launch: ")
