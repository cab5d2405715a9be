import math
from dataclasses import replace

import pytest
import torch

from lvm.config import Optim
from lvm.model import build
from lvm.optim import clip, horizon, optimisers, rate, role, set_rate
from lvm.recipes import recipe

LVM = recipe("lvm_7b_paper").optim


@pytest.fixture
def model():
    return build(replace(recipe("tiny").model, vocab_size=128), seed=1)


def grouped(made):
    return [
        (type(optimiser).__name__, group, parameter)
        for optimiser in made
        for group in optimiser.param_groups
        for parameter in group["params"]
    ]


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.0), (8000, 1.5e-4), (100_000, 1.2077e-4), (288_000, 3e-5)]
)
def test_cosine_is_the_schedule_of_lvms_release(step, expected):
    """Values of optax's warm-up-cosine, known to 1e-8: so the tolerance of half of that."""
    found = LVM.lr * rate(step, LVM, horizon=400_000)
    assert found == pytest.approx(expected, abs=5e-9)


def test_cosine_without_decay_steps_ends_with_the_run_and_stays_there():
    plain = Optim(final=0.1, warmup=10)
    assert rate(5, plain, horizon=110) == 0.5
    assert rate(60, plain, horizon=110) == pytest.approx(0.55)  # half way: mean of 1 and final
    assert rate(110, plain, horizon=110) == rate(500, plain, horizon=110) == pytest.approx(0.1)


def test_wsd_is_flat_and_then_a_line():
    wsd = Optim(schedule="wsd", final=0.0, warmup=10)
    steps = (0, 5, 10, 79, 80, 90, 95, 100)
    expected = [0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.25, 0.0]  # the last fifth of 100 falls
    assert [rate(step, wsd, horizon=100) for step in steps] == pytest.approx(expected)
    assert rate(90, replace(wsd, decay_steps=40), horizon=100) == pytest.approx(0.25)


def test_a_run_bounded_by_time_ends_where_its_pace_leads():
    assert horizon(0, steps=1000, elapsed=0.0, seconds=60.0) == 1000
    assert horizon(50, steps=1000, elapsed=30.0, seconds=60.0) == 100
    assert horizon(50, steps=1000, elapsed=1.0, seconds=60.0) == 1000  # steps come first
    assert horizon(50, steps=1000, elapsed=1e9) == 1000
    at_end = horizon(77, steps=1000, elapsed=60.0, seconds=60.0)
    assert rate(77, Optim(final=0.1), horizon=at_end) == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_weight_is_in_one_group_and_norms_and_embedding_do_not_decay(model, name):
    optim = Optim(name=name, lr=1e-3, muon_lr=2e-2, weight_decay=0.1)
    found = grouped(optimisers(model, optim))
    names = {id(p): n for n, p in model.named_parameters()}
    assert sorted(names[id(p)] for _, _, p in found) == sorted(names.values())
    for kind, group, parameter in found:
        part = role(names[id(parameter)], parameter)
        assert group["weight_decay"] == (0.1 if part in ("matrix", "head") else 0.0)
        by_muon = name == "muon" and part == "matrix"
        assert kind == ("Muon" if by_muon else "AdamW")
        assert group["peak"] == (2e-2 if by_muon else 1e-3)


def test_roles_are_read_from_names_and_shapes(model):
    found = {}
    for name, parameter in model.named_parameters():
        found.setdefault(role(name, parameter), set()).add(name)
    assert found["embedding"] == {"embed.weight"}
    assert found["head"] == {"head.weight"}
    assert all(name.endswith("norm.weight") for name in found["vector"])
    assert len(found["matrix"]) == 7 * model.config.layers


def test_decay_all_decays_everything(model):
    found = grouped(optimisers(model, Optim(decay_all=True, weight_decay=0.1)))
    assert {group["weight_decay"] for _, group, _ in found} == {0.1}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_rate_is_what_a_step_uses(model, name):
    made = optimisers(model, Optim(name=name, weight_decay=0.1))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_rate(made, 0.0)
    for optimiser in made:
        optimiser.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    set_rate(made, 0.5)
    for optimiser in made:
        optimiser.step()
    assert not any(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_clipping_scales_the_whole_gradient_and_returns_its_norm(model):
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.01 * (i + 1))
    before = [p.grad.clone() for p in model.parameters()]
    expected = math.sqrt(sum(float(g.double().square().sum()) for g in before))
    assert float(clip(model.parameters(), 0.0)) == pytest.approx(expected, rel=1e-5)  # fp32 sums
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    clip(model.parameters(), expected / 2)
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.grad, gradient / 2, rtol=1e-5, atol=0.0)
