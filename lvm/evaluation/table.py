"""A report of `lvm.evaluate` as plain lines, for a terminal or a log."""

from collections.abc import Mapping
from typing import Any

CONDITIONS = ("right", "ranked", "best", "wrong", "none", "copy", "last", "mean")


def table(report: Mapping[str, Any]) -> str:
    """Write a report as plain lines."""
    lines = _corpus(report["corpus"])
    if "perplexity" in report:
        lines += ["", *_prompts(report)]
    if "answers" in report:
        lines += ["", *_answers(report["answers"])]
    return "\n".join(lines)


def interval(figures: Mapping[str, Any]) -> str:
    """Write 7.562 [6.84, 8.36], and a dash for what is undefined."""
    if figures["mean"] is None:
        return "–"
    if figures["low"] is None:
        return f"{figures['mean']:.4g} (one group: no interval)"
    return f"{figures['mean']:.4g} [{figures['low']:.4g}, {figures['high']:.4g}]"


def _corpus(found: Mapping[str, Any]) -> list[str]:
    def line(name: str, figures: Mapping[str, Any]) -> str:
        return (
            f"{name:<28} {figures['perplexity']:>12.3f} {figures['perplexity_lvm']:>12.3f} "
            f"{figures['images']:>9}"
        )

    return [
        f"{'perplexity':<28} {'by code':>12} {'by image':>12} {'images':>9}",
        line("all", found["all"]),
        *(line(f"source {name}", figures) for name, figures in found["sources"].items()),
        *(line(f"kind {name}", figures) for name, figures in found["kinds"].items()),
        *(line(f"image {f['position']} of a sentence", f) for f in found["positions"]),
    ]


def _prompts(report: Mapping[str, Any]) -> list[str]:
    lines = ["targets of pair sentences, mean and 95 % interval; LVM's: mean over targets of each"]
    for kind, figures in report["perplexity"].items():
        said = f"{interval(figures)}  LVM's {figures['lvm']:.4g}  n {figures['n']}"
        lines.append(f"  {kind + ' prompt':<26} {said}")
    for kind, figures in report["paired"].items():
        lines.append(f"  paired {kind:<19} {interval(figures)}")
    for shot in report["shots"]:
        lines.append(f"  {shot['pairs']} right pairs              {interval(shot)}")
    for task, parts in report["tasks"].items():
        ratios = ", ".join(f"{k} {interval(v)}" for k, v in parts["paired"].items())
        curve = " ".join(f"{shot['mean']:.4g}" for shot in parts["shots"])
        lines.append(f"  {task}: {ratios}; after 0, 1, … pairs {curve}")
    return lines


def _answers(found: Mapping[str, Any]) -> list[str]:
    lines = [
        "answers against the truth, mean over targets; copy: the query, last: the answer of the "
        "last pair, mean: the mean of the other targets",
    ]
    kinds = [k for k in CONDITIONS if any(k in _primary(part) for part in found["tasks"].values())]
    lines.append(f"  {'':<18} {'figure':<12}" + "".join(f"{kind:>9}" for kind in kinds) + "  n")
    for task, part in found["tasks"].items():
        for name, by in part["figures"].items():
            row = "".join(
                f"{by[kind]['mean']:>9.4g}"
                if kind in by and by[kind]["mean"] is not None
                else f"{'–':>9}"
                for kind in kinds
            )
            arrow = "↑" if part["better"][name] == "more" else "↓"
            first = f"  {task if name == part['primary'] else '':<18} {name + ' ' + arrow:<12}"
            lines.append(f"{first}{row}  {by['right']['n']}")
        for name in ("miou", "fid"):
            values = {k: v[name] for k, v in part["set"].items() if name in v}
            if values:
                said = ", ".join(f"{k} {v:.4g}" for k, v in values.items())
                lines.append(f"  {'':<18} {name} of the whole set: {said}")
        if part.get("fid_caution"):
            lines.append(f"  {'':<18} FID: {part['fid_caution']}")
    lines.append("right minus each, with 95 % interval, by the first figure of each source")
    for task, part in found["tasks"].items():
        name = part["primary"]
        said = ", ".join(f"{k} {interval(v)}" for k, v in part["paired"][name].items())
        lines.append(f"  {task} {name}: {said}")
    return lines


def _primary(part: Mapping[str, Any]) -> Mapping[str, Any]:
    return part["figures"][part["primary"]]
