"""Correctness of attention before it is timed: every configuration that is shipped, in float64.

    python -m kernels.bench_checks cuda 0 1 2      cases by number, a line of JSON each

`verify_all` starts several of these at once: most of the time goes into compiling kernels, which
one process does one after the other, and a kernel that breaks the device breaks it for its own
process alone. What they compile is found by later processes in triton's cache.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels.attention import Backend, attention, attention_reference, resolve
from kernels.bench_case import Bench, doubled, limits, relative, results
from kernels.mask import Mask
from kernels.timing import Lost, Row, describe, recover

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEADS = 4
SECONDS = 150.0  # for all cases together
PROCESSES = 12


@dataclass(frozen=True, slots=True)
class Setup:
    """One case: `group` query heads share a key head; `apart` fits no tensor map."""

    dim: int
    dtype: str
    mask: str  # causal, full, exact or rows
    group: int
    length: int
    apart: bool = False


def setups(device: str) -> list[Setup]:
    """Return the cases: each tile of `configure`, each head dimension, kind of mask and grouping.

    Not their whole product, which would compile for half an hour.
    """
    if device != "cuda":
        return [
            Setup(dim, dtype, mask, group, 129)
            for dim, dtype, mask, group in (
                (64, "bf16", "causal", 1), (100, "fp32", "rows", 4), (32, "fp32", "exact", 1),
                (96, "fp16", "full", 4),
            )
        ]  # fmt: skip
    kinds = ("causal", "full", "exact", "rows")
    found = [Setup(128, "bf16", mask, group, 4096) for mask in kinds for group in (1, 4)]
    found += [Setup(128, "bf16", mask, 1, 4000, apart=True) for mask in ("exact", "rows")]
    found += [Setup(128, "fp16", mask, 1, 4096) for mask in ("causal", "rows")]
    found += [Setup(128, "fp32", mask, 1, 1024) for mask in ("causal", "exact", "rows")]
    for dim in (32, 64, 80, 96, 100):
        # 1000: tiles and tables end inside a block.
        groups = {"causal": 1, "full": 4, "exact": 1, "rows": 4}
        found += [Setup(dim, "bf16", mask, groups[mask], 1000) for mask in kinds]
    found += [
        Setup(dim, dtype, "rows", 1, 1000, apart=True)
        for dim, dtype in ((64, "bf16"), (128, "fp32"))
    ]
    found += [Setup(64, "fp16", mask, 4, 1000) for mask in ("full", "exact")]
    found += [Setup(dim, "fp32", mask, 4, 1000) for dim in (64, 100) for mask in ("full", "rows")]
    return found


def mask_of(setup: Setup, rows: int, device: str) -> Mask:
    """Return the mask: packed documents with a prefix each, at multiples of 128 if exact."""
    if setup.mask in ("causal", "full"):
        return Mask(causal=setup.mask == "causal")
    index = torch.arange(setup.length, device=device, dtype=torch.int32).expand(rows, -1)
    step = 256 if setup.mask == "exact" else 211
    start = index // step * step
    hi = torch.maximum(index + 1, start + 37).clamp(max=setup.length)
    return Mask.interval(start.contiguous(), hi.contiguous(), exact=setup.mask == "exact")


def draw(setup: Setup, device: str) -> tuple[list[Tensor], list[Tensor], Mask]:
    """Return q, k, v, which want gradients, a gradient, and the mask."""
    rows = 1 if setup.length > 2048 else 2
    drawn = torch.Generator(device).manual_seed(setup.dim + setup.length)

    def tensor(heads: int) -> Tensor:
        # Rows of two channels more than are read start at no multiple of 16 bytes.
        width = setup.dim + 2 * setup.apart
        shape = (rows, setup.length, heads, width)
        x = torch.randn(shape, device=device, generator=drawn).to(TYPES[setup.dtype])
        return x.transpose(1, 2)[..., : setup.dim].requires_grad_()

    groups = HEADS // setup.group
    tensors = [tensor(HEADS), tensor(groups), tensor(groups)]
    return tensors, [tensor(HEADS).detach()], mask_of(setup, rows, device)


def verify(setup: Setup, device: str, backend: Backend) -> Row:
    """Compare output and gradients with float64, with SDPA's own errors, and with a second run."""
    tensors, grads, mask = draw(setup, device)

    def errors(of: Backend) -> tuple[list[float], list[Tensor]]:
        ready = resolve(
            mask, queries=setup.length, keys=setup.length, device=torch.device(device), backend=of
        )
        got = results(lambda q, k, v: attention(q, k, v, ready), tensors, grads)
        return [relative(a, b) for a, b in zip(got, want, strict=True)], got

    want = results(
        lambda q, k, v: attention_reference(q, k, v, mask), doubled(tensors), doubled(grads)
    )
    found, first = errors(backend)
    again = errors(backend)[1]
    row: Row = {}
    theirs: list[float] = []
    if setup.dtype == "bf16" and backend != "sdpa":
        theirs = errors("sdpa")[0]
        row["of sdpa"] = f"{max(theirs):.2e}"
    bounds = limits(TYPES[setup.dtype], theirs, 4)
    if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
        row["bits"], found = "differ", [float("inf")] * 4
    worst = max(range(4), key=lambda i: found[i] / bounds[i])
    return {
        **row,
        "worst": ("o", "dq", "dk", "dv")[worst],
        "error": found[worst],
        "bound": bounds[worst],
    }


def gather(command: Sequence[str], numbers: Sequence[int], *, until: float) -> dict[int, Row]:
    """Run `command` on cases by number; one that ends the process is named, the rest run anew.

    `until` is of time.monotonic(). A case gets a row or {"failed": why}.
    """
    found: dict[int, Row] = {}
    left = list(numbers)
    while left:
        try:
            done = subprocess.run(
                [*command, *map(str, left)],
                capture_output=True,
                cwd=Path(__file__).parents[1],
                timeout=max(0.1, until - time.monotonic()),
                check=False,
            )
            out, why = done.stdout, f"its process ended with {done.returncode}"
            why += ": " + (done.stderr.decode(errors="replace").strip().splitlines() or [""])[-1]
            late = False
        except subprocess.TimeoutExpired as error:
            out, why, late = error.stdout or b"", "out of time", True
        for line in out.decode(errors="replace").splitlines():
            if line.startswith("{"):
                row = json.loads(line)
                found[row.pop("number")] = row
        left = [number for number in left if number not in found]
        for number in left if late else left[:1]:
            found[number] = {"failed": why[:300]}
        left = [number for number in left if number not in found]
    return found


def verify_all(bench: Bench, *, seconds: float = SECONDS) -> None:
    """Run all cases, several processes at once, and print a line each."""
    cases = setups(bench.device)
    several = min(PROCESSES, max(1, (os.cpu_count() or 1) - 2), len(cases))
    if bench.device != "cuda":
        several = 1  # a CPU has no tensor cores to wait for: compiling is none, computing is all
    command = [sys.executable, "-m", "kernels.bench_checks", bench.device]
    end = min(time.monotonic() + seconds, bench.until)
    parts = [list(range(len(cases)))[i::several] for i in range(several)]
    with ThreadPoolExecutor(several) as pool:
        found: dict[int, Row] = {}
        for part in pool.map(lambda numbers: gather(command, numbers, until=end), parts):
            found |= part
    for number, setup in enumerate(cases):
        row, name = found[number], {k: v for k, v in asdict(setup).items() if v is not False}
        backend: Row = {"backend": "triton" if bench.device == "cuda" else "sdpa", **name}
        if "failed" in row:
            bench.fail("checks", {"of": "attention", **backend}, str(row["failed"]), ours=True)
            continue
        error, bound = float(str(row.pop("error"))), float(str(row.pop("bound")))
        bench.verdict("attention", {**backend, **row}, error=error, bound=bound)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench_checks", description=__doc__)
    parser.add_argument("device", choices=["cpu", "cuda"])
    parser.add_argument("numbers", type=int, nargs="+")
    found = parser.parse_args()
    cases = setups(found.device)
    for number in found.numbers:
        failed = ""
        try:
            backend: Backend = "triton" if found.device == "cuda" else "sdpa"
            row = verify(cases[number], found.device, backend)
        except Exception as error:
            failed = describe(error)
            row = {"failed": failed}
        print(json.dumps({"number": number, **row}), flush=True)
        if failed:
            try:
                recover(found.device)
            except Lost:
                sys.exit(3)


if __name__ == "__main__":
    main()
