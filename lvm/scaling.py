"""Fit a scaling law to runs: python -m lvm.scaling RUNS… [--flops 1e19 1e21] [--out DIR]

Reads each run folder's config.json (N, weights without tables) and metrics.jsonl (D, tokens, and
the last loss), fits L(N, D) = E + A/N^a + B/D^b as lvm.planning.law says, and prints the law, what
it explains and the best N and D for given FLOPs, each with a band from runs drawn with replacement.
Writes scaling.json, and scaling.png where matplotlib is there. See docs/planning.md for the loop
that trains a ladder of runs.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lvm.config import Run
from lvm.planning.law import Fit, Point, enough, fit
from tokenizer.cli import InputError, run
from tokenizer.files import atomic_write

BAND = 0.9
"""Part of the resampled laws that a band holds."""
WEAK = 0.9
"""A fit that explains less of log L than this is called weak, and one whose exponents are at an end
of what is searched, in itself or in more than a tail of the resampled laws."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """Fit L(N, D) to finished runs; print the law and the best N and D for given FLOPs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUNS")]
    """Run folders of lvm.train, at least six: of three sizes and three lengths."""
    flops: tuple[float, ...] = ()
    """Budgets to spend best, C = 6·N·D (default: 1, 10, 100 and 1000 times the largest run's)."""
    split: Literal["auto", "val", "train"] = "auto"
    """Loss that is fitted: that of the split val after the last update, or the last training line;
    auto takes val if every run has it."""
    resamples: int = 200
    """Fits to runs drawn with replacement, for the bands."""
    out: Path = Path(".")
    """Folder for scaling.json and scaling.png."""
    seed: int = 0


def read_run(folder: Path) -> dict[str, Point]:
    """Return a finished run's last loss by split. Raises InputError where there is no such run."""
    for name in ("config.json", "metrics.jsonl", "DONE"):
        if not (folder / name).is_file():
            what = "is not finished" if name == "DONE" else "is no run folder of lvm.train"
            raise InputError(
                f"{folder} {what}: there is no {name}. A law is fitted to final losses; finish the "
                "run, or leave it out"
            )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    params = Run.from_json(config).model.num_params(embeddings=False)
    last: dict[str, dict[str, Any]] = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except ValueError:  # a line cut off by a crash
            continue
        if values.get("split") in ("train", "val"):
            last[values["split"]] = values
    train = last.get("train")
    if train is None or not train.get("step"):
        raise InputError(f"{folder}/metrics.jsonl has no line on training; leave the run out")
    each = train["tokens"] / train["step"]  # tokens an update, the same for every update
    found = {}
    for split, values in last.items():
        if values["step"] != train["step"]:
            continue  # validated before the end: not the loss of a schedule that has ended
        if not math.isfinite(values["nll"]) or values["nll"] <= 0:
            raise InputError(
                f"the last {split} loss of {folder} is {values['nll']}; leave the run out"
            )
        found[split] = Point(
            name=str(folder), params=params, tokens=values["step"] * each, loss=values["nll"]
        )
    return found


def read_runs(folders: Sequence[Path], split: str) -> tuple[list[Point], str]:
    """Return the runs' final losses and which split they are of; raises InputError."""
    found = [read_run(folder) for folder in folders]
    if split == "auto":
        split = "val" if all("val" in one for one in found) else "train"
    if missing := [
        str(folder) for folder, one in zip(folders, found, strict=True) if split not in one
    ]:
        raise InputError(
            f"no {split} loss after the last update in {', '.join(missing)}; train with an "
            "--eval-every that divides --steps, or use --split train"
        )
    points = [one[split] for one in found]
    if not enough(points):
        sizes, lengths = ({getattr(p, key) for p in points} for key in ("params", "tokens"))
        raise InputError(
            f"{len(points)} runs of {len(sizes)} sizes and {len(lengths)} lengths cannot tell the "
            "five unknowns of L = E + A/N^a + B/D^b apart; wanted at least 6 runs of 3 sizes and 3 "
            "lengths. The recipes ladder_* and docs/planning.md make them"
        )
    return points, split


def band(values: Iterable[float]) -> list[float]:
    """Return the lowest and highest value without the tails; nothing of nothing."""
    order = sorted(values)
    cut = int(len(order) * (1 - BAND) / 2)
    return [order[cut], order[-1 - cut]] if order else []


def report(points: Sequence[Point], found: Fit, *, flops: Sequence[float], split: str) -> dict:
    """Return what scaling.json holds."""
    law, laws = found.law, found.resampled
    largest = max(6 * p.params * p.tokens for p in points)
    budgets = list(flops) or [largest * 10**k for k in range(4)]
    best = []
    for budget in budgets:
        params, tokens = law.best(budget)
        best.append({
            "flops": budget,
            "beyond": budget / largest,
            "params": params,
            "params_band": band(one.best(budget)[0] for one in laws),
            "tokens": tokens,
            "tokens_band": band(one.best(budget)[1] for one in laws),
            "loss": law.loss(params, tokens),
            "loss_band": band(one.loss(*one.best(budget)) for one in laws),
        })  # fmt: skip
    names = ("E", "A", "a", "B", "b")
    tail = (1 - BAND) / 2 * len(laws)
    loose = [
        name
        for name in ("a", "b")
        if law.at_an_end(name) or sum(one.at_an_end(name) for one in laws) > tail
    ]
    return {
        "format": 1,
        "law": asdict(law),
        "bands": {name: band(getattr(one, name) for one in laws) for name in names},
        "band": BAND,
        "residual": found.residual,
        "explained": found.explained,
        "undetermined": loose,
        "weak": found.explained < WEAK or bool(loose),
        "split": split,
        "best": best,
        "runs": [{**asdict(p), "fitted": law.loss(p.params, p.tokens)} for p in points],
    }


def lines(values: dict[str, Any]) -> list[str]:
    """Write what `report` returns as lines of text."""
    law, bands = values["law"], values["bands"]

    def between(low_high: list[float]) -> str:
        return f"[{low_high[0]:.4g}, {low_high[1]:.4g}]" if low_high else ""

    out = [
        "L(N, D) = E + A / N^a + B / D^b",
        f"{len(values['runs'])} runs, last loss of the split {values['split']}; in brackets "
        f"{values['band']:.0%} of the laws of runs drawn with replacement",
        "",
        *(f"  {name}  {law[name]:<12.5g} {between(bands[name])}" for name in law),
        "",
        f"the runs' losses differ from it by {values['residual']:.2%} (root mean square); it "
        f"explains {values['explained']:.1%} of log L (adjusted R²)",
    ]
    if values["weak"]:
        why = "these losses hardly follow such a law"
        if loose := values["undetermined"]:
            why = f"these runs do not determine {' and '.join(loose)}"
        out.append(
            f"WEAK: {why}; do not use what stands below. More runs, longer ones, sizes further "
            "apart, a validation loss of more rows?"
        )
    out += ["", f"{'C = 6 N D':>10}{'x largest':>11}{'N':>12}{'':>26}{'D':>12}{'':>26}{'L':>9}"]
    for row in values["best"]:
        out.append(
            f"{row['flops']:>10.3g}{row['beyond']:>11.3g}{row['params']:>12.4g}"
            f"{between(row['params_band']):>26}{row['tokens']:>12.4g}"
            f"{between(row['tokens_band']):>26}{row['loss']:>9.4f}"
        )
    out += ["", f"{'N':>12}{'D':>12}{'loss':>9}{'law':>9}  run"]
    out += [
        f"{r['params']:>12.4g}{r['tokens']:>12.4g}{r['loss']:>9.4f}{r['fitted']:>9.4f}  {r['name']}"
        for r in values["runs"]
    ]
    return out


def draw(points: Sequence[Point], found: Fit, path: Path) -> bool:
    """Draw the losses with the law, and the best N; False where matplotlib does not import."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    law, laws = found.law, found.resampled
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    lengths = _grid([p.tokens for p in points], factor=3)
    for i, size in enumerate(sorted({p.params for p in points})):
        color = f"C{i % 10}"
        mine = [p for p in points if p.params == size]
        left.plot([p.tokens for p in mine], [p.loss for p in mine], "o", color=color)
        left.plot(lengths, [law.loss(size, d) for d in lengths], color=color, label=f"N {size:.3g}")
        if laws:
            edges = [band(one.loss(size, d) for one in laws) for d in lengths]
            low, high = zip(*edges, strict=True)
            left.fill_between(lengths, low, high, color=color, alpha=0.15, linewidth=0)
    left.set(xscale="log", xlabel="tokens D", ylabel="loss, nats a code", title="runs and the law")
    left.legend(fontsize=8)
    budgets = _grid([6 * p.params * p.tokens for p in points], factor=30)
    right.plot(budgets, [law.best(c)[0] for c in budgets], color="k", label="best N")
    if laws:
        edges = [band(one.best(c)[0] for one in laws) for c in budgets]
        low, high = zip(*edges, strict=True)
        right.fill_between(budgets, low, high, color="k", alpha=0.15, linewidth=0)
    right.plot([6 * p.params * p.tokens for p in points], [p.params for p in points], "o", ms=4)
    right.set(
        xscale="log", yscale="log", xlabel="FLOPs C = 6 N D", ylabel="weights N", title="best size"
    )
    figure.savefig(path, dpi=120)
    return True


def _grid(values: Sequence[float], *, factor: float, count: int = 40) -> list[float]:
    """Return values evenly spread in logarithm, from the least to `factor` times the largest."""
    low, high = math.log(min(values)), math.log(max(values) * factor)
    return [math.exp(low + (high - low) * i / (count - 1)) for i in range(count)]


def main(command: Scaling) -> None:
    if command.resamples < 0 or any(c <= 0 for c in command.flops):
        raise InputError("--resamples cannot be negative, and --flops have to be positive")
    points, split = read_runs(command.runs, command.split)
    found = fit(points, resamples=command.resamples, seed=command.seed)
    values = report(points, found, flops=command.flops, split=split)
    print("\n".join(lines(values)))
    command.out.mkdir(parents=True, exist_ok=True)
    with atomic_write(command.out / "scaling.json", "w") as file:
        json.dump(values, file, indent=1)
    print(f"\nwrote {command.out / 'scaling.json'}")
    if draw(points, found, command.out / "scaling.png"):
        print(f"wrote {command.out / 'scaling.png'}")
    else:
        print("no scaling.png: matplotlib does not import here; pip install -e '.[demo]' has it")


if __name__ == "__main__":
    run(Scaling, main, prog="python -m lvm.scaling")
