"""Two reports side by side: paired differences, refusals, and what is not compared."""

import json
import math
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lvm import compare as command
from lvm.compare import Line, change, compare, load_report, table
from lvm.evaluate import FORMAT, VERSION
from tokenizer.cli import InputError

TASKS = ("depth", "swap")


def report(better: float = 0.0, *, count: int = 40, seed: int = 0) -> dict[str, Any]:
    """A report of made-up figures, of which a constant part is better than that of 0.

    Targets differ far more in difficulty than models in quality.
    """
    hard = np.random.default_rng(0)
    noise = np.random.default_rng(seed + 1)
    codes = hard.integers(100, 900, 20)
    level = hard.normal(3, 0.5, 20)
    targets, scored = [], []
    for i in range(count):
        about = {"task": TASKS[i % 2], "key": f"{i}", "id": f"id{i}", "group": f"g{i % 20}"}
        nll = hard.normal(2, 1) - better + noise.normal(0, 0.02)
        targets.append({**about, "nll": {"right": nll, "none": nll + 0.1}})
        psnr = 20 + 5 * hard.normal() + 10 * better + 0.2 * noise.normal()
        right = {"psnr": psnr, "mse": 10 ** (-psnr / 10)}
        if about["task"] == "depth":
            right["rmse"] = 0.5 - better + 0.02 * noise.normal()
        scored.append({**about, "scores": {"right": right}})

    def part(metric: str, primary: str, names: dict[str, str]) -> dict[str, Any]:
        return {"metric": metric, "setting": "", "primary": primary, "better": names}

    return {
        "format": FORMAT, "version": VERSION, "model": f"runs/{better}", "data": "data",
        "manifest": "m" * 64, "tokenizer": "t" * 64, "split": "val", "group_by": "g",
        "date": "2026-11-26",
        "rows": {
            "source": ["depth"] * 10 + ["swap"] * 10, "row": [*range(10)] * 2,
            "nll": ((level - better + noise.normal(0, 0.01, 20)) * codes).tolist(),
            "codes": codes.tolist(),
        },
        "targets": targets,
        "answers": {
            "sampling": {"temperature": 1.0, "seed": 0},
            "tasks": {
                "depth": part("depth", "rmse", {"rmse": "less", "psnr": "more", "mse": "less"}),
                "swap": part("image", "psnr", {"psnr": "more", "mse": "less"}),
            },
            "targets": scored,
        },
    }  # fmt: skip


def by_name(lines) -> dict[str, Line]:
    assert len({line.name for line in lines}) == len(lines)
    return {line.name: line for line in lines}


def test_a_small_difference_is_shown_where_targets_are_paired():
    a, b = report(seed=0), report(0.05, seed=1)
    found = compare(a, b)
    rows, prompts = by_name(found.rows), by_name(found.prompts)
    assert list(rows) == ["all", "depth", "swap"]
    assert list(prompts) == ["right prompt", "none prompt", "depth", "swap"]
    for line in (rows["all"], prompts["right prompt"], prompts["swap"]):
        assert line.low < math.exp(-0.05) < line.high < 1
        assert line.verdict == "B"
        assert line.value == pytest.approx(line.b / line.a)
    answers = by_name(found.answers)
    assert (answers["all psnr"].n, answers["all psnr"].verdict) == (40, "B")
    assert answers["depth rmse"].verdict == "B"  # less is better
    assert answers["swap psnr"].verdict == "B"
    assert answers["swap psnr"].value == pytest.approx(0.5, abs=0.3)  # noise of 0.2·√2 / √20
    back = compare(b, a)
    assert {line.name: line.verdict for line in back.answers if line.primary} == {
        "all psnr": "A", "depth rmse": "A", "swap psnr": "A"
    }  # fmt: skip
    # Unpaired, nothing would be seen: the spread of targets is 1, its error over 40 is 0.16.
    values = [t["nll"]["right"] for t in a["targets"]]
    assert np.std(values) / math.sqrt(len(values)) > 0.1


def test_equal_models_show_no_difference():
    found = compare(report(seed=0), report(seed=1))
    lines = [*found.rows, *found.prompts, *found.answers]
    shown = [line.name for line in lines if line.verdict != "not shown"]
    # Each of 13 lines has 1 chance in 20 or somewhat more; three of them: 1 in 50.
    assert len(shown) <= 2
    same = compare(report(), report())
    assert all(line.low == line.value == line.high for line in same.rows)
    assert all(line.verdict == "not shown" for line in same.answers)


def test_the_perplexity_of_rows_is_weighted_by_codes():
    a, b = report(), report(0.1)
    found = by_name(compare(a, b).rows)
    for name, chosen in (("all", slice(None)), ("swap", slice(10, 20))):
        for values, figure in ((a, found[name].a), (b, found[name].b)):
            nll, codes = (np.array(values["rows"][k][chosen]) for k in ("nll", "codes"))
            assert figure == pytest.approx(math.exp(nll.sum() / codes.sum()))
    assert (found["all"].n, found["swap"].n) == (20, 10)


def test_only_what_both_have_is_compared():
    a, b = report(), report(0.1, count=30)
    b["rows"] = {k: v[5:] for k, v in b["rows"].items()}
    in_order = compare(a, b)
    b["targets"].reverse()  # the order says nothing
    found = compare(a, b)
    assert found == in_order
    assert "rows: 15 in common; A has 20, B has 15" in found.notes
    assert "targets of the prompt experiment: 30 in common; A has 40, B has 30" in found.notes
    assert by_name(found.prompts)["right prompt"].n == 30
    shared = [t["nll"]["right"] for t in a["targets"][:30]]
    assert by_name(found.prompts)["right prompt"].a == pytest.approx(math.exp(np.mean(shared)))


def test_few_groups_give_no_verdict():
    a, b = report(count=6), report(0.5, count=6)
    line = by_name(compare(a, b).prompts)["right prompt"]
    assert (line.groups, line.verdict) == (6, "too few")
    for entry in (*a["targets"], *b["targets"]):
        entry["group"] = "one"
    line = by_name(compare(a, b).prompts)["right prompt"]
    assert line.low is None
    assert change(line).endswith("(one group)")


@pytest.mark.parametrize(
    ("name", "words"),
    [("manifest", "different data"), ("split", "different splits"),
     ("tokenizer", "codes of different tokenizers")],
)  # fmt: skip
def test_reports_of_different_data_are_refused(name, words):
    other = report() | {name: "x" * 64}
    with pytest.raises(InputError, match=words):
        compare(report(), other)


def test_reports_with_nothing_in_common_are_refused():
    a, b = report(), report()
    b["rows"]["row"] = [row + 100 for row in b["rows"]["row"]]
    for name in ("targets", "answers"):
        a.pop(name)
    with pytest.raises(InputError, match="nothing was measured on the same rows or targets"):
        compare(a, b)


def test_what_was_measured_differently_is_said():
    a, b = report(), report()
    b["answers"]["tasks"]["depth"]["setting"] = "aligned"
    b["answers"]["sampling"]["temperature"] = 0.5
    b["rows"]["codes"] = [n - 1 for n in b["rows"]["codes"]]
    b["group_by"] = ""
    found = compare(a, b)
    assert not found.rows
    assert {line.name.split()[0] for line in found.answers} == {"all", "swap"}
    said = "\n".join(found.notes)
    for words in (
        "depth: scored differently", "temperature 1.0 and 0.5", "layouts bos and none",
        "grouped as in A",
    ):  # fmt: skip
        assert words in said


def test_an_undefined_score_is_left_out():
    a, b = report(), report()
    a["answers"]["targets"][1]["scores"]["right"]["psnr"] = None
    assert by_name(compare(a, b).answers)["swap psnr"].n == 19


def write(path: Path, values: object) -> Path:
    path.write_text(json.dumps(values))
    return path


def test_the_command_prints_and_writes_a_page_and_figures(tmp_path, capsys):
    first, second = report(), report(0.1)
    second["model"] = "<script>"
    a, b = write(tmp_path / "a.json", first), write(tmp_path / "b.json", second)
    command.main(command.Compare(a=a, b=b, out=tmp_path / "new/page.html"))
    said = capsys.readouterr().out
    assert said.startswith(table(compare(first, second)))
    assert "depth rmse ↓" in said and "depth mse" not in said  # the first figure of each source
    page = (tmp_path / "new/page.html").read_text()
    assert "depth mse" in page
    assert not re.search(r"https?://|<script|<link|src=", page)
    command.main(command.Compare(a=a, b=b, out=tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["format"] == "lvm-comparison"
    assert figures["rows"][0]["name"] == "all"


def test_files_that_are_no_reports_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load_report(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        load_report(tmp_path / "bad.json")
    old = deepcopy(report())
    del old["format"]
    for values in (old, [], report() | {"version": 99}):
        with pytest.raises(InputError, match="has format and version"):
            load_report(write(tmp_path / "old.json", values))
    good = write(tmp_path / "a.json", report())
    assert load_report(good)["split"] == "val"
    with pytest.raises(InputError, match=r"ends in \.html or \.json"):
        command.main(command.Compare(a=good, b=good, out=tmp_path / "page.txt"))
