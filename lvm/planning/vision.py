"""The plan of a run on patches (AIM): sizes, FLOPs, states of a card, time at a stated utilisation.

Shorter than a plan for codes: activations and traffic of patches are not modelled, so it names no
largest micro-batch.
"""

from collections.abc import Iterator
from typing import Any

import torch

from lvm.config import Patches, Run
from lvm.patch_learner import PatchLearner
from lvm.planning.cards import Card
from lvm.vision import flops_per_token

USES = (0.4, 0.5)  # utilisations that times are printed for; nothing of the kind was measured


def vision_plan(
    run: Run, patches: Patches, *, card: Card, gpus: int, shards: int
) -> dict[str, Any]:
    """Return what the recipe needs, counted on the meta device; bytes, FLOPs, seconds."""
    with torch.device("meta"):
        learner = PatchLearner(run.model, patches)

    def numbers(module: torch.nn.Module | None) -> int:
        return sum(p.numel() for p in module.parameters()) if module is not None else 0

    embedding, head = numbers(learner.model.embed), numbers(learner.head)
    everything = numbers(learner)
    flops = {
        f"{kind}, {part}": flops_per_token(run.model, patches, causal=kind == "causal", head=full)
        for kind in ("causal", "full")
        for part, full in (("with the head", True), ("without", False))
    }
    images = run.steps * run.batch_rows
    total = flops["causal, with the head"] * patches.count * images
    local = -(-everything // shards)
    return {
        "recipe": run.recipe,
        "gpus": gpus,
        "card": card.name,
        "shards": shards,
        "parameters": {
            "trunk": numbers(learner.model) - embedding, "embedding": embedding, "head": head
        },
        "patches": patches.count,
        "batch_rows": run.batch_rows,
        "images": images,
        "flops_per_patch": flops,
        "flops": total,
        "states": {"weights": 4 * local, "gradients": 4 * local, "optimiser": 8 * local},
        "days": {
            f"{use:.0%}": total / (use * gpus * card.peak) / 86_400 for use in USES if card.peak
        },
    }  # fmt: skip


def vision_lines(plan: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a plan."""
    parameters, flops, gib = plan["parameters"], plan["flops_per_patch"], 2**30
    yield f"{plan['recipe']} on {plan['gpus']} {plan['card']}, {plan['shards']} shards a copy"
    yield ""
    yield (
        f"parameters            {parameters['trunk']:,} in the trunk, {parameters['embedding']:,} "
        f"in the patch embedding, {parameters['head']:,} in the head, which export drops"
    )
    for kind in ("causal", "full"):
        yield (
            f"FLOPs a patch         {flops[kind + ', with the head']:.3g} with the head, "
            f"{flops[kind + ', without']:.3g} without; attention counted by "
            f"{'its causal half' if kind == 'causal' else 'all pairs'}"
        )
    yield (
        f"batch                 {plan['batch_rows']:,} images x {plan['patches']} patches; "
        f"{plan['images'] / 1e9:.3g} B images in all, {plan['flops']:.3g} FLOPs"
    )
    states = plan["states"]
    yield (
        f"states of a card      {sum(states.values()) / gib:.2f} GiB in fp32: weights "
        f"{states['weights'] / gib:.2f}, gradients {states['gradients'] / gib:.2f}, AdamW "
        f"{states['optimiser'] / gib:.2f}"
    )
    for use, days in plan["days"].items():
        yield f"time                  {days:.1f} days if {use} of the cards' peak is reached"
    yield ""
    yield "not modelled: activations, traffic, decoding of images. No time was measured."
