"""Two evaluations side by side, target by target.

    python -m lvm.compare A.json B.json --out comparison.html

Both must be of the same data and split. Differences are paired, over what both have measured: rows
for the perplexity of a corpus, targets for prompts and answers (`lvm.evaluation.paired`);
intervals are 95 %, from redrawing whole groups of them.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from lvm.evaluate import FORMAT, VERSION
from lvm.evaluation.gallery import figure, render
from lvm.evaluation.paired import FEWEST, Comparison, Line, compare
from tokenizer.cli import InputError, run
from tokenizer.files import atomic_write

__all__ = ["Compare", "Comparison", "Line", "change", "compare", "load_report", "table"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compare:
    """Compare two models by the reports that `lvm.evaluate --out` wrote of the same data.

    Perplexities are compared as ratios (B over A), scores of answers as differences (B minus A),
    each over the targets that both reports have, with 95 % intervals.
    """

    a: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="A.json")]
    """Report of the first model."""
    b: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="B.json")]
    """Report of the second."""
    out: Path | None = None
    """Page to write (.html), or the figures (.json)."""
    seed: int = 0
    """Of the bootstrap."""


def load_report(path: Path) -> dict[str, Any]:
    """Read a report; raises InputError where the file is none that this program can read."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); wanted the .json of `lvm.evaluate --out`"
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); evaluate again") from error
    seen = (report.get("format"), report.get("version")) if isinstance(report, dict) else None
    if seen != (FORMAT, VERSION):
        raise InputError(
            f"{path} has format and version {seen}; wanted {(FORMAT, VERSION)}: evaluate the model "
            "again with this version of the program"
        )
    return report


SECTIONS = (
    ("rows", "perplexity of whole rows"),
    ("prompts", "perplexity of targets, right prompt by source"),
    ("answers", "answers to the right prompt, against the truth"),
)


def table(found: Comparison) -> str:
    """Write a comparison as plain lines; of answers, each source's first figure."""
    lines = [f"A  {found.a}", f"B  {found.b}"]
    for part, title in SECTIONS:
        if not getattr(found, part):
            continue
        sign = "B − A" if part == "answers" else "B / A"
        lines += ["", title, f"  {'':<26} {'A':>9} {'B':>9}  {sign:<28} {'better':<10} n"]
        for line in getattr(found, part):
            if not line.primary:
                continue
            name = f"{line.name} {'↑' if line.more else '↓'}"
            lines.append(
                f"  {name:<26} {figure(line.a):>9} {figure(line.b):>9}  {change(line):<28} "
                f"{line.verdict:<10} {line.n}"
            )
    lines += ["", *found.notes, caution(found)]
    return "\n".join(lines)


def caution(found: Comparison) -> str:
    """Say what so many intervals at once are worth."""
    count = sum(len(getattr(found, part)) for part, _ in SECTIONS)
    return (
        f"{count} comparisons: of those without a difference one in twenty shows one by chance; "
        f'"too few" is fewer than {FEWEST} groups of targets'
    )


def change(line: Line) -> str:
    """Write ×0.93 [0.91, 0.95] or +1.2 [0.4, 2.1]."""
    ratio = line.kind == "ratio"

    def number(value: float) -> str:
        return f"{value:.4g}" if ratio else f"{value:+.3g}"

    said = ("×" if ratio else "") + number(line.value)
    if line.low is None or line.high is None:
        return f"{said} (one group)"
    return f"{said} [{number(line.low)}, {number(line.high)}]"


def main(command: Compare) -> None:
    if command.out is not None and command.out.suffix not in (".html", ".json"):
        raise InputError(f"--out {command.out}: wanted a name that ends in .html or .json")
    found = compare(load_report(command.a), load_report(command.b), seed=command.seed)
    print(table(found))
    if command.out is None:
        return
    command.out.parent.mkdir(parents=True, exist_ok=True)
    if command.out.suffix == ".json":
        text = json.dumps({"format": "lvm-comparison", "version": 1, **asdict(found)}, indent=1)
    else:
        parts = [(title, getattr(found, name)) for name, title in SECTIONS]
        text = render(
            "compare.html.j2", found=found, parts=parts, change=change, caution=caution(found)
        )
    with atomic_write(command.out, "w") as file:
        file.write(text)
    print(f"wrote {command.out}")


if __name__ == "__main__":
    run(Compare, main, prog="python -m lvm.compare")
