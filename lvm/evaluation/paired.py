"""The difference of two evaluations, over what both have measured; `lvm.compare` prints it.

Unpaired intervals of two models overlap easily, for targets differ far more in difficulty than
models do in quality; so every difference is of the same target under both. S rows or targets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lvm.evaluation.in_context import bootstrap, bootstrap_mean
from tokenizer.cli import InputError

CONDITIONS = ("right", "none", "wrong")
FEWEST = 8  # groups; a bootstrap of fewer is far too sure of itself
POOLED = "psnr"  # a figure of every source, compared over all of them too


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One comparison: both means over the n pairs, and B over A or B minus A with its interval."""

    name: str
    a: float
    b: float
    kind: str  # "ratio" or "difference"
    value: float
    low: float | None
    high: float | None
    n: int
    groups: int  # of targets that belong together; with few of them an interval is too narrow
    more: bool  # a larger figure is better
    primary: bool  # the first figure of its source

    @property
    def verdict(self) -> str:
        """Which is better: "A", "B", "not shown" where the interval holds no difference, or "too
        few" to say."""
        if self.groups < FEWEST:
            return "too few"
        same = 1.0 if self.kind == "ratio" else 0.0
        if self.low is None or self.high is None or self.low <= same <= self.high:
            return "not shown"
        return "B" if (self.low > same) == self.more else "A"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    a: str  # the models' names
    b: str
    rows: Sequence[Line]  # perplexity of whole rows: all, then by source
    prompts: Sequence[Line]  # perplexity of targets: by condition, then of each source
    answers: Sequence[Line]  # scores with the right prompt, by source and figure
    notes: Sequence[str]  # what was not compared, and why


def compare(a: Mapping[str, Any], b: Mapping[str, Any], *, seed: int = 0) -> Comparison:
    """Compare two reports of `lvm.evaluate` as JSON has them.

    Raises InputError where the data differ, or where nothing at all was measured on the same rows
    or targets.
    """
    for name, what in (
        (
            "tokenizer",
            "the codes of different tokenizers, whose perplexities mean different things",
        ),
        ("manifest", "different data"),
        ("split", "different splits"),
    ):
        if a[name] != b[name]:
            raise InputError(
                f"the reports are of {what}: A {a['data']} ({name} {a[name][:16]}), B {b['data']} "
                f"({name} {b[name][:16]}); evaluate both on the same data and split"
            )
    notes: list[str] = []
    if a["group_by"] != b["group_by"]:
        notes.append(f"targets are grouped as in A ({a['group_by'] or 'each its own'})")
    rows = _rows(a["rows"], b["rows"], notes, seed=seed)
    prompts = _prompts(a.get("targets"), b.get("targets"), notes, seed=seed)
    answers = _answers(a.get("answers"), b.get("answers"), notes, seed=seed)
    if not (rows or prompts or answers):
        raise InputError(
            f"nothing was measured on the same rows or targets ({'; '.join(notes)}); evaluate both "
            "with the same --rows, --prompts, --generate and --seed"
        )
    return Comparison(
        a=_name(a, b), b=_name(b, a), rows=rows, prompts=prompts, answers=answers, notes=notes
    )


def _name(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return a model's path, with its date where both have the same."""
    return one["model"] if one["model"] != other["model"] else f"{one['model']} ({one['date']})"


def _ratio(
    name: str, a: np.ndarray, b: np.ndarray, codes: np.ndarray, groups: np.ndarray, *, seed: int
) -> Line:
    """Compare the mean -log p of a code, a and b [S], over so many codes each, as perplexities."""
    found = bootstrap(b - a, groups, weights=codes, seed=seed)
    assert found["mean"] is not None
    return Line(
        name=name,
        a=float(np.exp((a * codes).sum() / codes.sum())),
        b=float(np.exp((b * codes).sum() / codes.sum())),
        kind="ratio",
        value=found["mean"],
        low=found["low"],
        high=found["high"],
        n=len(codes),
        groups=len(np.unique(groups)),
        more=False,
        primary=True,
    )


def _rows(a: Mapping[str, Any], b: Mapping[str, Any], notes: list[str], *, seed: int) -> list[Line]:
    def table(of: Mapping[str, Any]) -> dict[tuple[str, int], tuple[float, int]]:
        keys = zip(of["source"], of["row"], strict=True)
        return dict(zip(keys, zip(of["nll"], of["codes"], strict=True), strict=True))

    first, second = table(a), table(b)
    both = [key for key in first if key in second]
    _count("rows", len(both), len(first), len(second), notes)
    if not both:
        return []
    sums = np.array([[first[k][0], second[k][0]] for k in both]).T
    codes = np.array([[first[k][1], second[k][1]] for k in both]).T
    if (codes[0] != codes[1]).any():
        notes.append("rows: the models predict different codes of a row (layouts bos and none)")
        return []
    nll = sums / codes
    sources = np.array([source for source, _ in both])
    found = []
    for name in ("all", *dict.fromkeys(sources.tolist())):
        mine = np.ones(len(both), bool) if name == "all" else sources == name
        groups = np.arange(int(mine.sum()))
        found.append(_ratio(name, nll[0, mine], nll[1, mine], codes[0, mine], groups, seed=seed))
    return found


def _paired(
    a: Sequence[Mapping[str, Any]],
    b: Sequence[Mapping[str, Any]],
    what: str,
    notes: list[str],
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Return the entries of the targets that both have, in A's order."""
    second = {entry["id"]: entry for entry in b}
    both = [(entry, second[entry["id"]]) for entry in a if entry["id"] in second]
    _count(what, len(both), len(a), len(b), notes)
    return both


def _count(what: str, both: int, a: int, b: int, notes: list[str]) -> None:
    if both < max(a, b):
        notes.append(f"{what}: {both} in common; A has {a}, B has {b}")


def _prompts(
    a: Sequence[Mapping[str, Any]] | None,
    b: Sequence[Mapping[str, Any]] | None,
    notes: list[str],
    *,
    seed: int,
) -> list[Line]:
    if a is None or b is None:
        notes.append("the prompt experiment is not in both reports")
        return []
    both = _paired(a, b, "targets of the prompt experiment", notes)
    if not both:
        return []
    tasks = np.array([entry["task"] for entry, _ in both])
    groups = np.array([entry["group"] for entry, _ in both])
    found = []
    for kind in CONDITIONS:
        if any(kind not in x["nll"] or kind not in y["nll"] for x, y in both):
            continue
        nll = np.array([[x["nll"][kind], y["nll"][kind]] for x, y in both]).T
        names = ("all", *dict.fromkeys(tasks.tolist())) if kind == "right" else ("all",)
        for name in names:
            mine = np.ones(len(both), bool) if name == "all" else tasks == name
            label = f"{kind} prompt" if name == "all" else name
            ones = np.ones(int(mine.sum()))
            found.append(_ratio(label, nll[0, mine], nll[1, mine], ones, groups[mine], seed=seed))
    return sorted(found, key=lambda line: not line.name.endswith(" prompt"))


def _answers(
    a: Mapping[str, Any] | None, b: Mapping[str, Any] | None, notes: list[str], *, seed: int
) -> list[Line]:
    if a is None or b is None:
        notes.append("answers are not in both reports")
        return []
    if a["sampling"] != b["sampling"]:
        different = [k for k, v in a["sampling"].items() if b["sampling"].get(k) != v]
        said = ", ".join(f"{k} {a['sampling'][k]} and {b['sampling'].get(k)}" for k in different)
        notes.append(f"answers were drawn differently: {said}")
    both = _paired(a["targets"], b["targets"], "targets of the answers", notes)
    found = []
    pooled = [
        (x["scores"]["right"][POOLED], y["scores"]["right"][POOLED], x["group"]) for x, y in both
    ]
    if pooled and all(None not in entry for entry in pooled):
        found.append(_difference(f"all {POOLED}", pooled, more=True, primary=True, seed=seed))
    for task, part in a["tasks"].items():
        pairs = [(x, y) for x, y in both if x["task"] == task]
        if not pairs:
            continue
        other = b["tasks"][task]
        if (part["metric"], part["setting"]) != (other["metric"], other["setting"]):
            notes.append(
                f"{task}: scored differently, by {part['metric']} ({part['setting']}) and "
                f"{other['metric']} ({other['setting']})"
            )
            continue
        for name, better in part["better"].items():
            if name not in other["better"]:
                continue
            scores = [
                (x["scores"]["right"][name], y["scores"]["right"][name], x["group"])
                for x, y in pairs
            ]
            there = [(x, y, group) for x, y, group in scores if x is not None and y is not None]
            if there:
                line = _difference(
                    f"{task} {name}",
                    there,
                    more=better == "more",
                    primary=name == part["primary"],
                    seed=seed,
                )
                found.append(line)
    return found


def _difference(
    name: str,
    there: Sequence[tuple[float, float, str]],
    *,
    more: bool,
    primary: bool,
    seed: int,
) -> Line:
    a, b = np.array([[x, y] for x, y, _ in there]).T
    groups = np.array([group for *_, group in there])
    interval = bootstrap_mean(b - a, groups, seed=seed)
    return Line(
        name=name,
        a=float(a.mean()),
        b=float(b.mean()),
        kind="difference",
        value=float((b - a).mean()),
        low=interval["low"],
        high=interval["high"],
        n=len(there),
        groups=len(np.unique(groups)),
        more=more,
        primary=primary,
    )
