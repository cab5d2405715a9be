"""The README's tour, run as a reader would: every command between the test marks, in one shell."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "tokenizer", "visual_sentences", "lvm", "launch", "examples")


def marked_commands() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    parts = re.findall(r"<!-- test -->\s*```bash\n(.*?)```\s*<!-- /test -->", text, flags=re.S)
    assert parts, "the README has no commands between test marks"
    return "".join(parts)


def test_the_tour_of_the_readme_runs(tmp_path):
    """About a minute: ten commands, each with torch's start."""
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (bin_folder / "python").chmod(0o755)
    shell = (
        f'set -euo pipefail; export PATH="{bin_folder}:$PATH" PYTHONPATH="{tmp_path}"\n'
        f"{marked_commands()}"
    )
    done = subprocess.run(
        ["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    tour = tmp_path / "runs/tour"
    assert (tour / "answer.png").stat().st_size > 0
    assert {p.name for p in (tour / "hf").iterdir()} >= {"config.json", "model.safetensors"}
    assert '"paired"' in (tour / "evaluation.json").read_text()


def test_every_file_that_the_readme_links_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    missing = [link for link in links if not (ROOT / link).exists()]
    assert links and not missing
