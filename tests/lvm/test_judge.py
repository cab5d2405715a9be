"""Drawing and scoring with a tokenizer of plain colours, where every score can be done by hand."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lvm.evaluation import judge as judging
from lvm.evaluation.gallery import cases, chosen, data_uri
from lvm.evaluation.in_context import Prompts
from lvm.evaluation.judge import Answered, answer, judge, pictures, score, summarise_scores
from lvm.evaluation.tasks import Task
from lvm.generate import Sampling, draw
from tokenizer.metrics import psnr

K, N = 40, 4  # of make_model


class Plain:
    """A tokenizer of four grey squares an image: code c is the brightness c / 39."""

    image_size, codes_per_image, codebook_size, id = 8, N, K, ""

    def encode(self, images: Tensor) -> Tensor:
        return (images[:, 0, ::4, ::4] * (K - 1)).round().long().flatten(1)

    def decode(self, codes: Tensor) -> Tensor:
        grey = codes.view(-1, 1, 2, 2).float() / (K - 1)
        return grey.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)


def prompts_of(rng, *, count: int = 6, wrong: bool = True, pairs: int = 2) -> Prompts:
    images = torch.randint(0, K, (count, 2 * pairs + 2, N), generator=rng)
    other = torch.randint(0, K, (count, 2 * pairs, N), generator=rng)
    return Prompts(
        right=images[:, :-1],
        wrong=torch.cat([other, images[:, -2:-1]], dim=1) if wrong else None,
        target=images[:, -1],
        tasks=[("depth", "negative")[i % 2] for i in range(count)],
        keys=[f"targets/{i}.png" for i in range(count)],
    )


def answered_by(prompts: Prompts, **codes: Tensor) -> Answered:
    """Answers given by hand, int64 [S, C, n] by condition; ranked as they stand."""
    count, candidates = codes["right"].shape[:2]
    order = torch.arange(candidates).expand(count, -1)
    return Answered(prompts=prompts, codes=codes, order=order)


IMAGE = {"depth": Task(), "negative": Task()}


def test_answers_are_those_of_draw_whatever_the_batch(make_model, rng):
    model, prompts = make_model(), prompts_of(rng)
    sampling = Sampling(candidates=3, seed=5)
    found = answer(model, prompts, sampling, batch=4)
    whole = draw(model, prompts.right, sampling)
    assert torch.equal(found.codes["right"], whole.codes[:, :, 0])
    one = Sampling(seed=5)
    assert torch.equal(found.codes["none"], draw(model, prompts.shots(0), one).codes[:, :, 0])
    assert torch.equal(found.codes["wrong"], draw(model, prompts.wrong, one).codes[:, :, 0])
    # The likeliest first.
    likely = whole.log_likelihood[:, :, 0].gather(1, found.order)
    assert (likely.diff(dim=1) <= 0).all()
    gain = answer(model, prompts, sampling, by="gain").order
    assert not torch.equal(gain, found.order)


def test_without_a_second_source_there_is_no_wrong_prompt(make_model, rng):
    found = answer(make_model(), prompts_of(rng, wrong=False), Sampling())
    assert set(found.codes) == {"right", "none"}
    assert found.order.tolist() == [[0]] * 6


def test_scores_by_hand(rng):
    """Right, ranked and best of two candidates, one of them the truth; the three that need no
    model."""
    prompts = prompts_of(rng)
    off = (prompts.target + 4) % K
    right = torch.stack([off, prompts.target], dim=1)
    found = score(Plain(), answered_by(prompts, right=right, none=off[:, None]), IMAGE)["depth"]
    assert found.places.tolist() == [0, 2, 4]
    target, wrong = (
        pictures(Plain(), codes[found.places]).float() / 255 for codes in (prompts.target, off)
    )
    error = psnr(wrong, target).numpy()
    values = {kind: figures["psnr"] for kind, figures in found.values.items()}
    np.testing.assert_allclose(values["none"], error)
    np.testing.assert_allclose(values["ranked"], error)  # as they stand: the first
    np.testing.assert_allclose(values["best"], 100.0)
    np.testing.assert_allclose(values["right"], (error + 100) / 2)
    query, last = (
        pictures(Plain(), prompts.right[found.places][:, i]).float() / 255 for i in (-1, -2)
    )
    np.testing.assert_allclose(values["copy"], psnr(query, target).numpy())
    np.testing.assert_allclose(values["last"], psnr(last, target).numpy())
    others = torch.stack([(target.sum(0) - one) / 2 for one in target])
    # The mean is rounded to 8 bits.
    np.testing.assert_allclose(values["mean"], psnr(others, target).numpy(), rtol=1e-2)
    best = found.values["best"]["mse"]
    np.testing.assert_allclose(best, 0.0)  # the least, where less is better


def test_the_best_comes_first_whichever_way_the_figure_goes(rng):
    prompts = prompts_of(rng)
    steps = torch.tensor([3, 0, 1, 0, 6, 0])  # of brightness; the odd ones are of the other task
    right = torch.where(prompts.target >= 20, -1, 1) * steps[:, None] + prompts.target
    answered = answered_by(prompts, right=right[:, None])
    for task in (Task(), Task(metric="depth")):  # psnr: more is better; rmse: less is
        found = score(Plain(), answered, {"depth": task, "negative": task})["depth"]
        assert found.best_first().tolist() == [2, 0, 4]


def test_an_undefined_score_is_left_out_and_said():
    """No keypoint in the second target."""
    spot, none = torch.tensor([39, 0, 0, 0]), torch.zeros(4).long()
    prompts = Prompts(
        right=torch.stack([none, none])[:, None], wrong=None, target=torch.stack([spot, none]),
        tasks=["k", "k"], keys=["a", "b"],
    )  # fmt: skip
    palette = torch.tensor([[0.0, 0, 0], [1, 1, 1]])
    task = Task(metric="keypoints", palette=palette)
    scored = score(Plain(), answered_by(prompts, right=prompts.target[:, None]), {"k": task})
    assert scored["k"].best_first().tolist() == [0]
    report = summarise_scores(scored, ["a", "b"])["k"]
    assert report["figures"]["pck"]["right"] == {"mean": 1.0, "low": None, "high": None, "n": 1}
    assert report["figures"]["psnr"]["right"]["n"] == 2
    (first, second) = judging.per_target(scored, prompts, ["a", "b"])
    assert first["scores"]["right"]["pck"] == 1.0
    assert second["scores"]["right"]["pck"] is None


def test_the_figures_of_a_set_are_of_all_its_candidates(rng):
    prompts = prompts_of(rng)
    right = torch.stack([prompts.target, (prompts.target + 20) % K], dim=1)
    task = Task(metric="mask")
    answered = answered_by(prompts, right=right)
    found = score(Plain(), answered, {"depth": task, "negative": task})["depth"]
    bright = prompts.target[found.places] >= 20
    both, either = bright.sum(), bright.numel()
    # Half of the candidates are the truth, half its opposite.
    wanted = (both / (both + either) + (either - both) / (2 * either - both)) / 2
    assert found.whole["right"]["miou"] == pytest.approx(float(wanted))


def test_the_fid_is_the_distance_of_the_features_of_all_candidates(rng):
    """Stand-in features of two numbers, whose distance has a closed form."""

    def inception(images: Tensor) -> Tensor:
        return images.double().flatten(1)[:, [0, 4]]

    prompts = prompts_of(rng, count=40)
    shifted = (prompts.target + 1).clamp_max(K - 1)
    answered = answered_by(prompts, right=shifted[:, None])
    found = score(Plain(), answered, IMAGE, inception=inception)["depth"]
    first, second = (
        inception(pictures(Plain(), codes[found.places])).numpy()
        for codes in (shifted, prompts.target)
    )
    from scipy.linalg import sqrtm

    c1, c2 = np.cov(first.T), np.cov(second.T)
    gap = ((first.mean(0) - second.mean(0)) ** 2).sum()
    wanted = gap + np.trace(c1 + c2 - 2 * np.real(sqrtm(c1 @ c2)))
    assert found.whole["right"]["fid"] == pytest.approx(wanted, rel=1e-6)
    assert set(found.whole) == {"right", "copy", "last", "mean"}
    said = summarise_scores({"depth": found}, prompts.keys)["depth"]
    assert "20 images are fewer than the 2048 features" in said["fid_caution"]


def test_the_summary_is_of_means_and_paired_differences(rng):
    prompts = prompts_of(rng, count=20)
    right = (prompts.target + 1).clamp_max(K - 1)[:, None]
    none = (prompts.target + 9).clamp_max(K - 1)[:, None]
    scored = score(Plain(), answered_by(prompts, right=right, none=none), IMAGE)
    report = summarise_scores(scored, prompts.keys)["negative"]
    assert (report["metric"], report["primary"], report["n"]) == ("image", "psnr", 10)
    assert report["better"] == {"psnr": "more", "mse": "less"}
    values = scored["negative"].values
    found = report["figures"]["psnr"]
    assert set(found) == {"right", "none", "copy", "last", "mean"}  # one candidate: none is ranked
    assert found["none"]["mean"] == pytest.approx(values["none"]["psnr"].mean())
    paired = report["paired"]["psnr"]["none"]
    gap = values["right"]["psnr"] - values["none"]["psnr"]
    assert paired["mean"] == pytest.approx(gap.mean())
    assert 0 < paired["low"] < paired["mean"] < paired["high"]


def test_judge_says_how_it_judged(make_model, rng):
    prompts = prompts_of(rng)
    found = judge(
        make_model(), Plain(), prompts, Sampling(candidates=2, temperature=0.5, seed=3),
        groups=prompts.keys, tasks=["negative=mask"],
    )  # fmt: skip
    assert found.report["sampling"]["temperature"] == 0.5
    assert {k: v["metric"] for k, v in found.report["tasks"].items()} == {
        "depth": "depth", "negative": "mask"
    }  # fmt: skip
    assert [entry["key"] for entry in found.report["targets"]] == prompts.keys
    assert len({entry["id"] for entry in found.report["targets"]}) == 6
    again = judge(
        make_model(), Plain(), prompts, Sampling(candidates=2, temperature=0.5, seed=3),
        groups=prompts.keys, tasks=["negative=mask"],
    )  # fmt: skip
    assert again.report == found.report


@pytest.mark.parametrize(
    ("count", "each", "wanted"),
    [
        (0, 1, {}),
        (1, 1, {"median": [0]}),
        (2, 1, {"best": [0], "worst": [1]}),
        (3, 2, {"best": [0], "median": [1], "worst": [2]}),
        (9, 1, {"best": [0], "median": [4], "worst": [8]}),
        (9, 3, {"best": [0, 1, 2], "median": [3, 4, 5], "worst": [6, 7, 8]}),
    ],
)
def test_best_median_and_worst_are_taken_by_place(count, each, wanted):
    assert chosen(np.arange(count), each) == wanted


def test_cases_show_the_answers_that_were_scored(make_model, rng):
    prompts = prompts_of(rng, count=10)
    found = judge(
        make_model(), Plain(), prompts, Sampling(candidates=2), groups=prompts.keys
    )  # fmt: skip
    shown = cases(Plain(), found, most=6)
    assert [(case.task, case.place) for case in shown] == [
        (task, place) for task in ("depth", "negative") for place in ("best", "median", "worst")
    ]
    best, median, worst = (case.scores["ranked"]["rmse"] for case in shown[:3])
    assert best <= median <= worst
    assert best == found.scored["depth"].values["ranked"]["rmse"].min()
    for case in shown:
        s = prompts.keys.index(case.key)
        first = found.answered.codes["right"][s, found.answered.order[s, 0]]
        assert np.array_equal(case.candidates[0][::4, ::4, 0].flatten(), np.rint(first / 39 * 255))
        assert np.array_equal(
            case.target[::4, ::4, 0].flatten(), np.rint(prompts.target[s] / 39 * 255)
        )
        assert len(case.prompt) == len(case.wrong_prompt) == 5
        assert len(case.candidates) == 2
        assert set(case.others) == {"wrong", "none"}


def test_pictures_of_a_page_are_bounded(np_rng):
    small = np_rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)
    large = np_rng.integers(0, 256, (1030, 1030, 3), dtype=np.uint8)
    assert data_uri(small).startswith("data:image/png;base64,")
    assert data_uri(large).startswith("data:image/jpeg;base64,")
    assert len(data_uri(large)) < len(data_uri(small))
