"""Check and time every kernel beside its rivals: python -m kernels.bench [--device cuda].

    checks          attention in every shipped configuration against float64 (no timing)
    attention       masks of visual sentences at the shapes of LVM: ours, SDPA, FlexAttention, eager
    decode          candidates of one prompt: own caches and a shared one
    cross_entropy   the linear head and its loss, with peak memory
    elementwise     RMSNorm, SwiGLU, RoPE: ours, torch eager and compiled
    lookup          the nearest code of a tokenizer

All of them within eight minutes on an H100, a minute or two on a CPU; `--only attention decode`
selects. Whatever is timed is compared with float64 first, on the device and at its size. A line a
result, printed at once; after each table a line of JSON with device and software, which `--out DIR`
keeps in DIR/kernels.json beside a plot. The exit code is 1 if anything of ours was wrong or did not
run; a rival that does not run is a line and no more.
"""

import json
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import torch

from kernels import (
    bench_attention,
    bench_checks,
    bench_cross_entropy,
    bench_decode,
    bench_elementwise,
    bench_lookup,
)
from kernels.attention import MEASURED, Backend
from kernels.bench_attention import CHOSEN, OURS
from kernels.bench_case import Bench
from kernels.timing import Lost, Row, about, in_json, options

TABLES: dict[str, Callable[[Bench], None]] = {
    "checks": bench_checks.verify_all,
    "attention": bench_attention.table,
    "decode": bench_decode.table,
    "cross_entropy": bench_cross_entropy.table,
    "elementwise": bench_elementwise.table,
    "lookup": bench_lookup.table,
}


def keep(bench: Bench, folder: Path, here: Row) -> None:
    """Write the tables to kernels.json, in place of those of the same name that it has."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "kernels.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"tables": {}}
    checks = bench.tables.get("checks", [])
    again = {row["of"] for row in checks}
    others = [row for row in known["tables"].get("checks", []) if row["of"] not in again]
    tables = {**known["tables"], **bench.tables, "checks": [*others, *checks]}
    path.write_text(
        json.dumps({"about": here, "tables": tables}, indent=1) + "\n", encoding="utf-8"
    )


def plot(rows: Sequence[Row], path: Path) -> bool:
    """Draw TFLOP/s by mask and backend at the first shape of `rows`; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    timed = [row for row in rows if "fwd TFLOP/s" in row]
    timed = [row for row in timed if row["shape"] == timed[0]["shape"]]
    if not timed:
        return True
    names = list(dict.fromkeys(str(row["mask"]) for row in timed))
    backends = list(dict.fromkeys(str(row["backend"]) for row in timed))
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, what in zip(figure.subplots(2, 1), ("fwd", "bwd"), strict=True):
        for i, backend in enumerate(backends):
            bars = {
                names.index(str(row["mask"])): float(str(row[f"{what} TFLOP/s"]))
                for row in timed
                if row["backend"] == backend and f"{what} TFLOP/s" in row
            }
            if bars:
                width = 0.85 / len(backends)
                at = [x + (i - (len(backends) - 1) / 2) * width for x in bars]
                axes.bar(at, list(bars.values()), width=width, label=backend, color=f"C{i}")
        axes.set_xticks(range(len(names)), names)
        axes.set_ylabel(f"{what}, TFLOP/s on allowed pairs")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(labels), frameon=False, loc="outside lower center")
    figure.suptitle(f"Attention, bf16, {timed[0]['shape']} (rows x heads x positions x channels)")
    figure.savefig(path, dpi=130)
    return True


def fastest(rows: Sequence[Row], *, without: Sequence[str] = ()) -> dict[str, str]:
    """Return for each kind of mask the backend of the least forward and backward time.

    Of `rows` at the shape of 1B the times of the masks of one kind are added; a backend counts that
    ran and was right on all of them, that `attention` takes, and that is not in `without`.
    """
    times: dict[str, dict[str, dict[str, float]]] = {}  # by kind, backend and mask
    masks: dict[str, set[str]] = {}
    for row in rows:
        if not str(row.get("shape")).startswith(f"{CHOSEN} ") or "kind" not in row:
            continue
        kind, backend, mask = str(row["kind"]), str(row["backend"]), str(row["mask"])
        masks.setdefault(kind, set()).add(mask)
        took = row.get("fwd+bwd ms")
        if row.get("checked") == "ok" and isinstance(took, float):
            times.setdefault(kind, {}).setdefault(backend, {})[mask] = took
    taken = [name for name in get_args(Backend) if name != "auto" and name not in without]
    found = {}
    for kind, by in times.items():
        whole = {
            name: sum(by[name].values()) for name in taken if set(by.get(name, ())) == masks[kind]
        }
        if whole:
            found[kind] = min(whole, key=lambda name: whole[name])
    return found


def write_choice(bench: Bench, here: Row, paths: Sequence[Path]) -> None:
    """Write what `auto` takes on this architecture, and who measured, beside those of others.

    Ours is not taken if a check of any of its configurations failed.
    """
    wrong = any(
        row["of"] == "attention" and row.get("backend") in OURS and row.get("verdict") != "ok"
        for row in bench.tables.get("checks", [])
    )
    found = fastest(bench.tables.get("attention", []), without=["triton"] if wrong else [])
    if not found:
        print(f"choose: no times at the shape of {CHOSEN}; nothing written", flush=True)
        return
    major, minor = torch.cuda.get_device_capability()
    measured = "{device}, {date}, torch {torch}, triton {triton}".format(**here)
    for path in paths:
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        known[f"sm_{major}{minor}"] = {**found, "measured": measured}
        path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"choose: {found} written to {', '.join(map(str, paths))}", flush=True)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--out", type=Path, help="folder for kernels.json and kernels.png")
    parser.add_argument(
        "--choose", action="store_true",
        help="write what attention's `auto` takes on this GPU to kernels/backends.json and DIR",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no case after these")


def go_on(args: Sequence[str], left: Sequence[str], minutes: float) -> None:
    """Run the tables that are left in a process of their own, whose device is not broken."""
    several = ["--only", *left, "--minutes", f"{minutes:.2f}"]  # the last of a name counts
    rest = [arg for arg in args if arg != "--choose"]
    subprocess.run([sys.executable, "-m", "kernels.bench", *rest, *several], check=False)


def main(args: Sequence[str] | None = None) -> int:
    args = sys.argv[1:] if args is None else args
    found = options("python -m kernels.bench", __doc__, more=add_arguments, args=args)
    if found.choose and (found.device != "cuda" or "attention" not in found.only):
        print("python -m kernels.bench: --choose needs --device cuda and the table attention")
        return 2
    began = time.monotonic()
    here = about(found.device)
    bench = Bench(found.device, found.repeats, until=began + 60 * found.minutes)
    names = [name for name in TABLES if name in found.only]
    for i, name in enumerate(names):
        lost = False
        try:
            with bench.guarded(name, {}, ours=True):
                TABLES[name](bench)
        except Lost as error:
            lost = True
            bench.fail(name, {"device": "lost to this process"}, str(error), ours=True)
        in_json(name, here, bench.tables.get(name, []))
        if found.out is not None:
            keep(bench, found.out, here)
        print(f"{name}: done after {time.monotonic() - began:.0f} s", flush=True)
        if lost and names[i + 1 :]:
            go_on(args, names[i + 1 :], (bench.until - time.monotonic()) / 60)
        if lost:
            break
    rows = bench.tables.get("attention", [])
    if found.out is not None and rows and not plot(rows, found.out / "kernels.png"):
        print("no plot: matplotlib does not import here")
    if found.choose:
        copies = [] if found.out is None else [found.out / MEASURED.name]
        write_choice(bench, here, [MEASURED, *copies])
    for line in [*bench_attention.summary(rows), *(f"BROKEN: {line}" for line in bench.broken)]:
        print(line)
    print(f"{len(bench.broken)} broken; {time.monotonic() - began:.0f} s", flush=True)
    return 1 if bench.broken else 0


if __name__ == "__main__":
    sys.exit(main())
