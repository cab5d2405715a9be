"""Muon of sharded matrices beside torch.optim.Muon of whole ones: the same bits, on any ranks."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lvm import checkpoint
from lvm.checkpoint import Trainer
from lvm.model import build
from lvm.muon import Muon, deal, products, rows_of
from lvm.optim import optimisers, set_rate
from lvm.recipes import recipe
from tokenizer.world import World

HERE = Path(__file__).parent
SHAPES = [(7, 5), (5, 7), (16, 16), (1, 6), (33, 12)]


def matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", [None, "original", "match_rms_adamw"])
def test_whole_matrices_get_torchs_bits(scale, nesterov):
    ours, theirs = matrices(), matrices()
    options = {"lr": 0.02, "weight_decay": 0.3, "nesterov": nesterov, "adjust_lr_fn": scale}
    options |= {"momentum": 0.9, "ns_steps": 4, "ns_coefficients": (3.0, -4.0, 2.0), "eps": 1e-5}
    made = Muon(ours, **options), torch.optim.Muon(theirs, **options)
    for update in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape) * (0.0, 1e-7, 1.0)[update]  # eps counts at first
            q.grad = p.grad.clone()
        for optimiser in made:
            optimiser.step()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(p, q)
            mine, its = made[0].state[p], made[1].state[q]
            assert mine.keys() == its.keys() == {"momentum_buffer"}
            assert torch.equal(mine["momentum_buffer"], its["momentum_buffer"])


def test_what_has_no_gradient_is_left_and_a_closure_is_called():
    (given, spared), generator = matrices()[:2], torch.Generator().manual_seed(1)
    before = [given.detach().clone(), spared.detach().clone()]
    made = Muon([given, spared])
    assert made.step() is None and not made.state

    def closure() -> str:
        given.grad = torch.randn(given.shape, generator=generator)
        return "loss" if torch.is_grad_enabled() else "no gradients"

    assert made.step(closure) == "loss"
    assert torch.equal(spared, before[1]) and spared not in made.state
    assert not torch.equal(given, before[0])


def test_their_state_dicts_are_each_others():
    ours, theirs = Muon(matrices(), lr=0.1), torch.optim.Muon(matrices(), lr=0.1)
    for made in (ours, theirs):
        for p in made.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        made.step()
    swapped = Muon(matrices()), torch.optim.Muon(matrices())
    swapped[0].load_state_dict(theirs.state_dict())
    swapped[1].load_state_dict(ours.state_dict())
    assert str(swapped[0].state_dict()) == str(swapped[1].state_dict()) == str(ours.state_dict())


def test_a_checkpoint_of_torchs_muon_goes_on_in_ours(tmp_path):
    """As runs have saved it until now: names, shapes and the next update's bits."""
    config = replace(recipe("tiny").model, vocab_size=128, layers=1, width=32, ffn=48)
    optim = replace(recipe("tiny").optim, name="muon")
    models = [build(config, seed=1), build(config, seed=2)]
    old, new = (optimisers(model, optim) for model in models)
    muon = old[1].param_groups[0]
    assert isinstance(old[1], Muon)
    options = {k: v for k, v in muon.items() if k not in ("params", "peak")}
    old[1] = torch.optim.Muon([{"params": muon["params"], "peak": muon["peak"]}], **options)

    def update(model: nn.Module, made: list[torch.optim.Optimizer], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        set_rate(made, 0.5)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimiser in made:
            optimiser.step()

    update(models[0], old, seed=0)
    saver = checkpoint.Saver(tmp_path, World(), keep=1)
    saver.save(Trainer(step=1), model=models[0], optimisers=old)
    folder = checkpoint.latest(tmp_path)
    assert folder is not None
    checkpoint.load(folder, model=models[1], optimisers=new, world=World())
    for model, made in zip(models, (old, new), strict=True):
        update(model, made, seed=1)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)


def on_ranks(world: int, folder: Path) -> list[dict[str, list[str]]]:
    """Return what each of several ranks found to differ, by case."""
    shared = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "muon_ranks.py"), str(folder)]
    ranks = [
        subprocess.Popen(
            [*command, str(n), str(world)], env=shared, stderr=subprocess.PIPE, text=True
        )
        for n in range(world)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=120)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:
            rank.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_many_ranks_give_the_bits_of_one_process(world, tmp_path):
    """Rows over shards, copies, and copies of shards; rows that ranks do not divide; two roundings
    of momentum, a matrix without gradient in one update, and torch's state taken over half-way."""
    found = on_ranks(world, tmp_path)
    layouts = {"shards", "copies", "copies of one shard"} | (
        {"copies of shards"} if world == 4 else set()
    )
    for rank in found:
        assert rank.keys() == {f"{n}, {m}" for n in layouts for m in ("nesterov", "plain")}
        assert not any(rank.values())


@pytest.fixture
def four_ranks():
    dist.init_process_group("fake", store=FakeStore(), world_size=4, rank=0)
    yield
    dist.destroy_process_group()


def placed(shape: tuple[int, ...], placements: list[Placement]) -> Tensor:
    mesh = init_device_mesh("cpu", shape)
    return distribute_tensor(torch.zeros(8, 8), mesh, placements, src_data_rank=None)


@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize(
    ("shape", "placements"),
    [
        ((4,), [Shard(1)]),
        ((2, 2), [Shard(0), Shard(0)]),
        ((2, 2), [Replicate(), Shard(1)]),
        ((2, 2), [Replicate(), Replicate()]),
    ],
    ids=str,
)
def test_other_placements_are_refused_with_what_is_wanted(shape, placements):
    with pytest.raises(ValueError, match=r"wanted Shard\(0\) on one dimension"):
        Muon([nn.Parameter(placed(shape, placements))])


@pytest.mark.usefixtures("four_ranks")
def test_a_group_of_several_layouts_is_refused():
    sharded, plain = nn.Parameter(placed((4,), [Shard(0)])), nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(ValueError, match="2 layouts in one group"):
        Muon([sharded, plain])
    Muon([{"params": [sharded]}, {"params": [plain]}])


def test_every_matrix_has_one_owner_and_owners_have_alike():
    shapes = ((96, 32), (32, 32), (32, 96), (32, 32), (8, 4)) * 7
    for shards, copies in ((1, 1), (4, 1), (4, 2), (1, 8), (64, 1)):
        rounds = deal(shapes, shards=shards, copies=copies)
        owned = [i for hands in rounds for i in hands if i is not None]
        assert sorted(owned) == list(range(len(shapes)))
        assert {len(hands) for hands in rounds} == {shards * copies}
        loads = [
            sum(products(shapes[i]) for i in own if i is not None)
            for own in zip(*rounds, strict=True)
        ]
        ideal = max(sum(map(products, shapes)) / len(loads), max(map(products, shapes)))
        assert max(loads) <= 4 / 3 * ideal  # Graham's bound, of what no deal can be below


def test_copies_own_alike_where_there_are_more_owners_than_matrices():
    (hands,) = deal(((32, 32),) * 8, shards=8, copies=4)
    owned = [sum(i is not None for i in hands[c * 8 : (c + 1) * 8]) for c in range(4)]
    assert owned == [2, 2, 2, 2]


@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 6, 9, 16])
def test_rows_are_cut_as_dtensor_cuts_them(rows):
    mesh = init_device_mesh("cpu", (4,))
    part = distribute_tensor(torch.zeros(rows, 2), mesh, [Shard(0)], src_data_rank=None)
    assert rows_of(rows, 4)[0] == part.to_local().shape[0]
    assert rows_of(rows, 4) == [len(p) for p in torch.zeros(rows).chunk(4)] + [0] * (
        4 - len(torch.zeros(rows).chunk(4))
    )
