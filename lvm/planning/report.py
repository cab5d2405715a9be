"""A plan as lines of text."""

from collections.abc import Iterator
from typing import Any

GIB = 2**30
PARTS = {
    "weights": "fp32 weights, this card's shard",
    "optimiser": "optimiser state",
    "gradients": "gradients, fp32, this card's shard",
    "gathered": "weights in the compute type",
    "reducing": "gradients not summed over cards yet",
    "kept": "kept for the backward pass, all blocks",
    "working": "one block at work, or the loss",
    "reserve": "reserve: driver, communication, fragments",
}


def size(bytes_: float) -> str:
    """Write bytes as GiB, or MiB below a tenth of one."""
    return f"{bytes_ / GIB:.2f} GiB" if bytes_ >= GIB / 10 else f"{bytes_ / 2**20:.1f} MiB"


def lines(plan: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of what lvm.plan.to_json returns."""
    run, card, gpus, shards = plan["run"], plan["card"], plan["gpus"], plan["shards"]
    parameters, flops = plan["parameters"], plan["flops_per_token"]
    row_len = plan["assumptions"]["row_len"]
    mesh = f"{gpus // shards} copies x {shards} shards" if shards < gpus else "one copy"
    yield f"{plan['recipe']} on {gpus} {card['name']} ({mesh if gpus > 1 else 'one process'})"
    yield ""
    yield (
        f"parameters            {parameters['trunk']:,} in the trunk, {parameters['all']:,} with "
        f"tables; {parameters['on_a_rank']:,} on a card"
    )
    yield (
        f"FLOPs a token         {flops['causal']:.3g} with the causal half of attention, "
        f"{flops['full']:.3g} with all of it"
    )
    yield (
        f"batch                 {run['batch_rows']} rows x {row_len} = "
        f"{run['batch_rows'] * row_len:,} tokens an update; a card computes "
        f"{plan['micro_batches']} x {plan['micro_rows']['planned']} rows"
    )
    yield f"shards counted by     {plan['counted_by']}"
    if plan["assumptions"]["tables"] != "of the recipe":
        yield "tables                8320 rows, for 8192 codes: the recipe leaves them to the data"
    yield from _memory(plan)
    yield from _traffic(plan)
    if plan["steps"]:
        yield from _time(plan)
        yield from _scaling(plan)
        yield from _assumptions(plan)


def _memory(plan: dict[str, Any]) -> Iterator[str]:
    run, memory, micro = plan["run"], plan["memory"], plan["micro_rows"]
    yield ""
    yield (
        f"memory of a card with {micro['planned']} rows at once, recompute {run['recompute']}"
        f"{', compiled' if run['compile'] else ''}; fullest at: {memory['moment']}"
    )
    for part, name in PARTS.items():
        yield f"  {name:<44} {size(memory[part]):>12}"
    have = plan["card"]["memory"]
    yield f"  {'all':<44} {size(memory['total']):>12}  of {size(have)}"
    most = ", ".join(f"{mode} {rows or 'does not fit'}" for mode, rows in micro["largest"].items())
    yield f"most rows at once that fit, by --recompute: {most}"
    yield f"  planned: {micro['planned']}, which divides a card's rows; --micro-rows for lvm.train"
    if run["micro_rows"] > micro["largest"][run["recompute"]]:
        yield f"  the recipe's own --micro-rows {run['micro_rows']} does NOT fit"


def _traffic(plan: dict[str, Any]) -> Iterator[str]:
    if plan["gpus"] == 1:
        return
    sent, micros = plan["traffic"], plan["micro_batches"]
    yield ""
    yield f"received by a card in an update of {micros} micro-batches: {size(sent['step'])}"
    rows = (
        ("gather_forward", "weights before each forward pass", micros),
        ("gather_backward", "weights before each backward pass", micros),
        ("reduce_scatter", "gradients of each, fp32", micros),
        ("all_reduce", "gradients between copies, fp32, once", 1),
        ("optimiser", "Muon's matrices, once", 1),
    )
    for key, name, times in rows:
        if sent[key]:
            yield f"  {name:<44} {size(sent[key]):>12}  x {times}"


def _time(plan: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield "expected, by the assumptions below; nothing here was measured"
    heads = ("", "forward", "backward", "exposed", "optim.", "step", "tokens/s", "MFU", "full")
    yield "  " + "".join(f"{head:>11}" for head in heads) + f"{'days':>9}"
    for name, step in plan["steps"].items():
        times = (step[k] for k in ("forward", "backward", "exposed", "optimiser", "seconds"))
        yield (
            f"  {name:>11}"
            + "".join(f"{seconds:>9.3f} s" for seconds in times)
            + f"{step['tokens_per_s']:>11,.0f}{step['mfu']:>11.1%}{step['mfu_full']:>11.1%}"
            + f"{plan['days'][name]:>9.1f}"
        )
    yield (
        f"  days are for {plan['tokens']:,.0f} tokens; communication in all "
        f"{plan['steps']['best']['communication']:.3f} s a step, hidden or exposed"
    )


def _scaling(plan: dict[str, Any]) -> Iterator[str]:
    batch = plan["run"]["batch_rows"]
    each = batch // plan["gpus"]
    tables = (
        (f"weak scaling: {each} rows a card, the batch grows", plan["weak_scaling"]),
        (f"the recipe's batch of {batch} rows, where it divides", plan["strong_scaling"]),
    )
    for title, rows in tables:
        if not rows and title.startswith("weak") and plan["gpus"] == 1:
            continue
        yield ""
        yield f"{title}; rates best"
        if not rows:
            yield "  no number of cards from 8 to 1,024 fits"
            continue
        yield (
            f"  {'cards':>6}{'shards':>8}{'rows':>7}{'at once':>9}{'step':>10}{'exposed':>10}"
            f"{'tokens/s':>13}{'a card':>8}{'MFU':>8}{'copy a node':>14}"
        )
        for row in rows:
            yield (
                f"  {row['gpus']:>6}{row['shards']:>8}{row['batch_rows']:>7}{row['micro_rows']:>9}"
                f"{row['seconds']:>8.3f} s{row['exposed']:>8.3f} s{row['tokens_per_s']:>13,.0f}"
                f"{row['per_gpu']:>8.0%}{row['mfu']:>8.1%}"
                + (f"{row['in_nodes']:>14,.0f}" if row["in_nodes"] else f"{'does not fit':>14}")
            )


def _assumptions(plan: dict[str, Any]) -> Iterator[str]:
    card, assumed = plan["card"], plan["assumptions"]
    net = assumed["network"]
    yield ""
    yield "assumptions"
    yield (
        f"  card        data sheet: {card['memory'] / 1e9:.0f} GB, {card['peak'] / 1e12:.0f} "
        f"TFLOP/s dense bf16, {card['bandwidth'] / 1e12:.2f} TB/s, NVLink "
        f"{card['nvlink'] / 1e9:.0f} GB/s one way"
    )
    yield (
        f"  network     {net['bandwidth'] / 1e9:.0f} GB/s a card between nodes of "
        f"{assumed['cards_of_a_node']}, of which collectives reach {net['share']:.0%} (of NVLink "
        f"too); {net['hop'] * 1e6:.0f} µs a hop in a node, {net['far_hop'] * 1e6:.0f} µs between "
        "nodes; --network-gbps"
    )
    for rates in assumed["rates"]:
        yield (
            f"  {rates['name']:<11} products at {rates['products']:.0%} of the peak, attention at "
            f"{rates['attention_forward']:.0%} forward and {rates['attention_backward']:.0%} "
            f"backward, {rates['elementwise']:g} x the bytes of fused elementwise code at "
            f"{rates['memory']:.0%} of the bandwidth"
        )
    yield (
        f"  copy a node tokens/s with --shards {assumed['cards_of_a_node']}: each node holds the "
        "model, gradients are summed between nodes"
    )
    yield "  overlap     communication hides behind its pass, but for the root unit's at either end"
    yield f"  data        a document of {assumed['row_len']} positions a row; loading is free"
    yield "  left out    stragglers, checkpoints, validation, restarts, clock limits of power"
