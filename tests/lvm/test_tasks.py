"""Which metric a source gets, by its name, by hand, and from its targets."""

import pytest
import torch

from lvm.evaluation import scores
from lvm.evaluation.tasks import FIGURES, Task, better, confusions, fit, measure, tasks_of
from tokenizer.cli import InputError
from tokenizer.metrics import psnr, ssim


@pytest.mark.parametrize(
    ("source", "metric"),
    [
        ("segment-a", "segment"),
        ("coco_seg", "segment"),
        ("sequence", "image"),
        ("foreground", "mask"),
        ("depth-warm", "depth"),
        ("NYU_Depth", "depth"),
        ("edges-white", "edges"),
        ("hed", "edges"),
        ("shed", "edges"),
        ("colorize", "colour"),
        ("coloured_pencil", "image"),
        ("swap", "image"),
        ("coco-pose", "keypoints"),
        ("deblur", "image"),
    ],
)
def test_the_name_of_a_source_says_its_metric(source, metric):
    assert tasks_of([source])[source].metric == metric


def test_a_metric_given_by_hand_wins_and_may_have_a_setting():
    given = ["a=mask:0.3", "b=segment:#000000,#ff8000", "c=depth:align", "depth=image",
             "e=keypoints:0.2", "f=edges:2.5"]  # fmt: skip
    found = tasks_of(["a", "b", "c", "depth", "e", "f", "g"], given)
    assert (found["a"].metric, found["a"].level) == ("mask", 0.3)
    assert found["b"].palette.tolist() == [[0, 0, 0], [1, pytest.approx(128 / 255), 0]]
    assert found["c"].aligned
    assert found["depth"].metric == "image"
    assert found["e"].alpha == 0.2
    assert found["f"].tolerance == 2.5
    assert found["g"] == Task()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a", "wanted SOURCE=METRIC with one of image"),
        ("a=dept", "wanted SOURCE=METRIC"),
        ("b=depth", "no pair source is named 'b'; these are: a"),
        ("a=depth:0.5", "depth:align or nothing"),
        ("a=mask:2", "between 0 and 1"),
        ("a=segment:#000000", "two colours or more"),
        ("a=segment:#000000,#12345", "two colours or more"),
        ("a=edges:inf", "a distance in pixels"),
        ("a=edges:-1", "a distance in pixels"),
        ("a=keypoints:x", "the background first"),
        ("a=image:1", "nothing after the metric"),
    ],
)
def test_a_wrong_task_is_refused(text, words):
    with pytest.raises(InputError, match=words):
        tasks_of(["a"], [text])


def lines(dark: bool) -> torch.Tensor:
    """Thin lines that never reach full contrast, [2, 3, 16, 16]."""
    picture = torch.zeros(2, 3, 16, 16, dtype=torch.float64)
    picture[0, :, 5] = 0.6
    picture[1, :, :, 7] = 0.5
    return 1 - picture if dark else picture


@pytest.mark.parametrize("dark", [False, True])
def test_what_an_edge_is_comes_from_the_targets(dark):
    task = fit(Task(metric="edges"), lines(dark))
    assert task.dark is dark
    assert task.tolerance == 1.0
    found = measure(task, lines(dark), lines(dark))
    assert found["f"].tolist() == [1.0, 1.0]
    blank = measure(task, torch.full_like(lines(dark), 1.0 if dark else 0.0), lines(dark))
    assert blank["recall"].tolist() == [0.0, 0.0]
    assert ("darker" if dark else "brighter") in task.said


def test_what_was_given_is_kept():
    targets = lines(False)
    palette = torch.tensor([[0.0, 0, 0], [1, 1, 1]])
    assert fit(Task(metric="edges", tolerance=3.0), targets).tolerance == 3.0
    assert fit(Task(metric="segment", palette=palette), targets).palette is palette
    assert fit(Task(metric="mask", level=0.2), targets).level == 0.2
    assert fit(Task(metric="mask"), targets).level == 0.5


@pytest.mark.parametrize("metric", list(FIGURES))
def test_a_perfect_answer_has_the_best_score_and_its_mirror_image_a_worse_one(metric):
    targets = torch.zeros(3, 3, 16, 16, dtype=torch.float64)
    targets[:, 0, 3:8, 3:8] = 1.0  # a red spot, a bright one, a blue one
    targets[:, :, 10:13, 2:7] = 0.9
    targets[:, 2, 2:5, 10:14] = 1.0
    task = fit(Task(metric=metric), targets)
    assert task.primary in FIGURES[metric]
    same, other = measure(task, targets, targets), measure(task, targets.flip(-1), targets)
    for name, more in FIGURES[metric].items():
        best = 1.0 if more else 0.0
        if name != "psnr":
            assert same[name].tolist() == pytest.approx([best] * 3)
        assert ((other[name] < same[name]) if more else (other[name] > same[name])).all()
    assert set(same) == set(FIGURES[metric]) | {"psnr", "ssim", "mse"}
    assert set(same) <= set(better(metric))


def test_figures_are_those_of_the_functions(rng):
    a, b = (torch.rand(2, 3, 16, 16, generator=rng, dtype=torch.float64) for _ in range(2))
    image = measure(Task(), a, b)
    assert torch.equal(image["psnr"], psnr(a, b))
    assert torch.equal(image["ssim"], ssim(a, b))
    depth = measure(Task(metric="depth"), a, b)
    x, y = scores.depth_of(a), scores.depth_of(b)
    assert torch.equal(depth["rmse"], scores.depth_rmse(x, y))
    aligned = measure(Task(metric="depth", aligned=True), a, b)
    assert torch.equal(aligned["rmse"], scores.depth_rmse(scores.align(x, y), y))
    assert "scale and shift fitted" in Task(metric="depth", aligned=True).said
    mask = measure(Task(metric="mask", level=0.4), a, b)
    counts = confusions(Task(metric="mask", level=0.4), a, b)
    assert torch.equal(mask["iou"], scores.iou(counts)[:, 1])
    assert confusions(Task(metric="depth"), a, b) is None


def test_small_pictures_have_no_ssim_and_a_perceptual_distance_has_its_name(rng):
    class Distance:
        name = "lpips"

        def __call__(self, images, targets):
            return (images - targets).abs().mean((1, 2, 3))

    a, b = (torch.rand(2, 3, 8, 8, generator=rng) for _ in range(2))
    assert set(measure(Task(), a, b, perceptual=Distance())) == {"psnr", "mse", "lpips"}
    assert better("image")["lpips"] is False
