"""Plans against what they plan: counted allocations of real steps, the trainer's own sharding."""

import json
import weakref
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from kernels.mask import Mask
from lvm.config import ModelConfig, Optim, Run
from lvm.model import build, on_meta
from lvm.objectives.next_code import next_code
from lvm.optim import optimisers
from lvm.parallel import compute, parallelize, recompute_block
from lvm.plan import Plan, main, plan, to_json
from lvm.planning.cards import cards
from lvm.planning.memory import Setting, kept, largest, memory
from lvm.planning.muon import muon_load
from lvm.planning.speed import RATES, Network, at, ring, step, traffic
from lvm.planning.units import count, count_on_mesh
from lvm.recipes import recipe
from tokenizer.cli import CommandError, InputError, guarded
from tokenizer.world import World

SMALL = ModelConfig(width=256, layers=3, heads=4, ffn=688, vocab_size=640)
MODES = ("none", "selective", "full")
NET = Network(bandwidth=50e9)


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and their most."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, Any] = {}
        self.peak = 0

    def now(self) -> int:
        """FSDP empties storages that it keeps: each is asked for its size anew."""
        alive = {key: found for key, ref in self.storages.items() if (found := ref()) is not None}
        self.storages = {key: self.storages[key] for key in alive}
        return sum(storage.nbytes() for storage in alive.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(kind is DTensor for kind in types):
            return NotImplemented  # its own operators come here again, on what this rank holds
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((out, args)):
            if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = weakref.ref(storage)
        self.peak = max(self.peak, self.now())
        return out


class Learner(nn.Module):
    """The trainer's, of rows without documents."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = build(config, seed=0)

    def forward(self, ids: Tensor) -> Tensor:
        return next_code(self.model.features(ids), self.model.head.weight, ids).loss


def most_bytes(setting: Setting, rows: int) -> tuple[int, int]:
    """Return what two real micro-batches hold at most, and keep after a forward pass.

    Several ranks are a fake process group: real FSDP2 and real memory of rank 0, no messages. The
    second micro-batch finds gradients that are there already, as all but the first of an update do.
    """
    run, world = setting.run, World(size=setting.gpus)
    with ExitStack() as stack:
        if world.size > 1:
            dist.init_process_group("fake", store=FakeStore(), world_size=world.size, rank=0)
            stack.callback(dist.destroy_process_group)
        root = Learner(run.model)
        parallelize(
            root,
            root.model.layers,
            world,
            precision=run.precision,
            recompute=run.recompute,
            shards=setting.shards,
        )
        with Live() as live:
            for parameter in root.parameters():  # known from the start, though no operator made it
                held = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                held.detach()
            for _ in range(2):
                ids = torch.randint(0, 512, (rows, setting.row_len))
                before, live.peak = live.now(), 0
                with compute(world, precision=run.precision):
                    loss = root(ids)
                after = live.now() - before
                loss.backward()
                del loss
        return live.peak, after


def small(*, gpus: int = 1, shards: int = 0, row_len: int = 128, **values: Any) -> Setting:
    run = Run(recipe="small", **{"model": SMALL, **values})
    return Setting(
        run=run,
        card=cards()["cpu"],
        gpus=gpus,
        shards=shards or gpus,
        row_len=row_len,
        reserve=0.0,
    )


CASES = [
    pytest.param({"precision": "fp32"}, 2, id="fp32"),
    pytest.param({"precision": "bf16"}, 2, id="autocast"),
    pytest.param({"precision": "bf16", "gpus": 8}, 2, id="fsdp"),
    pytest.param({"precision": "bf16", "gpus": 8, "shards": 4}, 6, id="hsdp"),
    pytest.param(
        {"precision": "fp32", "model": replace(SMALL, kv_heads=2, qk_norm=True)}, 4, id="qk-norm"
    ),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("values", "rows"), CASES)
def test_planned_memory_is_what_a_real_step_holds(values, rows, mode):
    """Left out: what an operator holds for itself, and gradients of single weights on their way:
    up to 2.2 % of these small models, and none of it grows with a model."""
    setting = small(recompute=mode, **values)
    planned = memory(setting, count(setting.run.model, shards=setting.shards), rows)
    held, _ = most_bytes(setting, rows)
    # No optimiser has run, whose state is tested below.
    assert planned.total - planned.optimiser == pytest.approx(held, rel=0.03)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("values", [case.values[0] for case in CASES[:3]], ids=lambda v: str(v))
def test_what_a_block_keeps_is_counted_to_the_byte(values, mode):
    """The difference of two depths leaves blocks alone; under autocast also their cast weights."""
    one, two = (
        small(recompute=mode, model=replace(SMALL, layers=layers), **values) for layers in (1, 2)
    )
    found = most_bytes(two, 2)[1] - most_bytes(one, 2)[1]
    casts = 0
    if one.autocast and mode == "none":
        casts = 2 * count(one.run.model, shards=1).matrices
    assert found == kept(one, mode) * 2 * one.row_len + casts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("heads", [(4, 4, 64), (4, 2, 64), (2, 2, 100)], ids=str)
def test_what_a_block_keeps_with_the_attention_of_a_gpu(heads, mode):
    """Shapes without values run through our kernels' operator as on a GPU, heads of 100 channels
    padded to 112. Norms are still those of a CPU: 8·D where a GPU keeps 2·D in bf16."""
    shape = {"heads": heads[0], "kv_heads": heads[1], "head_dim": heads[2]}
    found, tokens = [], 2 * 128
    for layers in (1, 2):
        model = on_meta(replace(SMALL, layers=layers, **shape))
        for block in model.layers:
            recompute_block(block, mode)
        with FakeTensorMode(), Live() as live:
            for module in model.modules():
                for name, weight in list(module.named_parameters(recurse=False)):
                    fake = torch.empty(weight.shape, dtype=torch.bfloat16)
                    module.register_parameter(name, nn.Parameter(fake))
            ids = torch.zeros(2, 128, dtype=torch.int64)
            before = live.now()
            features = model.features(ids, mask=Mask(causal=True, backend="triton"))
            found.append(live.now() - before)
            assert features.requires_grad
    setting = replace(small(gpus=2, model=replace(SMALL, **shape)), card=cards()["h100"])
    norms = 2 * (8 - 2) * SMALL.width if mode == "none" else 0
    assert found[1] - found[0] == (kept(setting, mode) + norms) * tokens


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_what_a_compiled_block_keeps(mode):
    """What the graphs of torch.compile's partitioner save; its code generator has no part in it."""
    setting = small(recompute=mode, compile=True, precision="fp32")
    found = []
    for layers in (1, 2):
        torch._dynamo.reset()
        root = Learner(replace(SMALL, layers=layers))
        own = {p.untyped_storage()._cdata for p in root.parameters()}
        parallelize(root, root.model.layers, World(), precision="fp32", recompute=mode)
        for block in root.model.layers:
            block.compile(fullgraph=True, backend="aot_eager_decomp_partition")
        saved: dict[int, Any] = {}

        def note(tensor: Tensor, saved=saved, own=own) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            root(torch.zeros(2, setting.row_len, dtype=torch.int64))
        found.append(sum(storage.nbytes() for storage in saved.values()))
    tokens = 2 * setting.row_len
    # `full` saves the state of the generator too, 5056 bytes a block, whatever its size.
    assert found[1] - found[0] == pytest.approx(kept(setting, mode) * tokens, abs=5056)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimiser_state_is_what_the_optimisers_hold(name):
    setting = small(optim=Optim(name=name), precision="fp32")
    root = Learner(SMALL)
    made = optimisers(root, setting.run.optim)
    for parameter in root.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimiser in made:
        optimiser.step()
    held = sum(
        value.nbytes
        for optimiser in made
        for state in optimiser.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.ndim
    )
    assert memory(setting, count(SMALL, shards=1), 1).optimiser == held


@pytest.mark.parametrize(("gpus", "shards"), [(2, 2), (8, 4), (256, 256), (1024, 8)])
def test_arithmetic_equals_the_trainers_own_sharding(gpus, shards):
    """Widths that ranks do not divide: 13 of 3200 / 256 rows, padding on the last ranks."""
    config = replace(recipe("lvm_3b").model, layers=2)
    assert count_on_mesh(config, gpus=gpus, shards=shards) == count(config, shards=shards)
    assert not dist.is_initialized()


def test_sizes_are_the_models():
    config = recipe("lvm_7b").model
    units = count(config, shards=1)
    assert units.total(config.layers) == units.local == config.num_params()
    assert units.matrices == config.num_params(embeddings=False) - config.vectors


def test_a_plan_inside_a_process_group_is_refused():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(CommandError, match="inside a process group"):
            count_on_mesh(SMALL, gpus=2, shards=2)
    finally:
        dist.destroy_process_group()


def test_the_largest_micro_batch_fits_and_the_next_does_not():
    run = recipe("lvm_3b")
    found = plan(Plan(gpus=8, run=run))
    for mode, rows in found.modes.items():
        setting = replace(found.setting, run=replace(run, recompute=mode))
        card = setting.card.memory
        assert memory(setting, found.units, rows).total <= card
        assert memory(setting, found.units, rows + 1).total > card
    assert found.modes["none"] < found.modes["selective"] < found.modes["full"]
    assert 512 // 8 % found.micro_rows == 0 and found.micro_rows <= found.modes["none"]


@pytest.mark.parametrize(
    ("name", "best", "plain"),
    [
        ("lvm_300m", 0.55, 0.41),
        ("lvm_1b", 0.62, 0.50),
        ("lvm_3b", 0.65, 0.55),
        ("lvm_7b", 0.67, 0.58),
    ],
)
def test_expected_mfu_is_that_of_the_shares_worked_out_by_hand(name, best, plain):
    """A row on one H200, optimiser left out, computed from the same shares in a table of its own;
    that table rounds elementwise times to 0.1 ms in 2 to 12, and MFU to whole per cents."""
    run = replace(recipe(name), optim=Optim(name="adamw"))
    setting = replace(small(), run=run, card=cards()["h200"], row_len=4096)
    units = count(run.model, shards=1)
    found = [
        step(setting, units, micro_rows=1, batch_rows=4096, rates=rates, net=NET) for rates in RATES
    ]
    assert [one.mfu for one in found] == pytest.approx([best, plain], abs=0.012)


def test_traffic_of_fsdp_and_hsdp_by_hand():
    config = replace(SMALL, vocab_size=1024, ffn=1024)
    p, blocks = config.num_params(), config.layers * count(config, shards=1).block
    fsdp = small(gpus=8, model=config)
    sent = traffic(fsdp, count(config, shards=8))
    assert sent.gather_forward == pytest.approx(7 / 8 * 2 * p)
    assert sent.gather_backward == pytest.approx(7 / 8 * 2 * blocks)
    assert sent.reduce_scatter == pytest.approx(7 / 8 * 4 * p)
    assert sent.all_reduce == sent.optimiser == 0
    two = traffic(at(fsdp, gpus=8, shards=4), count(config, shards=4))
    assert two.all_reduce == pytest.approx(2 * (1 / 2) * 4 * p / 4)
    assert two.step(3) == pytest.approx(
        3 * (two.gather_forward + two.gather_backward + two.reduce_scatter) + two.all_reduce
    )
    alone = traffic(small(model=config), count(config, shards=1))
    assert alone.step(5) == 0


def test_a_ring_is_bound_by_its_slowest_link():
    card = cards()["h100"]
    still = replace(NET, hop=0.0, far_hop=0.0)
    assert ring(450e9, 8, card=card, network=still) == pytest.approx(1 / 0.8)
    assert ring(400e9, 16, card=card, network=still) == pytest.approx(1 / 0.8)  # 8 links of 50
    assert ring(1e9, 1, card=card, network=still) == 0
    assert ring(0, 16, card=card, network=NET) == pytest.approx(14 * 1e-6 + 5e-6)


def test_a_slow_network_is_exposed_and_copies_in_nodes_hide_it():
    run = replace(recipe("lvm_1b"), batch_rows=16_384)  # of several micro-batches a card
    fast, slow = (plan(Plan(gpus=256, run=run, network_gbps=gbps)) for gbps in (400, 10))
    assert slow.steps["best"].exposed > 10 * fast.steps["best"].exposed
    assert slow.steps["best"].seconds > fast.steps["best"].seconds
    nodes = plan(Plan(gpus=256, run=replace(run, shards=8), network_gbps=10))
    assert nodes.steps["best"].seconds < slow.steps["best"].seconds
    assert nodes.memory.weights > slow.memory.weights


def test_what_a_slow_network_exposes_is_what_computation_does_not_hide():
    """Both passes slower to send than to compute: the update takes what sending takes."""
    setting = replace(small(gpus=64, model=replace(SMALL, ffn=4096)), card=cards()["h100"])
    units = count(setting.run.model, shards=64)
    for net in (NET, Network(bandwidth=1e6), Network(bandwidth=1e15, hop=0.0, far_hop=0.0)):
        found = step(setting, units, micro_rows=2, batch_rows=512, rates=RATES[0], net=net)
        assert found.seconds == pytest.approx(
            found.forward + found.backward + found.exposed + found.optimiser
        )
        if net.bandwidth == 1e6:
            assert found.exposed + found.forward + found.backward == pytest.approx(
                found.communication
            )
        assert found.exposed < found.communication


def test_recomputing_costs_time_and_saves_memory():
    runs = [replace(recipe("lvm_1b"), recompute=mode) for mode in MODES]
    found = [plan(Plan(gpus=8, run=run)) for run in runs]
    seconds = [one.steps["best"].backward for one in found]
    assert seconds == sorted(seconds) and seconds[2] > 1.2 * seconds[0]
    none, _, full = (one.kept for one in found)
    assert none == full and none["none"] > none["selective"] > none["full"]


class Received(TorchDispatchMode):
    """Counts the bytes that rank 0 is sent by others."""

    def __init__(self) -> None:
        super().__init__()
        self.exchanged = self.gathered = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(kind is DTensor for kind in types):
            return NotImplemented
        if func._schema.name == "c10d::alltoall_base_":
            found, sent, group, take, give = args[:5]
            assert sum(take) == found.numel() and sum(give) == sent.numel()
            assert take[0] == give[0]
            self.exchanged += (sum(take) - take[0]) * found.element_size()
            # The fake group copies what is sent to what is received, which are of two sizes.
            none = [0] * len(take)
            return func(found[:0], sent[:0], group, none, none, *args[5:])
        if func._schema.name == "c10d::allgather_":
            ((*lines,),), (line,) = args[:2]
            self.gathered += (len(lines) - 1) * line.nbytes
        else:
            assert not func._schema.name.startswith("c10d::"), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ffn", [256, 172])  # 172 is no multiple of 8
@pytest.mark.parametrize("shards", [8, 4, 1])
def test_muons_traffic_and_products_are_what_a_real_update_makes(shards, ffn):
    """Rank 0, which is given the first of the largest matrices, is one of the fullest of 8 here."""
    config = ModelConfig(width=64, layers=2, heads=4, kv_heads=2, ffn=ffn, vocab_size=128)
    setting = small(gpus=8, shards=shards, optim=Optim(name="muon"), model=config)
    dist.init_process_group("fake", store=FakeStore(), world_size=8, rank=0)
    try:
        root = Learner(config)
        parallelize(root, root.model.layers, World(size=8), precision="bf16", shards=shards)
        (_, muon) = optimisers(root, setting.run.optim)
        muon.step()  # no gradient, no work
        matrices = muon.param_groups[0]["params"]
        for p in matrices:
            p.grad = torch.zeros_like(p)
            muon.state[p]["momentum_buffer"] = torch.zeros_like(p).detach()
        known = [t for p in matrices for t in (p, p.grad, muon.state[p]["momentum_buffer"])]
        with Live() as live, Received() as received, FlopCounterMode(display=False) as flops:
            for tensor in known:
                tensor.to_local().detach()
            before = live.now()
            muon.step()
    finally:
        dist.destroy_process_group()
    load = muon_load(config, shards=shards, copies=8 // shards)
    assert flops.get_total_flops() == load.products
    assert (received.exchanged, received.gathered) == (load.exchanged, load.gathered)
    found = traffic(setting, count(config, shards=shards)).optimiser
    assert found == received.exchanged + received.gathered > 0
    # As lvm.muon says: nine matrices and, with copies, what is gathered, also of this copy.
    rows = 2 * received.gathered if shards < 8 else 0
    assert live.now() == before and live.peak - before <= 9 * 2 * 64 * ffn + rows


def test_muons_products_and_traffic_by_hand():
    config = replace(SMALL, layers=1, ffn=512)
    square, wide = 5 * (4 * 256**3 + 2 * 256**3), 5 * (4 * 256**2 * 512 + 2 * 256**3)
    alone = muon_load(config, shards=1, copies=1)
    assert (alone.products, alone.exchanged, alone.gathered) == (4 * square + 3 * wide, 0, 0)
    spread = muon_load(config, shards=8, copies=1)  # seven matrices, one each
    assert (spread.products, spread.rounds) == (wide, 1)
    every = 2 * (4 * 256 * 256 + 3 * 256 * 512)
    assert spread.exchanged == every / 8 + (6 / 8) * 2 * 256 * 512


def test_muon_is_no_longer_half_of_an_update_at_few_rows_a_card():
    """As docs/planning.md says of lvm_3b on 256 cards."""
    muon, adamw = (
        plan(Plan(gpus=256, run=replace(recipe("lvm_3b"), optim=optim))).steps["best"]
        for optim in (recipe("lvm_3b").optim, Optim(name="adamw"))
    )
    assert muon.optimiser - adamw.optimiser < 0.03 * adamw.seconds
    assert (muon.mfu, adamw.mfu) == (pytest.approx(0.637, abs=5e-4), pytest.approx(0.65, abs=5e-4))


def test_scaling_goes_to_1024_cards_and_knows_where_the_batch_ends():
    found = plan(Plan(gpus=64, run=recipe("lvm_1b")))
    assert [row.gpus for row in found.weak] == [8, 16, 32, 64, 128, 256, 512, 1024]
    assert {row.batch_rows // row.gpus for row in found.weak} == {8}
    assert [row.gpus for row in found.strong] == [8, 16, 32, 64, 128, 256, 512]  # 512 rows
    here = next(row for row in found.weak if row.gpus == 64)
    assert here.seconds == pytest.approx(found.steps["best"].seconds, rel=1e-6)
    assert all(0 < row.mfu < 0.75 for row in found.weak)


def run_main(*args: str) -> int:
    try:
        return guarded(lambda: main(args), prog="plan")
    except SystemExit as end:
        return int(end.code or 0)


def test_the_command_plans_7b_on_256_cards(capsys):
    assert run_main("lvm_7b", "--gpus", "256", "--gpu", "h100", "--shards", "8") == 0
    text = capsys.readouterr().out
    assert "lvm_7b on 256 h100 (32 copies x 8 shards)" in text
    assert "6,476,279,808 in the trunk" in text
    assert "the trainer's own sharding" in text and "assumptions" in text
    assert "nothing here was measured" in text and "1024" in text


def test_json_is_one_object_with_the_same_figures(capsys):
    assert run_main("lvm_300m", "--gpus", "8", "--json", "--model.layers", "2") == 0
    values = json.loads(capsys.readouterr().out)
    run = replace(recipe("lvm_300m"))
    run = replace(run, model=replace(run.model, layers=2))
    assert values == json.loads(json.dumps(to_json(plan(Plan(gpus=8, json=True, run=run)))))
    memory_ = values["memory"]
    parts = (v for k, v in memory_.items() if k not in ("total", "moment"))
    assert sum(parts) == pytest.approx(memory_["total"])
    assert values["assumptions"]["rates"][0]["name"] == "best"


def test_a_cpu_is_planned_without_times(capsys):
    assert run_main("tiny", "--gpus", "1", "--gpu", "cpu", "--row-len", "512") == 0
    text = capsys.readouterr().out
    assert "8320 rows, for 8192 codes" in text and "expected" not in text


def test_mistakes_are_told_with_what_works(capsys):
    assert run_main("lvm_3bb") == 2
    assert "did you mean lvm_3b" in capsys.readouterr().err
    assert run_main("lvm_3b", "--gpus", "100") == 2
    assert "--gpus 64 or 128, or --batch-rows 500 or 600" in capsys.readouterr().err
    assert run_main("lvm_3b", "--gpus", "1000") == 2
    assert "--gpus 512, or --batch-rows 1000" in capsys.readouterr().err
    assert run_main("lvm_3b", "--gpus", "8", "--shards", "3") == 2
    assert "does not divide 8 ranks" in capsys.readouterr().err
    assert run_main("lvm_3b", "--gpus", "0") == 2
    assert "wanted at least 1" in capsys.readouterr().err
    assert run_main("lvm_3b", "--gpus", "8", "--network-gbps", "0") == 2
    assert "wanted a positive network" in capsys.readouterr().err
    assert run_main() == 2 and run_main("--gpus", "8") == 2
    assert "stands where the recipe's name" in capsys.readouterr().err


def test_a_model_that_does_not_fit_is_told_what_would():
    run = recipe("lvm_13b")
    with pytest.raises(InputError, match=r"lvm_13b does not fit.*--gpus 2 with --recompute none"):
        plan(Plan(gpus=1, run=run))
    with pytest.raises(InputError) as error:
        plan(Plan(gpus=16, gpu="h100", run=replace(run, shards=2)))
    assert "--shards 0" in str(error.value)
    big = plan(Plan(gpus=8, run=run))
    tight = plan(Plan(gpus=8, run=replace(run, recompute="full"), reserve_gib=1.0))
    assert big.micro_rows >= 1 and largest(tight.setting, tight.units) > big.modes["full"]


@pytest.mark.parametrize(
    ("name", "trunk"),
    [
        ("aim_600m", "679,627,776"),
        ("aim_1b", "1,208,160,256"),
        ("aim_3b", "2,718,210,048"),
        ("aim_7b", "6,442,983,424"),
    ],
)
def test_a_plan_of_patches_says_the_published_sizes(name, trunk, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--gpus", "64"])
    text = capsys.readouterr().out
    assert f"{trunk} in the trunk" in text
    assert "not modelled: activations" in text and "nan" not in text


def test_a_plan_of_patches_is_arithmetic_over_its_figures(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["aim_1b", "--gpus", "8", "--shards", "4", "--json"])
    found = json.loads(capsys.readouterr().out)
    numbers = sum(found["parameters"].values())
    assert sum(found["states"].values()) == pytest.approx(16 * numbers / 4, abs=16)
    assert found["images"] == 4096 * 1_200_000
    flops = found["flops_per_patch"]["causal, with the head"] * 256 * found["images"]
    assert found["days"]["50%"] == pytest.approx(flops / (0.5 * 8 * 989e12) / 86_400)
    with pytest.raises(SystemExit, match="2"):
        main(["aim_1b", "--gpus", "8", "--shards", "3"])
    assert "--shards 3 does not divide 8 ranks" in capsys.readouterr().err
