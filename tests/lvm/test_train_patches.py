"""AIM under the trainer: resume, micro-batches, ranks and kinds change no number."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lvm
from lvm import interop
from lvm.checkpoint import latest, load_model_state
from lvm.config import Run, differences
from lvm.recipes import recipe
from lvm.train import train
from lvm.vision import VisionModel
from tokenizer.cli import InputError


@pytest.fixture(autouse=True)
def one_thread():
    """Sums depend on the number of threads; with one, two processes can be equal bit by bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(data: Path, out: Path, **values) -> Run:
    tiny = recipe("aim_tiny")
    base = replace(
        tiny,
        model=replace(tiny.model, width=32, ffn=64, layers=2, heads=2),
        patches=replace(tiny.patches, image_size=8, size=2, head_width=16, head_depth=2),
        optim=replace(tiny.optim, warmup=2, decay_steps=12),
        precision="fp32",
        device="cpu",
        batch_rows=8,
        micro_rows=8,
        steps=8,
        save_every=4,
        eval_every=4,
        log_every=1,
    )
    return replace(base, data=str(data), out=str(out), **values)


def lines(run: Run, split: str = "train") -> list[dict]:
    text = (Path(run.out) / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, text) if line["split"] == split]


def test_a_stopped_run_goes_on_bit_by_bit_and_opens_as_a_model(image_data, tmp_path):
    whole = small(image_data, tmp_path / "whole")
    assert train(whole) == 0
    part = small(image_data, tmp_path / "part")
    assert train(replace(part, steps=4)) == 0
    assert train(part) == 0
    a, b = load_model_state(Path(whole.out)), load_model_state(Path(part.out))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert [x["loss"] for x in lines(whole)] == [x["loss"] for x in lines(part)]
    model = lvm.load(whole.out)
    assert isinstance(model, VisionModel)
    assert model.patches == whole.patches
    assert model.block_outputs(torch.rand(1, 3, 8, 8), [1])[0].shape == (1, 16, 32)
    val = lines(whole, "val")[-1]
    assert set(val["by_kind"]) == {"image", "category"}
    # Both kinds have eight held-out images, with other prefixes: the mean lies between theirs.
    parts = [kind["distance"] for kind in val["by_kind"].values()]
    assert min(parts) < val["distance"] < max(parts)


def test_losses_are_the_same_for_any_micro_batch_and_number_of_ranks(
    image_data, two_ranks, tmp_path
):
    one = small(image_data, tmp_path / "one")
    micro = small(image_data, tmp_path / "micro", micro_rows=2)
    two = small(image_data, tmp_path / "two", micro_rows=4)
    assert train(one) == train(micro) == 0
    two_ranks(two)
    wanted = [line["loss"] for line in lines(one)]
    for run in (micro, two):
        # AdamW in fp32: sums in another order, through eight updates (DESIGN 10).
        assert [line["loss"] for line in lines(run)] == pytest.approx(wanted, rel=1e-5)


def test_the_config_goes_through_json(image_data, tmp_path):
    run = small(image_data, tmp_path)
    again = Run.from_json(json.loads(json.dumps(run.to_json())))
    assert again == run and not differences(run, again)
    other = replace(run, patches=replace(run.patches, order="spiral"))
    assert differences(run, other) == ["patches.order: raster, now spiral"]


def test_data_of_the_other_form_are_refused(data, image_data, tmp_path):
    with pytest.raises(InputError, match="wanted images: build it with --images"):
        train(small(data, tmp_path / "a"))
    with pytest.raises(InputError, match="holds images, wanted codes"):
        train(replace(recipe("tiny"), data=str(image_data), out=str(tmp_path / "b"), device="cpu"))
    assert latest(tmp_path / "a") is None
    run = small(image_data, tmp_path / "c", steps=1)
    assert train(run) == 0
    with pytest.raises(InputError, match="a model of pixels"):
        interop.load(run.out)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"image_size": 225}, "no two or more patches"),
        ({"block": 3, "prefix": False}, "no whole blocks"),
        ({"block": 4}, "without a prefix"),
        ({"least_crop": 0.0}, "least_crop"),
    ],
)
def test_patches_that_do_not_work_out_are_refused(values, said):
    from lvm.config import Patches

    with pytest.raises(InputError, match=said):
        Patches(**values)
