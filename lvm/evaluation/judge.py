"""Draw answers to prompts made of held-out pairs, decode them, and score them against the truth.

A target is the last picture of a sentence of pairs. It is drawn after the pairs before it (right),
after pairs of another source (wrong), and after the query alone (none); beside these stand answers
that need no model:

    copy   the query itself        last   the answer of the last pair in the prompt
    mean   the mean of the other targets of the source

The data holds codes, so a target is what the tokenizer decodes from its codes: the tokenizer's own
error is no part of a score. All pictures are rounded to 8 bits before they are scored. S targets, C
candidates, n codes an image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lvm.evaluation.in_context import Prompts, bootstrap_mean
from lvm.evaluation.scores import mean_iou
from lvm.evaluation.tasks import Task, better, confusions, fit, measure, tasks_of
from lvm.generate import Sampling, decode, draw, rank
from lvm.model import Transformer
from tokenizer.cli import Progress
from tokenizer.fid import Moments, caution, frechet
from tokenizer.inception import Inception
from tokenizer.perceptual import Perceptual
from tokenizer.protocol import Tokenizer

CHUNK = 64  # pictures decoded or scored at once
FEW = 2  # targets of a task below which there is no mean of the others
By = Literal["likelihood", "gain"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What was drawn for S prompts; C is 1 for the wrong prompt and none."""

    prompts: Prompts
    codes: Mapping[str, Tensor]  # int64 [S, C, n] by condition
    order: Tensor  # int64 [S, C], the candidates of "right", the one to show first


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Figures of the targets of one task; `values[condition][figure]` is fp64 [s]."""

    task: Task
    places: np.ndarray  # int [s], where its targets are among the prompts
    values: Mapping[str, Mapping[str, np.ndarray]]
    whole: Mapping[str, Mapping[str, float]]  # by condition: figures of the set, no mean of any

    def best_first(self) -> np.ndarray:
        """Return places, int [≤ s], by the primary figure of the ranked answer, best first.

        Targets whose figure is undefined are left out.
        """
        name = self.task.primary
        values = self.values["ranked"][name]
        sign = -1 if better(self.task.metric)[name] else 1
        order = np.argsort(sign * values, kind="stable")
        return self.places[order[np.isfinite(values[order])]]


def answer(
    model: Transformer,
    prompts: Prompts,
    sampling: Sampling,
    *,
    by: By = "likelihood",
    batch: int = 32,
    show: bool = False,
) -> Answered:
    """Draw answers of one image for each prompt, `batch` prompts at a time, in all conditions."""
    kinds = {"right": prompts.right, "none": prompts.shots(0)}
    if prompts.wrong is not None:
        kinds["wrong"] = prompts.wrong
    found: dict[str, Tensor] = {}
    orders = []
    total = len(kinds) * len(prompts.target)
    with Progress("answer", total=total, unit="prompts", enabled=show) as progress:
        for kind, contexts in kinds.items():
            how = sampling if kind == "right" else replace(sampling, candidates=1)
            parts = []
            for part in contexts.split(batch):
                drawn = draw(model, part, how)
                parts.append(drawn.codes[:, :, 0].cpu())
                if kind == "right" and sampling.candidates > 1:
                    orders.append(rank(model, part, drawn, by=by).cpu())
                progress.update(len(part))
            found[kind] = torch.cat(parts)
    single = torch.zeros(len(prompts.target), 1, dtype=torch.long)
    return Answered(prompts=prompts, codes=found, order=torch.cat(orders) if orders else single)


def pictures(tok: Tokenizer, codes: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Return uint8 [..., 3, H, W] of codes [..., n], on the CPU."""
    flat = codes.reshape(-1, codes.shape[-1])
    parts = [
        (decode(tok, part.to(device)).float() * 255).round().to(torch.uint8).cpu()
        for part in flat.split(CHUNK)
    ]
    images = torch.cat(parts)
    return images.view(*codes.shape[:-1], *images.shape[1:])


def score(
    tok: Tokenizer,
    answered: Answered,
    tasks: Mapping[str, Task],
    *,
    device: torch.device | str = "cpu",
    perceptual: Perceptual | None = None,
    inception: Inception | None = None,
    show: bool = False,
) -> dict[str, Scored]:
    """Score all answers, task by task; `perceptual` and `inception` are on `device`."""
    names = np.asarray(answered.prompts.tasks)
    found = {}
    with Progress("score", total=len(names), unit="targets", enabled=show) as progress:
        for name in dict.fromkeys(answered.prompts.tasks):
            places = np.flatnonzero(names == name)
            found[name] = _score_task(
                tok, answered, places, tasks[name],
                device=device, perceptual=perceptual, inception=inception,
            )  # fmt: skip
            progress.update(len(places))
    return found


def _score_task(
    tok: Tokenizer,
    answered: Answered,
    places: np.ndarray,
    task: Task,
    *,
    device: torch.device | str,
    perceptual: Perceptual | None,
    inception: Inception | None,
) -> Scored:
    prompts, index = answered.prompts, torch.from_numpy(places)
    targets = pictures(tok, prompts.target[index], device)
    task = fit(task, targets.float() / 255)
    sets = {}  # candidates as pictures, uint8 [s, C, 3, H, W]
    for kind, codes in answered.codes.items():
        sets[kind] = pictures(tok, codes[index], device)
    sets["copy"] = pictures(tok, prompts.right[index][:, -1:], device)
    if prompts.right.shape[1] > 1:
        sets["last"] = pictures(tok, prompts.right[index][:, -2:-1], device)
    if len(places) >= FEW:
        others = (targets.double().sum(0) - targets.double()) / (len(places) - 1)
        sets["mean"] = others.round().to(torch.uint8)[:, None]

    figures = {kind: _measure(task, images, targets, device, perceptual)
               for kind, images in sets.items()}  # fmt: skip
    right = figures.pop("right")  # [s, C]
    first = answered.order[index][:, :1].numpy()
    own = {
        "right": {k: v.mean(1) for k, v in right.items()},
        "ranked": {k: np.take_along_axis(v, first, 1)[:, 0] for k, v in right.items()},
    }
    if first.size and right[task.primary].shape[1] > 1:
        up = better(task.metric)
        own["best"] = {k: v.max(1) if up[k] else v.min(1) for k, v in right.items()}
    whole: dict[str, dict[str, float]] = {}
    for kind, images in sets.items():
        if (areas := _areas(task, images, targets, device)) is not None:
            whole.setdefault(kind, {})["miou"] = areas
        if inception is not None and len(places) > 1:
            whole.setdefault(kind, {})["fid"] = fid(inception, images, targets, device)
    return Scored(
        task=task,
        places=places,
        values=own | {kind: {k: v[:, 0] for k, v in f.items()} for kind, f in figures.items()},
        whole=whole,
    )


def _measure(
    task: Task,
    images: Tensor,
    targets: Tensor,
    device: torch.device | str,
    perceptual: Perceptual | None,
) -> dict[str, np.ndarray]:
    """Return figures [s, C] of candidates [s, C, 3, H, W] against targets [s, 3, H, W]."""
    candidates = images.shape[1]
    flat, wanted = images.flatten(0, 1), targets.repeat_interleave(candidates, 0)
    parts: dict[str, list[Tensor]] = {}
    for a, b in zip(flat.split(CHUNK), wanted.split(CHUNK), strict=True):
        found = measure(
            task, a.to(device).float() / 255, b.to(device).float() / 255, perceptual=perceptual
        )
        for name, values in found.items():
            parts.setdefault(name, []).append(values)
    return {name: torch.cat(v).view(-1, candidates).numpy() for name, v in parts.items()}


def _areas(task: Task, images: Tensor, targets: Tensor, device: torch.device | str) -> float | None:
    """Return the mIoU of the summed confusions, as segmentation benchmarks have it."""
    total, candidates = None, images.shape[1]
    flat, wanted = images.flatten(0, 1), targets.repeat_interleave(candidates, 0)
    for a, b in zip(flat.split(CHUNK), wanted.split(CHUNK), strict=True):
        counts = confusions(task, a.to(device).float() / 255, b.to(device).float() / 255)
        if counts is None:
            return None
        total = counts.sum(0) if total is None else total + counts.sum(0)
    return None if total is None else float(mean_iou(total))


def fid(inception: Inception, images: Tensor, targets: Tensor, device: torch.device | str) -> float:
    """Return the Fréchet distance of all candidates uint8 [s, C, 3, H, W] to the targets."""
    answers, truths = Moments(), Moments()
    for moments, pool in ((answers, images.flatten(0, 1)), (truths, targets)):
        for part in pool.split(CHUNK):
            moments.update(inception(part.to(device)))
    return frechet(answers, truths)


def summarise_scores(
    scored: Mapping[str, Scored],
    groups: Sequence[str],
    *,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Return means with 95 % bootstrap intervals over groups, by task, figure and condition.

        {task: {"metric", "setting", "primary", "n", "better": {figure: "more" | "less"},
                "figures": {figure: {condition: {"mean", "low", "high", "n"}}},
                "paired": {figure: {condition: the same, of right minus this}},
                "set": {condition: {"miou", "fid"}}, "fid_caution"}}

    Conditions: right (the mean over candidates), with several of them ranked (the candidate that is
    ranked first) and best (by each metric, with the truth known), wrong, none, copy, last, mean.
    """
    names, report = np.asarray(groups), {}
    for task, found in scored.items():
        own = names[found.places]
        kinds = {k: v for k, v in found.values.items() if k != "ranked" or "best" in found.values}

        def interval(values: np.ndarray, own: np.ndarray = own) -> dict[str, Any]:
            there = np.isfinite(values)
            if not there.any():
                return {"mean": None, "low": None, "high": None, "n": 0}
            interval = bootstrap_mean(values[there], own[there], draws=draws, seed=seed)
            return {**interval, "n": int(there.sum())}

        up = better(found.task.metric)
        right = found.values["right"]
        figures = sorted(right, key=list(up).index)
        others = [k for k in found.values if k not in ("right", "ranked", "best")]
        report[task] = {
            "metric": found.task.metric,
            "setting": found.task.said,
            "primary": found.task.primary,
            "n": len(found.places),
            "better": {f: "more" if up[f] else "less" for f in figures},
            "figures": {
                f: {kind: interval(values[f]) for kind, values in kinds.items()} for f in figures
            },
            "paired": {
                f: {k: interval(right[f] - found.values[k][f]) for k in others} for f in figures
            },
            "set": {kind: dict(values) for kind, values in found.whole.items()},
        }
        if any("fid" in values for values in found.whole.values()):
            report[task]["fid_caution"] = caution(len(found.places))
    return report


def per_target(
    scored: Mapping[str, Scored], prompts: Prompts, groups: Sequence[str]
) -> list[dict[str, Any]]:
    """Return one entry a target: {"task", "key", "id", "group", "scores": {condition: {figure}}}.

    Six significant digits; None where a metric says nothing.
    """
    entries: list[tuple[int, dict[str, Any]]] = []
    names = prompts.ids
    for task, found in scored.items():
        for i, place in enumerate(found.places.tolist()):
            scores = {
                kind: {f: _short(v[i]) for f, v in values.items()}
                for kind, values in found.values.items()
            }
            about = {"task": task, "key": prompts.keys[place], "id": names[place]}
            entries.append((place, {**about, "group": groups[place], "scores": scores}))
    return [entry for _, entry in sorted(entries, key=lambda pair: pair[0])]


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Answers, their scores, and the part of a report that they make."""

    answered: Answered
    scored: Mapping[str, Scored]
    report: dict[str, Any]


def judge(
    model: Transformer,
    tok: Tokenizer,
    prompts: Prompts,
    sampling: Sampling,
    *,
    groups: Sequence[str],
    tasks: Sequence[str] = (),
    by: By = "likelihood",
    batch: int = 32,
    perceptual: Perceptual | None = None,
    inception: Inception | None = None,
    show: bool = False,
) -> Judged:
    """Answer and score prompts; `groups` as `summarise` has them, `tasks` as `tasks_of`.

    The report: {"sampling", "rank", "against", "tasks": as `summarise_scores`, "targets": as
    `per_target`}.
    """
    chosen = tasks_of(dict.fromkeys(prompts.tasks), tasks)
    device = model.embed.weight.device
    answered = answer(model, prompts, sampling, by=by, batch=batch, show=show)
    scored = score(
        tok, answered, chosen, device=device, perceptual=perceptual, inception=inception, show=show
    )
    return Judged(
        answered=answered,
        scored=scored,
        report={
            "sampling": asdict(sampling),
            "rank": by,
            "against": "targets decoded from their codes",
            "tasks": summarise_scores(scored, groups, seed=sampling.seed),
            "targets": per_target(scored, prompts, groups),
        },
    )
