"""Processes of their own for what triton decides at import: interpreting and compiling."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run_python(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python on the checkout with no TRITON_ variable but those given."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    paths = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], env={**clean, **paths, **env}, capture_output=True, text=True
    )


@pytest.fixture(scope="session")
def interpreted(tmp_path_factory):
    """interpreted(__file__)[name of a check] is what the check raised, "" if nothing."""
    pytest.importorskip("triton")
    cache = str(tmp_path_factory.mktemp("triton"))

    @functools.cache
    def results(path: str) -> dict[str, str]:
        result = run_python(path, TRITON_INTERPRET="1", TRITON_CACHE_DIR=cache)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    return results


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    """report(...) runs `python -m kernels.report` one program at a time, from an empty cache.

    Given a file of tests/kernels, that is run instead; given a version of triton, that one compiles
    whose folder `make test-full` puts beside the other.
    """
    pytest.importorskip("triton")
    cache = str(tmp_path_factory.mktemp("triton"))

    def run(*arguments: str, program: str = "", version: str = "") -> tuple[int, str]:
        paths = [str(ROOT)]
        if version:
            folder = Path(sys.prefix) / f"triton-{version}"
            if not folder.is_dir():
                pytest.skip(f"no triton {version}: `make test-full` sets it up")
            paths.insert(0, str(folder))
        command = [str(HERE / program)] if program else ["-m", "kernels.report"]
        result = run_python(
            *command, *arguments, "--jobs", "1",
            TRITON_CACHE_DIR=cache, PYTHONPATH=os.pathsep.join(paths),
        )  # fmt: skip
        assert "usage:" not in result.stderr, result.stderr
        return result.returncode, result.stdout + result.stderr

    return run
