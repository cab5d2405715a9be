"""What a probe's answers are worth: top-1, top-5, by class, with intervals; the printed table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lvm.evaluation.in_context import bootstrap_mean


def summary(
    top1: np.ndarray,
    top5: np.ndarray,
    labels: np.ndarray,
    *,
    classes: Sequence[str],
    groups: np.ndarray,
    seed: int = 0,
) -> dict[str, Any]:
    """Return shares of images right, from bool [n], with 95 % bootstrap intervals over groups [n].

    {"top1", "top5": {"mean", "low", "high"}, "class_mean": the mean of the classes' shares,
     "classes": {name: {"top1", "n"}}, of those that have an image}
    """
    by_class = {
        classes[k]: {"top1": float(top1[labels == k].mean()), "n": int((labels == k).sum())}
        for k in np.unique(labels).tolist()
    }
    return {
        "top1": bootstrap_mean(top1.astype(float), groups, seed=seed),
        "top5": bootstrap_mean(top5.astype(float), groups, seed=seed),
        "class_mean": float(np.mean([c["top1"] for c in by_class.values()])),
        "classes": by_class,
    }


def chance(train: np.ndarray, val: np.ndarray) -> dict[str, float]:
    """Return what needs no image: one guess of K, and the commonest class of training throughout.

    train [n], val [m] are labels.
    """
    common = int(np.bincount(train).argmax())
    return {
        "guess": 1 / (int(train.max()) + 1),
        "commonest": float((val == common).mean()),
    }


def table(report: Mapping[str, Any]) -> str:
    """Write a report as plain lines: accuracies in per cent with intervals."""
    lines = [
        f"{report['images']['val']} images of {len(report['classes'])} classes, "
        f"{report['images']['train']} to learn from; % right, 95 % interval over "
        f"{report['images']['groups']} groups",
        f"{'':<26} {'top-1':<22} {'top-5':<22} {'by class':>8}  chosen",
    ]
    for subject, kinds in report["results"].items():
        for kind, found in kinds.items():
            lines.append(
                f"{subject + ' ' + kind:<26} {percent(found['top1']):<22} "
                f"{percent(found['top5']):<22} {100 * found['class_mean']:>8.2f}  "
                f"{_chosen(found['chosen'])}"
            )
    guess = report["chance"]
    lines.append(
        f"without an image: {100 * guess['guess']:.2f} by guessing, {100 * guess['commonest']:.2f} "
        "by the commonest class"
    )
    for pair, kinds in report.get("paired", {}).items():
        for kind, found in kinds.items():
            lines.append(f"{pair + ' ' + kind:<26} top-1 {percent(found)}")
    return "\n".join(lines)


def percent(found: Mapping[str, Any]) -> str:
    """Write 78.51 [77.90, 79.12]."""
    mean = f"{100 * found['mean']:.2f}"
    if found["low"] is None:
        return f"{mean} (one group)"
    return f"{mean} [{100 * found['low']:.2f}, {100 * found['high']:.2f}]"


def _chosen(found: Mapping[str, Any]) -> str:
    blocks = found["blocks"]
    parts = [f"blocks {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]}-{blocks[-1]}"]
    parts += [f"{name} {found[name]:g}" for name in ("rate", "decay") if name in found]
    return ", ".join(parts)
