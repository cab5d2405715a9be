"""Where a result came from: command, code and package versions, for the files beside it."""

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "numpy", "pillow", "safetensors")


def provenance() -> dict[str, str | dict[str, str]]:
    """Return command, git commit ("+" if changed since; "" outside a checkout) and versions."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        versions[name] = metadata.version(name)
    return {"command": " ".join(sys.argv), "commit": git_commit(), "versions": versions}


def git_commit() -> str:
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
