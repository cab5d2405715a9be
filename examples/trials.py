"""What the experiments share: steps as commands of their own, figures over seeds."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tokenizer.cli import CommandError

# Two-sided 95 % quantiles of Student's t, by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def step(*words: str, done: Path, log: Path) -> None:
    """Run `python -m` of the words unless the file `done` is there; its output goes to `log`.

    Raises CommandError where the command fails.
    """
    if done.exists():
        return
    sys.stdout.write(f"python -m {shlex.join(words)}\n")
    sys.stdout.flush()
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        ended = subprocess.run(
            [sys.executable, "-m", *words], env=os.environ, stdout=file, stderr=subprocess.STDOUT
        )
    if ended.returncode or not done.exists():
        raise CommandError(f"python -m {words[0]} failed; {log} says why")


def interval(values: Sequence[float]) -> dict[str, float | int | None]:
    """Return the mean over seeds and its 95 % interval by Student's t; None from a single seed.

    The interval is about seeds alone: how far another start of the same experiment would lie.
    """
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return {"mean": mean, "low": None, "high": None, "n": n}
    half = T95[min(n - 1, max(T95))] * float(np.std(values, ddof=1)) / n**0.5
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def written(found: dict[str, float | int | None], *, scale: float = 1.0, digits: int = 2) -> str:
    """Write 12.34 [11.80, 12.88]."""
    text = f"{scale * float(found['mean'] or 0.0):.{digits}f}"
    if found["low"] is None or found["high"] is None:
        return text
    return f"{text} [{scale * found['low']:.{digits}f}, {scale * found['high']:.{digits}f}]"
