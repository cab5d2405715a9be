"""How every command of the project starts, reports progress and ends.

Exit codes: 0 done, 1 failed, 2 bad usage. A user's mistake is one message without a traceback that
says what was seen, what was wanted and what to do; a traceback always means a defect of ours.
"""

import errno
import os
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")

STORAGE = {  # what a disk may do at any moment
    errno.ENOSPC: ("the disk is full", "free some space"),
    errno.EDQUOT: ("your share of the disk is full", "free some space"),
    errno.EROFS: ("the disk can only be read", "have it made writable"),
    errno.EACCES: ("a file may not be used", "change its permissions"),
    errno.EIO: ("the disk has failed", "look into its state"),
}


class InputError(ValueError):
    """The user's input is wrong and can be mended: exit code 2."""


class CommandError(RuntimeError):
    """The command could not do its work, through no fault of its arguments: exit code 1."""


def run(
    command: type[T],
    body: Callable[[T], int | None],
    *,
    prog: str,
    default: T | None = None,
    args: Sequence[str] | None = None,
) -> None:
    """Parse `args` into the dataclass `command`, call `body` with it, and exit."""
    import tyro

    # A part that may be absent has flags where the default has it, and none where it has not.
    options: dict[str, Any] = {"prog": prog, "args": args, "config": (tyro.conf.AvoidSubcommands,)}
    if default is not None:
        options["default"] = default
    parsed = tyro.cli(command, **options)
    sys.exit(guarded(lambda: body(parsed), prog=prog))


def guarded(body: Callable[[], int | None], *, prog: str) -> int:
    """Call `body`; turn the errors that a user can act on into a message and an exit code."""
    try:
        return body() or 0
    except InputError as error:
        code, message = 2, str(error)
    except CommandError as error:
        code, message = 1, str(error)
    except KeyboardInterrupt:
        code, message = 130, "interrupted; the same command goes on from what is finished"
    except BrokenPipeError:  # whoever read our output has gone, as in `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 1
    except OSError as error:
        if error.errno not in STORAGE:
            raise
        seen, remedy = STORAGE[error.errno]
        code, message = 1, f"{seen} ({error}); {remedy} and run the command again"
    sys.stdout.flush()
    print(f"{prog}: {message}", file=sys.stderr)
    return code


def duration(seconds: float) -> str:
    """Write seconds as 0:07, 12:30 or 3:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Show how far a long job is: a bar on a terminal, a plain line now and then in a log.

    `with Progress("encode", total=900, unit="images") as p: p.update(8, bad=1)`
    Keyword arguments of `update` are shown after the bar, latest value each. A job that was resumed
    passes what is already done as `done`, so that rate and time left count this run alone. A job
    bounded by time gives `seconds` instead of `total`, or both.
    """

    def __init__(
        self,
        label: str,
        *,
        total: int | None = None,
        unit: str = "items",
        done: int = 0,
        seconds: float | None = None,
        every: float = 10.0,
        enabled: bool = True,
    ) -> None:
        self.label, self.total, self.unit, self.seconds = label, total, unit, seconds
        self.count = self.first = done
        self.every, self.enabled = every, enabled
        self.fields: dict[str, Any] = {}
        self.start = self.printed = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if self.enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=28),
                TextColumn("{task.fields[line]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=1.0, line="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._show()
            self._bar.stop()
        elif self.enabled and self.count > self.first:
            print(f"{self.label}: {self.line()}", flush=True)

    @property
    def fraction(self) -> float:
        """Part of the job that is done, by count or by time, whichever is further."""
        parts = [0.0]
        if self.total:
            parts.append(self.count / self.total)
        if self.seconds:
            parts.append((time.monotonic() - self.start) / self.seconds)
        return min(1.0, max(parts))

    def update(self, n: int = 1, **fields: Any) -> None:
        self.count += n
        self.fields.update(fields)
        if not self.enabled:
            return
        now = time.monotonic()
        if self._bar is not None and now - self.printed >= 0.1:
            self.printed = now
            self._show()
        elif self._bar is None and now - self.printed >= self.every:
            self.printed = now
            print(f"{self.label}: {self.line()}", flush=True)

    def line(self) -> str:
        elapsed = time.monotonic() - self.start
        rate = (self.count - self.first) / max(elapsed, 1e-9)
        of = f"/{self.total}" if self.total else ""
        parts = [f"{self.count}{of} {self.unit}", f"{rate:.3g} {self.unit}/s"]
        left = []
        if self.total and rate:
            left.append((self.total - self.count) / rate)
        if self.seconds:
            left.append(max(0.0, self.seconds - elapsed))
        parts.append(
            f"{duration(elapsed)} passed" + (f", {duration(min(left))} left" if left else "")
        )
        parts += [
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.fields.items()
        ]
        return "  ".join(parts)

    def _show(self) -> None:
        self._bar.update(self._task, completed=self.fraction, line=self.line())
