"""Which metric judges which source of pairs, and what of it is known only from the targets.

    image      PSNR, SSIM, MSE and, where weights are given, LPIPS: measured for every source
    mask       two classes, by the brightness of a pixel          IoU of the bright one, mIoU
    segment    many classes, by the nearest colour of a palette   mIoU
    depth      brightness as depth or inverse depth               RMSE, delta < 1.25
    edges      bright lines on dark, or dark on bright            F, precision, recall
    colour     colours of a picture                               MSE of a* and b*
    keypoints  spots, a colour each                               PCK

The name of a source says which; `--task SOURCE=METRIC` says it otherwise.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lvm.evaluation import scores
from tokenizer.cli import InputError
from tokenizer.metrics import WINDOW, psnr, ssim
from tokenizer.perceptual import Perceptual

FIGURES = {  # of each metric, the first orders its answers; True where more is better
    "image": {"psnr": True, "ssim": True, "mse": False},
    "mask": {"iou": True, "miou": True},
    "segment": {"miou": True},
    "depth": {"rmse": False, "delta": True},
    "edges": {"f": True, "precision": True, "recall": True},
    "colour": {"chroma_mse": False},
    "keypoints": {"pck": True},
}
NAMES = (  # of sources, the first that matches
    ("segment", "segment|semantic|panoptic|(?:^|[-_])seg(?:$|[-_])"),
    ("mask", "mask|foreground|silhouette|saliency"),
    ("depth", "depth|disparity"),
    ("edges", "edge|canny|hed(?:$|[-_])|boundar|sketch|contour"),
    ("colour", "colori[sz]|colouri[sz]"),
    ("keypoints", "keypoint|pose|skeleton|joints"),
)
HALF = 0.5
COLOUR = re.compile("#[0-9a-fA-F]{6}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A source's metric and its setting; what stays None is found in the targets."""

    metric: str = "image"
    level: float | None = None  # mask: brighter is foreground; edges: where a line begins
    palette: Tensor | None = None  # segment, keypoints: [K, 3]; keypoints: the background first
    aligned: bool = False  # depth: after the best scale and shift of each answer
    dark: bool = False  # edges: dark lines on bright
    tolerance: float | None = None  # edges: in pixels
    alpha: float = 0.1  # keypoints

    @property
    def primary(self) -> str:
        """The figure by which answers are ordered."""
        return next(iter(FIGURES[self.metric]))

    @property
    def said(self) -> str:
        """The settings in words, after `fit`."""
        if self.metric == "mask":
            return f"foreground is brighter than {self.level or HALF:g}"
        if self.metric in ("segment", "keypoints") and self.palette is not None:
            colours = " ".join(
                "#" + "".join(f"{round(255 * c):02x}" for c in row) for row in self.palette.tolist()
            )
            near = f"; near is {self.alpha:g} of their box" if self.metric == "keypoints" else ""
            return f"{len(self.palette)} colours {colours}{near}"
        if self.metric == "depth":
            return "luminance is depth" + (", scale and shift fitted" if self.aligned else "")
        if self.metric == "edges":
            lines = "darker" if self.dark else "brighter"
            return f"lines are {lines} than {self.level:.2f}, tolerance {self.tolerance:.3g} pixels"
        return ""


def better(metric: str) -> dict[str, bool]:
    """Return the figures of a metric, those of every picture too; True where more is better."""
    return FIGURES[metric] | FIGURES["image"] | {"lpips": False, "vgg": False, "vgg-hed": False}


def tasks_of(sources: Iterable[str], given: Sequence[str] = ()) -> dict[str, Task]:
    """Return the task of each source, by its name or as `given` ("SOURCE=METRIC[:SETTING]").

    Settings: mask:LEVEL, segment:#rrggbb,…, depth:align, edges:PIXELS, keypoints:ALPHA or
    keypoints:#background,#first,…
    """
    names = list(sources)
    found = {name: Task(metric=_by_name(name)) for name in names}
    for text in given:
        source, separator, rest = text.partition("=")
        metric, _, setting = rest.partition(":")
        if not separator or metric not in FIGURES:
            raise InputError(
                f"--task {text}: wanted SOURCE=METRIC with one of {', '.join(FIGURES)}; a setting "
                "may follow, as in faces=mask:0.3"
            )
        if source not in found:
            raise InputError(
                f"--task {text}: no pair source is named {source!r}; these are: "
                f"{', '.join(names) or 'none'}"
            )
        found[source] = _with_setting(Task(metric=metric), setting, text)
    return found


def _by_name(source: str) -> str:
    return next((metric for metric, rule in NAMES if re.search(rule, source.lower())), "image")


def _with_setting(task: Task, setting: str, text: str) -> Task:
    if not setting:
        return task
    colours = setting.split(",")
    painted = all(COLOUR.fullmatch(c) for c in colours) and len(colours) > 1
    if task.metric in ("segment", "keypoints") and painted:
        rows = [[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in colours]
        return replace(task, palette=torch.tensor(rows, dtype=torch.float64))
    if task.metric == "depth" and setting == "align":
        return replace(task, aligned=True)
    try:
        value = float(setting)
    except ValueError:
        value = -1.0
    if task.metric == "mask" and 0 < value < 1:
        return replace(task, level=value)
    if task.metric == "edges" and 0 < value < 1e4:
        return replace(task, tolerance=value)
    if task.metric == "keypoints" and 0 < value < 1:
        return replace(task, alpha=value)
    wanted = {
        "mask": "a brightness between 0 and 1, as mask:0.5",
        "segment": "two colours or more, as segment:#000000,#ffffff",
        "depth": "depth:align or nothing",
        "edges": "a distance in pixels, as edges:2",
        "keypoints": "a share between 0 and 1, as keypoints:0.1, or colours, the background first",
    }.get(task.metric, "nothing after the metric")
    raise InputError(f"--task {text}: the setting {setting!r} is none; wanted {wanted}")


def fit(task: Task, targets: Tensor) -> Task:
    """Return the task with what was not given taken from its targets [B, 3, H, W] in [0, 1]."""
    if task.metric == "segment" and task.palette is None:
        return replace(task, palette=scores.find_palette(targets))
    if task.metric == "keypoints" and task.palette is None:
        return replace(task, palette=scores.find_palette(targets, share=2e-4))
    if task.metric == "mask":
        return replace(task, level=task.level or HALF)
    if task.metric == "edges":
        bright = scores.luminance(targets)
        low, high = np.quantile(bright.cpu().numpy(), [0.01, 0.99])
        return replace(
            task,
            level=float(low + high) / 2,  # thin lines never reach white on a small picture
            dark=bool(bright.median() > (low + high) / 2),  # lines are the smaller part
            tolerance=task.tolerance or scores.edge_tolerance(*targets.shape[2:]),
        )
    return task


def measure(
    task: Task, answers: Tensor, targets: Tensor, *, perceptual: Perceptual | None = None
) -> dict[str, Tensor]:
    """Return the figures fp64 [B] of answers [B, 3, H, W] in [0, 1]: the task's, then those of any
    picture. `task` is as `fit` returns it."""
    found = _OWN[task.metric](task, answers, targets) if task.metric in _OWN else {}
    found |= {"psnr": psnr(answers, targets), "mse": scores.mse(answers, targets)}
    if min(answers.shape[2:]) >= WINDOW:  # smaller pictures have no SSIM
        found["ssim"] = ssim(answers, targets)
    if perceptual is not None:
        found[perceptual.name] = perceptual(answers.float(), targets.float()).double()
    return {name: values.cpu() for name, values in found.items()}


def confusions(task: Task, answers: Tensor, targets: Tensor) -> Tensor | None:
    """Return [B, K, K] of masks and segmentations, None of other tasks."""
    if task.metric == "mask":
        found, wanted = (scores.by_threshold(x, task.level or HALF) for x in (answers, targets))
        return scores.confusion(found, wanted, 2)
    if task.metric == "segment":
        assert task.palette is not None
        found, wanted = (scores.by_palette(x, task.palette) for x in (answers, targets))
        return scores.confusion(found, wanted, len(task.palette))
    return None


def _areas(task: Task, answers: Tensor, targets: Tensor) -> dict[str, Tensor]:
    counts = confusions(task, answers, targets)
    assert counts is not None
    found = {"miou": scores.mean_iou(counts)}
    return {"iou": scores.iou(counts)[:, 1], **found} if task.metric == "mask" else found


def _depth(task: Task, answers: Tensor, targets: Tensor) -> dict[str, Tensor]:
    depth, wanted = scores.depth_of(answers), scores.depth_of(targets)
    if task.aligned:
        depth = scores.align(depth, wanted)
    return {
        "rmse": scores.depth_rmse(depth, wanted),
        "delta": scores.depth_delta(depth, wanted),
    }


def _edges(task: Task, answers: Tensor, targets: Tensor) -> dict[str, Tensor]:
    assert task.level is not None and task.tolerance is not None
    found, wanted = (
        scores.lines_of(x, dark=task.dark, level=task.level) for x in (answers, targets)
    )
    precision, recall, f = scores.edge_scores(found, wanted, task.tolerance)
    return {"f": f, "precision": precision, "recall": recall}


def _colour(task: Task, answers: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return {"chroma_mse": scores.chroma_mse(answers, targets)}


def _keypoints(task: Task, answers: Tensor, targets: Tensor) -> dict[str, Tensor]:
    assert task.palette is not None
    found, wanted = (scores.keypoints(x, task.palette) for x in (answers, targets))
    return {"pck": scores.pck(found, wanted, task.alpha)}


_OWN: Mapping[str, Callable[[Task, Tensor, Tensor], dict[str, Tensor]]] = {
    "mask": _areas, "segment": _areas, "depth": _depth, "edges": _edges, "colour": _colour,
    "keypoints": _keypoints,
}  # fmt: skip
