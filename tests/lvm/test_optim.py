import itertools
import math
from dataclasses import replace

import pytest
import torch

from lvm.config import Optim
from lvm.model import build
from lvm.optim import clip, horizon, optimisers, rate, role, set_rate
from lvm.recipes import recipe

LVM = recipe("lvm_7b_paper").optim


@pytest.fixture(params=[False, True], ids=["", "qk_norm"])
def model(request):
    return build(replace(recipe("tiny").model, vocab_size=128, qk_norm=request.param), seed=1)


def grouped(made):
    return [
        (type(optimiser).__name__, group, parameter)
        for optimiser in made
        for group in optimiser.param_groups
        for parameter in group["params"]
    ]


# What optax 0.2.8 gives in float64 (2026-11-26, jax 0.10.2): warmup_cosine_decay_schedule of LVM's
# release and of DeLVM's, and joined linear and constant schedules for the last.
OPTAX = {
    "lvm": {
        0: 0.0, 1: 1.875e-8, 4000: 7.5e-5, 7999: 1.4998125e-4, 8000: 1.5e-4,
        8001: 1.4999999999622339e-4, 50_000: 1.4346039145130205e-4, 100_000: 1.2077395664435437e-4,
        148_000: 9e-5, 287_999: 3.0000000003776633e-5, 288_000: 3e-5, 400_000: 3e-5,
    },
    "delvm": {
        0: 0.0, 112: 7.5e-5, 224: 1.5e-4, 225: 1.499999997894616e-4, 5000: 1.452542589440428e-4,
        20_112: 8.25e-5, 30_000: 3.498186687297172e-5, 39_999: 1.5000000210538395e-5,
        40_000: 1.5e-5, 50_000: 1.5e-5,
    },
    "wsd": {
        0: 0.0, 1000: 0.5, 2000: 1.0, 100_000: 1.0, 160_000: 1.0, 160_001: 0.9999775, 180_000: 0.55,
        199_999: 0.1000225, 200_000: 0.1,
    },
}  # fmt: skip
SCHEDULES = {
    "lvm": (LVM, 400_000),  # LVM's cosine ends by decay_steps, whatever the run's length
    "delvm": (Optim(lr=1.5e-4, warmup=224, final=0.1), 40_000),
    "wsd": (Optim(lr=1.0, schedule="wsd", warmup=2000, final=0.1), 200_000),
}


@pytest.mark.parametrize(
    ("name", "step"), [(name, step) for name, values in OPTAX.items() for step in values]
)
def test_schedules_are_those_of_optax(name, step):
    optim, steps = SCHEDULES[name]
    found = optim.lr * rate(step, optim, horizon=steps)
    # Both in float64, by other formulae: a few roundings of it.
    assert found == pytest.approx(OPTAX[name][step], rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_neither_jump_nor_pass_their_ends(name):
    """The largest step of a cosine is pi / 2 times that of a line; before it, warm-up's."""
    optim, steps = SCHEDULES[name]
    values = [rate(step, optim, horizon=steps) for step in range(0, steps + 1, 16)]
    fall = (optim.decay_steps or steps) - optim.warmup if optim.schedule == "cosine" else steps / 5
    steepest = 16 * max(1 / optim.warmup, math.pi / 2 / fall)
    pairs = list(itertools.pairwise(values))
    assert max(abs(b - a) for a, b in pairs) <= steepest * (1 + 1e-9)
    top = optim.warmup // 16
    assert all(b >= a for a, b in pairs[:top]) and all(b <= a for a, b in pairs[top + 1 :])
    assert max(values) == 1.0 and values[-1] == pytest.approx(optim.final)


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


def test_muons_update_has_the_size_that_is_asked_for():
    moved = {}
    for scale in ("original", "match_rms_adamw"):
        model = build(replace(recipe("tiny").model, vocab_size=128), seed=1)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        made = optimisers(model, Optim(name="muon", muon_lr=0.1, muon_scale=scale))
        set_rate(made, 1.0)
        for optimiser in made:
            optimiser.step()
        matrices = [(n, p) for n, p in model.named_parameters() if role(n, p) == "matrix"]
        moved[scale] = {n: p.detach() - before[n] * (1 - 0.1 * 0.1) for n, p in matrices}
    for name, step in moved["match_rms_adamw"].items():
        # AdamW's updates have a root mean square of 0.2 to 0.4 of its rate (Liu et al. 2025), and
        # Muon's five iterations leave singular values between 0.7 and 1.2, not at 1.
        assert 0.7 * 0.02 < float(step.square().mean().sqrt()) < 1.2 * 0.02, name
        a, b = step.shape
        ratio = 0.2 * max(a, b) ** 0.5 / max(1.0, a / b) ** 0.5
        # fp32 steps of 0.02 on weights of 0.02
        torch.testing.assert_close(step, moved["original"][name] * ratio, rtol=1e-5, atol=1e-7)


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


@pytest.mark.parametrize("size", ["100m", "300m", "600m", "1b", "3b", "7b", "13b"])
def test_recipes_say_which_optimiser_they_train_with(size):
    ours, paper = recipe(f"lvm_{size}"), recipe(f"lvm_{size}_paper")
    assert ours.model.qk_norm and ours.z_loss == 1e-4
    assert ours.optim == Optim(
        name="muon", lr=ours.optim.lr, muon_lr=ours.optim.lr, muon_scale="match_rms_adamw",
        schedule="wsd", warmup=2000, final=0.0, weight_decay=0.1,
    )  # fmt: skip
    assert not paper.model.qk_norm and paper.z_loss == 0.0
    assert paper.optim == Optim(
        name="adamw", lr=1.5e-4, final=0.2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1,
        decay_all=True, clip=1.0, schedule="cosine", warmup=8000, decay_steps=288_000,
    )  # fmt: skip
    assert (paper.steps, paper.batch_rows, paper.layout) == (288_000, 128, "none")
    assert rate(199_999, ours.optim, horizon=ours.steps) == pytest.approx(1 / 40_000)
