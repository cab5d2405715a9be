"""What guards a long run: updates that are left out, and a watchdog for one that hangs.

A batch whose gradient is not finite, or has a norm of many times that of the last updates, is left
out: its samples count as used, the weights stay (PaLM, section 5.1, restarted from before such
batches and skipped them by hand). To know the norm costs one wait for the device an update.
"""

import faulthandler
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tokenizer.files import atomic_write

RECENT = 64
"""Norms that a new one is compared with; fewer than a quarter of them judge nothing."""

BEAT = 10.0
"""Seconds between writings of the heartbeat file, at least."""


def judge(norm: float, recent: Sequence[float], *, limit: float) -> str:
    """Say why an update of gradient norm `norm` is left out, or "" where it is made.

    `limit` is how many times the median of `recent` is too much; 0 judges nothing.
    """
    if not limit:
        return ""
    if not math.isfinite(norm):
        return f"its gradient is not finite ({norm})"
    if len(recent) < RECENT // 4:
        return ""
    median = statistics.median(recent)
    if norm > limit * median:
        return f"its gradient's norm is {norm:.4g}, {norm / median:.3g} times the median of before"
    return ""


def remember(norm: float, recent: Sequence[float]) -> tuple[float, ...]:
    """Return the last norms with that of an update that was made."""
    return (*recent, norm)[-RECENT:]


class Watchdog:
    """Ends a process that makes no progress for `seconds` (0: never), after writing its stacks.

    `beat` starts the time again. The stacks of all threads go to stacks-RANK.txt; the exit code is
    1, on which a launcher starts the run again from its last checkpoint. The timer is a thread of
    the interpreter that needs no lock of it, so a rank that waits inside a collective is seen too.
    Rank 0 also keeps heartbeat.json: step and time, for whoever watches from outside.
    """

    def __init__(self, folder: Path, *, rank: int, seconds: float) -> None:
        self.folder, self.rank, self.seconds = folder, rank, seconds
        self.armed = self.beaten = -math.inf

    def __enter__(self) -> Self:
        self.path = self.folder / f"stacks-{self.rank}.txt"
        if self.seconds:
            self.stacks = open(self.path, "a", encoding="utf-8")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.seconds:
            faulthandler.cancel_dump_traceback_later()
            self.stacks.close()
            if not self.path.stat().st_size:
                self.path.unlink()

    def beat(self, step: int) -> None:
        now = time.monotonic()
        # To start the timer again starts a thread, 0.1 ms or more: once in a hundredth of the time.
        if self.seconds and now - self.armed >= self.seconds / 100:
            self.armed = now
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=self.stacks)
        if self.rank == 0 and now - self.beaten >= BEAT:
            self.beaten = now
            with atomic_write(self.folder / "heartbeat.json", "w") as file:
                json.dump({"step": step, "time": time.time()}, file)
