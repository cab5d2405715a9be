"""One HTML page about a demo: does the prompt help, and what do the answers look like?

The page is a single file with its pictures and plots inside; it opens without a network. What was
not measured is said to be missing, never left out in silence.
"""

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokenizer.cli import duration
from tokenizer.files import atomic_write
from tokenizer.images import encode_image

INK = "#010203"  # in plots: becomes the page's text colour, light or dark
HUES = {"right": "#2a9d63", "none": "#d08c1d", "wrong": "#c8374a"}
RATIOS = {"none/right": "no prompt", "wrong/right": "a prompt of another task"}
PLACES = ("best", "median", "worst")
CONDITIONS = (
    "right",
    "none",
    "wrong",
    "copy",
    "last",
    "mean",
)  # of answers, as lvm.evaluation.judge has them

Figures = Mapping[str, float | None]  # "mean", and "low" and "high" of a 95 % interval or None


def write_report(
    results: Mapping[str, Any], pictures: Mapping[str, np.ndarray | Path], out: Path
) -> Path:
    """Write the page to the file `out`; return `out`.

    `pictures` maps names to uint8 [H, W, 3] arrays or PNG files; a name in `results` that is not in
    it raises ValueError. `results` has, all optional:

        "perplexity"  {"right" | "wrong" | "none": {"mean", "low", "high", "n"}}
        "paired"      {"none/right" | "wrong/right": {"mean", "low", "high"}}
        "shots"       [{"pairs", "mean", "low", "high", "n"}], perplexity after that many pairs
        "tasks"       {task: {"perplexity": …, "paired": …}}; so far as lvm.evaluate writes them
        "scores"      {task: {"metric", "setting", "primary", "n", "better", "figures"}}, as
                      `lvm.evaluation.judge.summarise_scores`
        "analogies"   [{"task", "place": "best" | "median" | "worst", "figure", "key", "prompt":
                      [names, the query last], "wrong_prompt": [names], "target": name, "answers":
                      {"right" | "wrong" | "none": name}, "scores": {the same: {figure: value}}}]
        "sequences"   [{"source", "given": [names], "drawn": [names], "true": [names], "psnr": [dB],
                      "psnr_still": [dB of the last given frame]}]
        "sentences"   [{"source", "kind", "rows": [[[names of a sentence], …], …]}]
        "temperature" of the answers; these five as examples.answers writes them
        "tokenizer"   {"psnr", "ssim", "codes_used", "codebook_size", "perplexity", "images"}, and
                      in `pictures` under "reconstructions" originals above what came back
        "curves"      {"tokenizer": lines of metrics.jsonl as dicts, "model": the same}
        "stages"      [{"name", "seconds", "commands": [[words], …]}]
        "about"       {heading: {label: text}}: machine, versions, data, …
        "notes"       [text], shown under the verdict
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(interval=interval, duration=duration, figure=figure)
    curves = results.get("curves", {})
    page = environment.get_template("report.html.j2").render(
        verdicts=[verdict(results.get("paired", {}).get(ratio), RATIOS[ratio]) for ratio in RATIOS],
        order=order(results.get("perplexity", {})),
        perplexity=results.get("perplexity", {}),
        tasks=results.get("tasks", {}),
        shots=results.get("shots", []),
        forest=forest(results) if results.get("paired") else "",
        shots_plot=shots_plot(results["shots"]) if results.get("shots") else "",
        scores=results.get("scores", {}),
        conditions=CONDITIONS,
        analogies=by_task(results.get("analogies", [])),
        places=PLACES,
        sequences=results.get("sequences", []),
        sentences=results.get("sentences", []),
        temperature=results.get("temperature"),
        tokenizer=results.get("tokenizer", {}),
        reconstructions="reconstructions" if "reconstructions" in pictures else "",
        plots=[plot for plot in (curve(curves, *axis) for axis in CURVES) if plot],
        stages=results.get("stages", []),
        total=sum(stage["seconds"] for stage in results.get("stages", [])),
        about=results.get("about", {}),
        notes=results.get("notes", []),
        uri=lambda name: data_uri(name, pictures),
        hues=HUES,
    )
    with atomic_write(out, "w") as file:
        file.write(page)
    return out


def verdict(found: Figures | None, text: str) -> dict[str, str]:
    """Say what a paired ratio shows: "helps", "hurts", "not shown" or "not measured"."""
    if found is None:
        return {"word": "not measured", "ratio": "–", "line": f"{text}: not measured"}
    low, high = found["low"], found["high"]
    if low is None or high is None:
        word = "not shown"
        reason = "one group of targets gives no interval"
    elif low > 1.0:
        word, reason = "helps", "the interval lies above 1"
    elif high < 1.0:
        word, reason = "hurts", "the interval lies below 1"
    else:
        word, reason = "not shown", "the interval reaches 1"
    return {
        "word": word,
        "ratio": f"×{interval(found)}",
        "line": f"perplexity of a held-out target with {text}, over that with the right one;"
        f" {reason}",
    }


def order(perplexity: Mapping[str, Figures]) -> str:
    """Write the conditions from the least to the most perplexing, such as right < none < wrong."""
    return " < ".join(sorted(perplexity, key=lambda kind: perplexity[kind]["mean"] or math.inf))


def interval(found: Figures) -> str:
    """Write 7.56 [6.84, 8.36]."""
    if found["low"] is None or found["high"] is None:
        return figure(found["mean"])
    return f"{figure(found['mean'])} [{figure(found['low'])}, {figure(found['high'])}]"


def figure(value: float | None) -> str:
    """Write a number with three decimals near one, fewer where it is larger."""
    if value is None:
        return "–"
    return (
        f"{value:.3f}" if abs(value) < 4 else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
    )


def by_task(
    analogies: Sequence[Mapping[str, Any]],
) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Return the entry of each place of each task; one entry a place."""
    tasks: dict[str, dict[str, Mapping[str, Any]]] = {}
    for entry in analogies:
        tasks.setdefault(entry["task"], {})[entry["place"]] = entry
    return tasks


def data_uri(name: str, pictures: Mapping[str, np.ndarray | Path]) -> str:
    """Return a picture as a PNG data URI."""
    if name not in pictures:
        raise ValueError(f'the results name a picture "{name}" that is not among the pictures')
    picture = pictures[name]
    data = picture.read_bytes() if isinstance(picture, Path) else encode_image(picture)
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


CURVES = (  # part, field of metrics.jsonl, heading
    ("tokenizer", "loss", "tokenizer: loss"),
    ("tokenizer", "psnr", "tokenizer: PSNR of the batch, dB"),
    ("model", "nll", "model: loss a code, nats"),
)


def curve(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], part: str, key: str, title: str
) -> str:
    """Plot one field of a training's log over its steps; nothing where there are no two points."""
    points = [(line["step"], line[key]) for line in curves.get(part, []) if key in line]
    if len(points) < 2:
        return ""
    figure_, axes = _axes(4.6, 2.7)
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, color="#3b7dd8", linewidth=1.4)
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    axes.set_xlabel("step", color=INK)
    return _svg(figure_, f"{title}: from {figure(values[0])} to {figure(values[-1])}")


def shots_plot(shots: Sequence[Mapping[str, Any]]) -> str:
    """Plot perplexity over the number of pairs in front of the query."""
    figure_, axes = _axes(4.6, 2.7)
    pairs, means = [s["pairs"] for s in shots], [s["mean"] for s in shots]
    axes.plot(pairs, means, "o-", color=HUES["right"], linewidth=1.4, markersize=5)
    for shot in shots:
        if shot["low"] is not None:
            axes.plot(
                [shot["pairs"]] * 2, [shot["low"], shot["high"]], color=HUES["right"], alpha=0.5
            )
    axes.set_xticks(pairs)
    axes.set_xlabel("right pairs before the query", color=INK)
    axes.set_title("perplexity of the target", fontsize=10, loc="left", color=INK)
    return _svg(figure_, "perplexity by number of pairs: " + ", ".join(map(figure, means)))


def forest(results: Mapping[str, Any]) -> str:
    """Draw the paired ratios of all targets and of each task, with their intervals."""
    rows = [("all", results["paired"])]
    rows += [(name, parts["paired"]) for name, parts in sorted(results.get("tasks", {}).items())]
    figure_, axes = _axes(6.6, 0.8 + 0.3 * len(rows))
    for y, (_, paired) in enumerate(rows):
        for ratio, shift in (("none/right", -0.13), ("wrong/right", 0.13)):
            found = paired.get(ratio)
            if found is None:
                continue
            colour = HUES[ratio.split("/")[0]]
            axes.plot(found["mean"], y + shift, "o", color=colour, markersize=6 if y == 0 else 4)
            if found["low"] is not None:
                ends = [found["low"], found["high"]]
                axes.plot(ends, [y + shift] * 2, color=colour, linewidth=2.2 if y == 0 else 1.4)
    axes.axvline(1.0, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [t for t in (0.5, 0.8, 1, 1.25, 1.5, 2, 3, 5, 10, 20) if low <= t <= high]
    axes.set_xticks(ticks, [f"×{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    return _svg(
        figure_, "paired perplexity ratios of all targets and of each task, as in the table"
    )


def _axes(width: float, height: float) -> tuple[Any, Any]:
    """Return a figure without a window and its one set of axes, in the page's ink."""
    from matplotlib.figure import Figure

    figure_ = Figure(figsize=(width, height), layout="constrained")
    figure_.patch.set_alpha(0.0)
    axes = figure_.subplots()
    axes.patch.set_alpha(0.0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(alpha=0.15, color=INK)
    return figure_, axes


def _svg(figure_: Any, text: str) -> Any:
    """Return a plot as an inline SVG element with `text` for those who cannot see it."""
    from markupsafe import Markup, escape
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": text}):
        figure_.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # without the document type, which names a web address
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="([\d.]+)pt"', r'\1 style="max-width:\2pt"', svg, count=1)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(text)}"', 1)
    return Markup(svg.replace(INK, "currentColor"))
