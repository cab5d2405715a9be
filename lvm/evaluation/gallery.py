"""Answers to look at, chosen by their scores and not by eye, and the page that shows them.

Of each source the best, the median and the worst by its first figure. The page is one file with its
pictures inside, bounded in number and size, and asks nothing of a network.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lvm.evaluation.judge import Judged, pictures
from lvm.evaluation.table import CONDITIONS
from tokenizer.cli import InputError
from tokenizer.files import atomic_write
from tokenizer.images import encode_image
from tokenizer.protocol import Tokenizer

MOST = 48  # answers shown in all
SIDE = 128  # pixels: larger pictures are averaged down to about this, and are JPEG
PLACES = ("best", "median", "worst")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One target with its answers; pictures are uint8 [H, W, 3]."""

    task: str
    place: str  # "best", "median" or "worst"
    key: str
    figure: str  # the one that chose it
    prompt: Sequence[np.ndarray]  # the query last
    wrong_prompt: Sequence[np.ndarray]
    target: np.ndarray
    candidates: Sequence[np.ndarray]  # of the right prompt, ranked first first
    others: Mapping[str, np.ndarray]  # "wrong" and "none"
    scores: Mapping[str, Mapping[str, float]]  # by condition and figure, defined ones alone


def chosen(order: np.ndarray, count: int) -> dict[str, list[int]]:
    """Return the first, middle and last `count` of an order, best first, under their names.

    Of fewer than three times `count` each is shown once, and there are as many of a name as there
    can be; one alone is the median.
    """
    if not len(order):
        return {}
    count = min(count, len(order) // 3)
    if not count:
        names = ("median",) if len(order) == 1 else ("best", "worst")
        return {name: [int(i)] for name, i in zip(names, order, strict=True)}
    middle = (len(order) - count) // 2
    return {
        "best": order[:count].tolist(),
        "median": order[middle : middle + count].tolist(),
        "worst": order[len(order) - count :].tolist(),
    }


def cases(
    tok: Tokenizer, judged: Judged, *, device: torch.device | str = "cpu", most: int = MOST
) -> list[Case]:
    """Return the best, median and worst answers of each task, at most about `most` in all."""
    prompts, answered = judged.answered.prompts, judged.answered

    def decoded(codes: Tensor) -> list[np.ndarray]:
        return list(pictures(tok, codes, device).permute(0, 2, 3, 1).numpy())

    each = max(1, most // (3 * len(judged.scored)))
    found = []
    for task, scored in judged.scored.items():
        where = {int(place): i for i, place in enumerate(scored.places)}
        for name, places in chosen(scored.best_first(), each).items():
            for s in places:
                figures = {
                    kind: {f: float(v[where[s]]) for f, v in of.items() if np.isfinite(v[where[s]])}
                    for kind, of in scored.values.items()
                }
                order = answered.order[s]
                found.append(
                    Case(
                        task=task,
                        place=name,
                        key=prompts.keys[s],
                        figure=scored.task.primary,
                        prompt=decoded(prompts.right[s]),
                        wrong_prompt=[] if prompts.wrong is None else decoded(prompts.wrong[s]),
                        target=decoded(prompts.target[s : s + 1])[0],
                        candidates=decoded(answered.codes["right"][s][order]),
                        others={
                            kind: decoded(answered.codes[kind][s])[0]
                            for kind in ("wrong", "none")
                            if kind in answered.codes
                        },
                        scores=figures,
                    )
                )
    return found


def data_uri(picture: np.ndarray) -> str:
    """Return uint8 [H, W, 3] as a data URI: PNG up to SIDE pixels, else averaged down and JPEG."""
    height, width = picture.shape[:2]
    factor = -(-max(height, width) // SIDE)
    format = "PNG" if factor == 1 else "JPEG"
    if factor > 1:
        picture = picture[: height - height % factor, : width - width % factor]
        blocks = picture.reshape(len(picture) // factor, factor, -1, factor, 3)
        picture = blocks.mean(axis=(1, 3)).round().astype(np.uint8)
    data = base64.b64encode(encode_image(picture, format=format)).decode()
    return f"data:image/{format.lower()};base64,{data}"


def figure(value: float | None) -> str:
    """Write a number with three or four significant digits, a dash for None."""
    return "–" if value is None else f"{value:.4g}" if abs(value) >= 100 else f"{value:.3g}"


def interval(found: Mapping[str, Any]) -> str:
    """Write 7.56 [6.84, 8.36]."""
    if found["mean"] is None or found["low"] is None:
        return figure(found["mean"])
    return f"{figure(found['mean'])} [{figure(found['low'])}, {figure(found['high'])}]"


def render(template: str, **values: Any) -> str:
    """Return a page of this package made from the template of that name."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(figure=figure, interval=interval, uri=data_uri)
    return environment.get_template(template).render(**values)


def write_page(path: Path, report: Mapping[str, Any], shown: Sequence[Case]) -> Path:
    """Write the page of a report of `lvm.evaluate` to `path`; returns `path`."""
    if path.suffix != ".html":
        raise InputError(f"{path} is to be a page; wanted a name that ends in .html")
    text = render(
        "evaluation.html.j2",
        report=report,
        answers=report.get("answers"),
        conditions=CONDITIONS,
        places=PLACES,
        cases=shown,
    )
    with atomic_write(path, "w") as file:
        file.write(text)
    return path
