"""The report: every section is there, what is missing is said, nothing is fetched from outside."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.report import PLACES, by_task, verdict, write_report
from tokenizer.images import save_image

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

SECTIONS = [
    *("verdict", "tasks", "shots", "analogies", "sequences"),
    *("sentences", "tokenizer", "training", "about"),
]


def ci(mean: float, spread: float = 0.05) -> dict[str, float]:
    return {"mean": mean, "low": mean * (1 - spread), "high": mean * (1 + spread)}


def made_up(count: int = 12) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return results as the demo's stages write them, and random pictures for their names."""
    rng = np.random.default_rng(0)
    pictures: dict[str, Any] = {"reconstructions": rng.integers(0, 256, (68, 200, 3), np.uint8)}

    def name() -> str:
        pictures[f"{len(pictures):04d}.png"] = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        return f"{len(pictures) - 1:04d}.png"

    def names(n: int) -> list[str]:
        return [name() for _ in range(n)]

    kinds = ("right", "wrong", "none")
    perplexity = {k: {**ci(m, 0.1), "n": 300} for k, m in zip(kinds, (7, 13, 8), strict=True)}
    paired = {"none/right": ci(1.08, 0.02), "wrong/right": ci(1.9)}
    task = {"perplexity": perplexity, "paired": paired}
    results = {
        "perplexity": perplexity,
        "paired": paired,
        "tasks": {"negative": task, "depth-warm": task},
        "shots": [{"pairs": k, **ci(8 - k * 0.2, 0.1), "n": 300} for k in range(4)],
        "temperature": 0.8,
        "scores": {
            task: {
                "metric": "image",
                "setting": "",
                "primary": figure,
                "n": 8,
                "better": {figure: "more"},
                "figures": {figure: {k: {**ci(20), "n": 8} for k in (*kinds, "copy", "mean")}},
            }
            for task, figure in (("negative", "psnr"), ("depth-warm", "rmse"))
        },
        "analogies": [
            {
                "task": ("negative", "depth-warm")[i // 3 % 2],
                "place": PLACES[i % 3],
                "figure": ("psnr", "rmse")[i // 3 % 2],
                "key": f"targets/map07-{i:02d}/003.png",
                "prompt": names(7),
                "wrong_prompt": names(7),
                "target": name(),
                "answers": {k: name() for k in kinds},
                "scores": {k: {"psnr": 30.0 - i, "rmse": 0.5 + i} for k in kinds},
            }
            for i in range(count)
        ],
        "sequences": [
            {
                "source": "walk",
                "given": names(6),
                "drawn": names(2),
                "true": names(2),
                "psnr": [20.1, 18.0],
                "psnr_still": [19.0, 17.5],
            }
        ],
        "sentences": [{"source": "photo", "kind": "image", "rows": [[names(1) for _ in range(8)]]}],
        "tokenizer": {
            "psnr": 26.7,
            "ssim": 0.83,
            "codes_used": 400,
            "codebook_size": 512,
            "perplexity": 235.0,
            "images": 1500,
        },
        "curves": {
            "tokenizer": [{"step": s, "loss": 1 / s, "psnr": 20 + s / 100} for s in range(1, 99)],
            "model": [{"step": s, "nll": 6 - s / 50} for s in range(1, 99)],
        },
        "stages": [{"name": "render", "seconds": 42.5, "commands": [["examples.render", "--out"]]}],
        "about": {"Machine": {"processor": "two <fast> cores"}},
    }
    return results, pictures


class Page(HTMLParser):
    """Collects what a page has: sections, attributes that load something, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.loads: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "section":
            self.sections.append(found["id"] or "")
        self.loads += [v or "" for k, v in attrs if k in ("src", "srcset", "data", "poster")]
        # The SVG of a plot refers to its own parts.
        self.loads += [
            v or "" for k, v in attrs if k.endswith("href") and not f"{v}".startswith("#")
        ]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_every_section_is_there_and_nothing_comes_from_outside(tmp_path: Path) -> None:
    results, pictures = made_up()
    text = write_report(results, pictures, tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.sections == SECTIONS
    assert page.loads and all(v.startswith("data:image/png;base64,") for v in page.loads)
    assert not re.search(r"@import|url\((?!#)|<script|<link|<iframe", text)
    # Names of XML formats are no addresses to fetch from; there must be no other.
    assert set(re.findall(r"https?://[^\"' <>]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "not measured" not in page.words
    assert "two <fast> cores" in page.words and "<fast>" not in text  # escaped
    assert "right < none < wrong" in page.words
    assert text.count("<svg") == 5  # two of perplexity, three of training


def test_an_empty_report_says_what_is_missing(tmp_path: Path) -> None:
    page = Page(write_report({}, {}, tmp_path / "report.html").read_text())
    assert page.sections == SECTIONS
    assert page.words.count("not measured") >= len(SECTIONS)
    assert not page.loads


def test_the_verdict_follows_the_interval() -> None:
    assert verdict({"mean": 1.1, "low": 1.05, "high": 1.15}, "")["word"] == "helps"
    assert verdict({"mean": 1.1, "low": 1.0, "high": 1.2}, "")["word"] == "not shown"
    assert verdict({"mean": 0.9, "low": 0.8, "high": 0.95}, "")["word"] == "hurts"
    assert verdict({"mean": 1.1, "low": None, "high": None}, "")["word"] == "not shown"
    assert verdict(None, "")["word"] == "not measured"


def test_each_task_shows_its_best_median_and_worst(tmp_path: Path) -> None:
    results, pictures = made_up(6)
    found = by_task(results["analogies"])
    assert {task: list(entries) for task, entries in found.items()} == {
        "negative": list(PLACES), "depth-warm": list(PLACES)
    }  # fmt: skip
    text = write_report(results, pictures, tmp_path / "report.html").read_text()
    for entry in results["analogies"]:
        assert text.count(entry["key"]) == 1
    # Of five the last task has no worst: its place stays empty.
    text = write_report(made_up(5)[0], pictures, tmp_path / "report.html").read_text()
    assert "<td></td>" in text


def test_an_undefined_score_is_a_dash(tmp_path: Path) -> None:
    results, pictures = made_up(1)
    results["analogies"][0]["scores"] = {k: {} for k in ("right", "wrong", "none")}
    results["scores"]["negative"]["figures"]["psnr"]["wrong"] = {
        "mean": None, "low": None, "high": None, "n": 0
    }  # fmt: skip
    text = write_report(results, pictures, tmp_path / "report.html").read_text()
    assert '<span class="score">–</span>' in text
    assert "<td>–</td>" in text


def test_pictures_may_be_files_and_an_unknown_name_is_refused(tmp_path: Path) -> None:
    results, pictures = made_up(3)
    files = {}
    for name, picture in pictures.items():
        files[name] = tmp_path / f"{name}.png"
        save_image(files[name], picture)
    write_report(results, files, tmp_path / "report.html")
    del files[results["analogies"][0]["target"]]
    with pytest.raises(ValueError, match="not among the pictures"):
        write_report(results, files, tmp_path / "report.html")
