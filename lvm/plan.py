"""Plan a run without a GPU: python -m lvm.plan RECIPE --gpus N [--gpu h200] [--shards 8] …

Prints what the recipe needs and would take on N cards: parameters, FLOPs, memory by part, the
largest micro-batch, traffic, and expected times with every assumption beside them. Arithmetic
throughout; for several cards the model is sharded by the trainer's own code on a fake process
group. See docs/planning.md. Every value of the recipe can be replaced as in lvm.train.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal, get_args

import tyro

from lvm.config import Run
from lvm.parallel import Recompute, check_shards
from lvm.planning.cards import cards
from lvm.planning.memory import Memory, Setting, kept, largest, memory
from lvm.planning.report import lines
from lvm.planning.speed import NODE, RATES, Network, Step, at, step, traffic
from lvm.planning.units import Units, count, count_on_mesh
from lvm.planning.vision import vision_lines, vision_plan
from lvm.recipes import recipe, recipes
from tokenizer.cli import InputError, guarded
from tokenizer.cli import run as run_command

PROG = "python -m lvm.plan"
MOST_GPUS = 4096
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
MODES: tuple[Recompute, ...] = get_args(Recompute)
TABLE = 8320
"""Rows of the tables where a recipe leaves them to the data: 8192 codes and the specials."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Plan a run: memory, largest micro-batch, traffic, expected time."""

    gpus: int = 8
    """Cards of the run."""
    gpu: Literal["a100-80", "h100", "h200", "b200", "cpu"] = "h200"
    """Which; cpu plans the memory of this machine, and no times."""
    network_gbps: float = 400.0
    """Gigabits a second from a card to other nodes, one direction; within a node of 8, NVLink."""
    reserve_gib: float | None = None
    """Memory of a card left free for driver, communication buffers and fragmentation (default: 2
    GiB and 5 % of the card; on a CPU none)."""
    row_len: int = 4096
    """Positions of a row: the data's row_len."""
    tokens: float = 0.0
    """Tokens to train on (0: the recipe's steps x batch)."""
    json: bool = False
    """Print one JSON object in place of text."""
    run: Annotated[Run, tyro.conf.arg(name="")]
    """The recipe. What its batch, recompute, compile, shards and optimiser are counts here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """One line of the scaling table, at "best" rates."""

    gpus: int
    shards: int
    batch_rows: int
    micro_rows: int
    seconds: float
    exposed: float
    tokens_per_s: float
    per_gpu: float
    """Tokens a second and card, as a part of those at the table's first size."""
    mfu: float
    in_nodes: float
    """Tokens a second with a copy of the model in each node of 8 (0: does not fit)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What `plan` returns."""

    command: Plan
    setting: Setting
    units: Units
    source: str
    """Where the sizes of shards are from: arithmetic, or the trainer's own mesh."""
    micro_rows: int
    """The largest that fits and divides the rows of a card."""
    memory: Memory
    modes: dict[str, int]
    """Largest micro-batch that fits, by mode of recomputation; 0 where none does."""
    kept: dict[str, float]
    """Bytes that a block keeps a token, by mode."""
    tokens: float
    network: Network
    steps: dict[str, Step]
    """By rates; empty on a CPU."""
    weak: list[Scale]
    """Rows a card constant: the batch grows with the cards."""
    strong: list[Scale]
    """The recipe's batch, where it divides."""


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def check_batch_over(batch_rows: int, gpus: int) -> int:
    """Return the rows of one card; raises InputError naming cards and batches that work."""
    if gpus < 1 or batch_rows < 1:
        raise InputError(f"--gpus {gpus}, --batch-rows {batch_rows}: wanted at least 1 of each")
    if batch_rows % gpus:
        fitting = divisors(batch_rows)
        near = sorted({max(n for n in fitting if n <= gpus), *(n for n in fitting if n > gpus)})
        below = batch_rows // gpus * gpus
        batches = [str(rows) for rows in (below, below + gpus) if rows]
        raise InputError(
            f"a global batch of {batch_rows} rows does not divide over {gpus} GPUs; use --gpus "
            f"{' or '.join(map(str, near[:2]))}, or --batch-rows {' or '.join(batches)}"
        )
    return batch_rows // gpus


def setting_of(command: Plan) -> Setting:
    """Return what the command plans for; raises InputError where the mesh is impossible."""
    run = command.run
    if command.network_gbps <= 0 or command.row_len < 1 or command.tokens < 0:
        raise InputError(
            f"--network-gbps {command.network_gbps}, --row-len {command.row_len}, --tokens "
            f"{command.tokens}: wanted a positive network and row, and tokens not below 0"
        )
    card = cards()[command.gpu]
    reserve = 0.05 * card.memory + 2 * 2**30 if card.kind == "cuda" else 0.0
    if command.reserve_gib is not None:
        reserve = command.reserve_gib * 2**30
    if not run.model.vocab_size:
        run = replace(run, model=replace(run.model, vocab_size=TABLE))
    shards = check_shards(run.shards, world=command.gpus)
    return Setting(
        run=run,
        card=card,
        gpus=command.gpus,
        shards=shards,
        row_len=command.row_len,
        reserve=reserve,
    )


def with_mode(setting: Setting, mode: Recompute) -> Setting:
    return replace(setting, run=replace(setting.run, recompute=mode))


def fitting(setting: Setting, units: Units, rows: int) -> int:
    """Return the largest micro-batch that fits and divides `rows`; 0 where none does."""
    most = largest(setting, units)
    return max((n for n in divisors(rows) if n <= most), default=0)


def refuse(setting: Setting, units: Units, batch_rows: int) -> InputError:
    """Return the error of a model that does not fit, with what would make it fit."""
    need, have = memory(setting, units, 1).total, setting.card.memory
    mode = setting.run.recompute
    ways = [f"--recompute {other}" for other in MODES if largest(with_mode(setting, other), units)]
    fewest = MOST_GPUS + 1
    for other in dict.fromkeys((mode, "full")):
        for gpus in (n for n in divisors(batch_rows) if setting.gpus < n < fewest):
            wider = at(with_mode(setting, other), gpus=gpus, shards=gpus)
            if largest(wider, count(wider.run.model, shards=gpus)):
                ways.append(f"--gpus {gpus} with --recompute {other}, sharded over all")
                fewest = gpus
                break
    if setting.shards < setting.gpus and largest(
        at(setting, gpus=setting.gpus, shards=setting.gpus),
        count(setting.run.model, shards=setting.gpus),
    ):
        ways.append("--shards 0")
    return InputError(
        f"{setting.run.recipe} does not fit: one row at once needs {need / 2**30:.1f} GiB of "
        f"{have / 2**30:.1f} on each of {setting.gpus} {setting.card.name} (shards of a copy: "
        f"{setting.shards}) with --recompute {mode}. What fits: "
        f"{'; '.join(ways) or 'nothing that was tried; a larger card, or a smaller model'}"
    )


def scaled(
    setting: Setting, *, shards: int, net: Network, rows: int = 0, batch_rows: int = 0
) -> list[Scale]:
    """Return the scaling table: `rows` a card, or one batch for all sizes, where that divides.

    `shards` 0 shards over all cards. Sizes at which nothing fits are left out.
    """
    out: list[Scale] = []
    for gpus in SIZES:
        total = batch_rows or rows * gpus
        if total % gpus or (shards and gpus % shards):
            continue
        found = {}
        for size in {shards or gpus, NODE}:
            there = at(setting, gpus=gpus, shards=size)
            units = count(there.run.model, shards=size)
            if micro := fitting(there, units, total // gpus):
                best = step(
                    there, units, micro_rows=micro, batch_rows=total, rates=RATES[0], net=net
                )
                found[size] = micro, best
        if (shards or gpus) not in found:
            continue
        micro, best = found[shards or gpus]
        each = best.tokens_per_s / gpus
        out.append(
            Scale(
                gpus=gpus,
                shards=shards or gpus,
                batch_rows=total,
                micro_rows=micro,
                seconds=best.seconds,
                exposed=best.exposed,
                tokens_per_s=best.tokens_per_s,
                per_gpu=each / (out[0].tokens_per_s / out[0].gpus) if out else 1.0,
                mfu=best.mfu,
                in_nodes=found[NODE][1].tokens_per_s if NODE in found else 0.0,
            )
        )
    return out


def plan(command: Plan) -> Found:
    """Make the plan. Raises InputError where batch, mesh or memory do not work out."""
    setting = setting_of(command)
    run, config = setting.run, setting.run.model
    rows = check_batch_over(run.batch_rows, command.gpus)
    if setting.sharded:
        units = count_on_mesh(config, gpus=setting.gpus, shards=setting.shards)
        source = "the trainer's own sharding, on a fake process group"
    else:
        units, source = count(config, shards=1), "arithmetic"
    micro = fitting(setting, units, rows)
    if not micro:
        raise refuse(setting, units, run.batch_rows)
    net = Network(bandwidth=command.network_gbps * 1e9 / 8)
    timed = setting.card.peak > 0
    steps = {
        rates.name: step(
            setting, units, micro_rows=micro, batch_rows=run.batch_rows, rates=rates, net=net
        )
        for rates in RATES
        if timed
    }
    several = timed and setting.sharded
    return Found(
        command=command,
        setting=setting,
        units=units,
        source=source,
        micro_rows=micro,
        memory=memory(setting, units, micro),
        modes={mode: largest(with_mode(setting, mode), units) for mode in MODES},
        kept={mode: kept(setting, mode) for mode in MODES},
        tokens=command.tokens or float(run.steps * run.batch_rows * command.row_len),
        network=net,
        steps=steps,
        weak=scaled(setting, shards=run.shards, net=net, rows=rows) if several else [],
        strong=(
            scaled(setting, shards=run.shards, net=net, batch_rows=run.batch_rows) if timed else []
        ),
    )


def to_json(found: Found) -> dict[str, Any]:
    """Return the plan as JSON's types; bytes, seconds, FLOPs."""
    config, t = found.setting.run.model, found.setting.row_len
    sent = traffic(found.setting, found.units)
    micros = found.setting.run.batch_rows // (found.setting.gpus * found.micro_rows)
    return {
        "recipe": found.setting.run.recipe,
        "run": found.setting.run.to_json(),
        "gpus": found.setting.gpus,
        "shards": found.setting.shards,
        "card": asdict(found.setting.card),
        "parameters": {
            "trunk": config.num_params(embeddings=False),
            "all": config.num_params(),
            "on_a_rank": found.units.local,
        },
        "counted_by": found.source,
        "flops_per_token": {
            "causal": config.flops_per_token(t),
            "full": config.flops_per_token(t, causal=False),
        },
        "memory": {**asdict(found.memory), "total": found.memory.total},
        "micro_rows": {"planned": found.micro_rows, "largest": found.modes},
        "micro_batches": micros,
        "kept_bytes_per_token_and_block": found.kept,
        "traffic": {**asdict(sent), "step": sent.step(micros)},
        "steps": {name: asdict(step) for name, step in found.steps.items()},
        "tokens": found.tokens,
        "days": {name: found.tokens / s.tokens_per_s / 86400 for name, s in found.steps.items()},
        "weak_scaling": [asdict(scale) for scale in found.weak],
        "strong_scaling": [asdict(scale) for scale in found.strong],
        "assumptions": {
            "network": asdict(found.network),
            "cards_of_a_node": NODE,
            "rates": [asdict(rates) for rates in RATES],
            "row_len": t,
            "tables": "of the recipe" if found.command.run.model.vocab_size else "8192 codes",
        },
    }


def show(command: Plan) -> None:
    """Print the plan as text or JSON."""
    if (patches := command.run.patches) is not None:
        check_batch_over(command.run.batch_rows, command.gpus)
        shards = check_shards(command.run.shards, world=command.gpus)
        values = vision_plan(
            command.run, patches, card=cards()[command.gpu], gpus=command.gpus, shards=shards
        )
        text = vision_lines(values)
    else:
        values = to_json(plan(command))
        text = lines(values)
    print(json.dumps(values, indent=1) if command.json else "\n".join(text))


def main(args: Sequence[str]) -> int:
    """Read a recipe's name, then options of the plan and values that replace the recipe's."""
    names = ", ".join(recipes())
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(
            f"usage: {PROG} RECIPE --gpus N [--gpu h200] [--recompute full] [--shards 8] …\n\n"
            f"Recipes: {names}; or your own function as package.module.name.\n"
            f"`{PROG} RECIPE --help` lists every option and every value of the recipe.\n"
        )
        return 0 if args else 2
    if args[0].startswith("-"):
        raise InputError(f"{args[0]} stands where the recipe's name is wanted, one of {names}")
    run_command(
        Plan,
        show,
        prog=f"{PROG} {args[0]}",
        default=Plan(run=recipe(args[0])),
        args=args[1:],
    )
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:]), prog=PROG))
