"""Exit codes and messages of every command, and the arithmetic of the progress line."""

import errno
from dataclasses import dataclass

import pytest

from tokenizer.cli import CommandError, InputError, Progress, duration, guarded, run


def raiser(error: BaseException):
    def body() -> None:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("no such folder"), 2),
        (CommandError("no space in the queue"), 1),
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 1),
        (PermissionError(errno.EACCES, "Permission denied"), 1),
    ],
)
def test_expected_errors_are_one_line_and_an_exit_code(error, code: int, capsys) -> None:
    assert guarded(raiser(error), prog="cmd") == code
    message = capsys.readouterr().err
    assert message.startswith("cmd: ") and "Traceback" not in message
    assert str(error) in message


def test_defects_of_ours_keep_their_traceback() -> None:
    with pytest.raises(OSError):
        guarded(raiser(OSError(errno.EBADF, "broken")), prog="cmd")
    with pytest.raises(ZeroDivisionError):
        guarded(raiser(ZeroDivisionError()), prog="cmd")


@dataclass(frozen=True)
class Command:
    """Do a thing."""

    name: str
    times: int = 1


def test_run_parses_calls_and_exits_with_the_code() -> None:
    seen = []
    with pytest.raises(SystemExit) as ended:
        run(Command, seen.append, prog="cmd", args=["--name", "x", "--times", "3"])
    assert ended.value.code == 0 and seen == [Command("x", 3)]
    with pytest.raises(SystemExit) as ended:
        run(Command, lambda c: 5, prog="cmd", args=["--name", "x"])
    assert ended.value.code == 5


def test_bad_usage_exits_with_two() -> None:
    with pytest.raises(SystemExit) as ended:
        run(Command, lambda c: None, prog="cmd", args=["--nmae", "x"])
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("seconds", "text"), [(7, "0:07"), (750, "12:30"), (11100, "3:05:00"), (59.6, "1:00")]
)
def test_durations_are_written_as_clocks(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_progress_counts_what_was_done_before_but_not_in_the_rate() -> None:
    progress = Progress("x", total=10, done=5, enabled=False)
    progress.update(1, bad=2)
    assert progress.fraction == 0.6
    assert progress.line().startswith("6/10 items") and progress.line().endswith("bad 2")
    assert Progress("x", total=10, done=5, enabled=False).line().split()[2] == "0"


def test_progress_by_time_and_by_count_takes_the_further_one() -> None:
    progress = Progress("x", total=100, seconds=1e9, enabled=False)
    progress.update(30)
    assert progress.fraction == 0.3
    progress.start -= 5e8
    assert progress.fraction == pytest.approx(0.5, abs=1e-6)


def test_progress_in_a_log_ends_with_a_line(capsys) -> None:
    with Progress("work", total=3, unit="files") as progress:
        for _ in range(3):
            progress.update()
    assert capsys.readouterr().out.startswith("work: 3/3 files")
