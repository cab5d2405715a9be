"""Timing for benchmarks: rivals in turns on one device, and a line a result.

All rivals of a case are timed in the same rounds, one after the other, so that a change of the
machine's speed meets them all; medians count, and ratios are taken within a round. On a CPU a turn
is one call. On a GPU it is a batch of calls between two events:

    host     enqueue: sleep, event, call, call, call, ..., event        wait, read the events
    device            sleeping ......................  | call | call | call | ...  |

The device sleeps until all of the batch is enqueued: launches cost the host more than a small
kernel takes, and a model that is compiled or far ahead of its device does not pay them.
"""

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Row = dict[str, object]

BATCH = 0.012  # seconds of calls a turn on a GPU: ten turns are over 100 ms
MOST = 256  # calls of a turn: the device's queue holds some 1000 launches
CLOCK = 2e9  # cycles a second that `sleep` is told, no less than those of any GPU known here


class Lost(RuntimeError):
    """An earlier kernel has broken the device for this process; nothing more can run in it."""


@dataclass(frozen=True, slots=True)
class Body:
    """What is timed: `run` of the number of the call, or of what `before`, untimed, made of it."""

    run: Callable[[Any], object]
    before: Callable[[int], Any] | None = None
    calls: int = 1  # that one run stands for, as a graph of many


def describe(error: BaseException) -> str:
    """Return the type of an error and its first line, cut to what fits one."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def recover(device: str) -> None:
    """Free what a failed call has left; raise Lost where the device answers no more."""
    if device == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise Lost(describe(error)) from error


def sample(
    body: Body, *, device: str, first: int = 0, calls: int = 1, ahead: float = 0.0
) -> tuple[float, float]:
    """Return the seconds of a call on the device, and those that the host took to enqueue it.

    `first` is the number of the first call; the device sleeps `ahead` seconds before.
    """
    if device != "cuda":
        spent = 0.0
        for i in range(first, first + calls):
            state = i if body.before is None else body.before(i)
            start = time.perf_counter()
            body.run(state)
            spent += time.perf_counter() - start
        return spent / (calls * body.calls), 0.0
    torch.cuda._sleep(int(ahead * CLOCK))
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)]]
    start = time.perf_counter()
    if body.before is None:
        pairs[0][0].record()
        for i in range(first, first + calls):
            body.run(i)
        pairs[0][1].record()
    else:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for i, (begin, end) in enumerate(pairs):
            state = body.before(first + i)
            begin.record()
            body.run(state)
            end.record()
    host = (time.perf_counter() - start) / calls
    torch.cuda.synchronize()
    total = sum(begin.elapsed_time(end) for begin, end in pairs) / 1e3
    return total / (calls * body.calls), host


def turns(
    bodies: Mapping[str, Body], *, device: str, repeats: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return the seconds of a call in each round, by body, and the errors of those that raised.

    Each is called twice before, to compile and warm up. Raises Lost.
    """
    plans: dict[str, tuple[int, float]] = {}
    failed: dict[str, str] = {}
    for name, body in bodies.items():
        try:
            plans[name] = (1, 0.0)
            sample(body, device=device)
            if device == "cuda":
                _, host = sample(body, device=device, calls=3)
                took, _ = sample(body, device=device, calls=3, ahead=5 * host)
                calls = max(1, min(MOST, math.ceil(BATCH / (took * body.calls))))
                plans[name] = (calls, min(0.25, 1.5 * calls * host + 1e-3))
        except Exception as error:
            failed[name] = describe(error)
        if name in failed:  # outside, where the error no longer holds its tensors
            del plans[name]
            recover(device)
    times: dict[str, list[float]] = {name: [] for name in plans}
    for turn in range(repeats):
        for name, (calls, ahead) in plans.items():
            if name in failed:
                continue
            try:
                took, _ = sample(
                    bodies[name], device=device, first=turn * calls, calls=calls, ahead=ahead
                )
                times[name].append(took)
            except Exception as error:
                failed[name] = describe(error)
            if name in failed:
                recover(device)
    return {name: found for name, found in times.items() if name not in failed}, failed


def ratio(times: Mapping[str, Sequence[float]], name: str, others: Iterable[str]) -> float | None:
    """Return how many times as fast `name` is as the fastest of `others`; None without them."""
    known = [other for other in others if times.get(other)]
    if name not in times or not known:
        return None
    best = min(known, key=lambda other: statistics.median(times[other]))
    pairs = zip(times[best], times[name], strict=True)
    return round(statistics.median(theirs / ours for theirs, ours in pairs), 3)


def rotation(size: int, device: str) -> int:
    """Return how many sets of `size` bytes are used in turn, so that none is found in the cache."""
    if device != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, math.ceil(3 * cache / max(size, 1)))


def about(device: str) -> Row:
    """Return what a figure has to be read with: device, software and date."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    return {
        "device": name or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "date": date.today().isoformat(),
    }


def show(row: Row, *, under: str = "") -> None:
    """Print a line at once: a log is then whole up to where a program was stopped."""
    line = "  ".join(f"{key} {value}" for key, value in row.items() if value is not None)
    print(f"{under}: {line}" if under else line, flush=True)


def in_json(what: str, about: Row, table: Sequence[Row]) -> None:
    print(json.dumps({"bench": what, **about, "rows": table}), flush=True)


def report(what: str, device: str, table: Sequence[Row]) -> None:
    """Print the lines of a benchmark and the JSON that names its device and software."""
    for row in table:
        show(row)
    in_json(what, about(device), table)


def seconds(body: Callable[[], object], *, device: str, repeats: int) -> float:
    """Return the median time of a call, launches included, after one that warms up."""
    times = []
    for i in range(repeats + 1):
        start = time.perf_counter()
        body()
        if device == "cuda":
            torch.cuda.synchronize()
        if i:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def options(
    prog: str,
    description: str | None,
    *,
    folders: Mapping[str, str] | None = None,
    flags: Mapping[str, str] | None = None,
    more: Callable[[argparse.ArgumentParser], None] | None = None,
    args: Sequence[str] | None = None,
) -> argparse.Namespace:
    """Parse device and repeats, which every benchmark takes, and what else one does.

    `folders` and `flags`: name → help; `more` adds arguments. argparse, since a GPU host may have
    torch and little else.
    """
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=10, help="timed rounds; the median counts")
    for name, text in (folders or {}).items():
        parser.add_argument(f"--{name}", type=Path, help=text)
    for name, text in (flags or {}).items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    if more is not None:
        more(parser)
    found = parser.parse_args(sys.argv[1:] if args is None else args)
    if found.repeats < 1:
        parser.error(f"--repeats {found.repeats}: wanted 1 or more")
    if found.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, f"{prog}: no CUDA device here; run it with --device cpu\n")
    return found
