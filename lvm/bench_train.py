"""Time training on this machine: python -m lvm.bench_train [--device cuda] [--minutes 9].

Updates of the LVM recipes on random codes, as `lvm.train` makes them on one device: forward and
backward of 16,384 tokens in rows of 4,096, clipping, AdamW. A line says the recipe, what runs
(attention, torch.compile, recomputation), whether rows are one causal document or packed of four,
tokens a second, both accountings of MFU (see lvm.metrics) and the most memory held. Beside them
transformers' LlamaForCausalLM of the same shape, with SDPA, fused AdamW and autocast. Each case is
timed alone, after updates that compile and warm up; those that no longer fit into `--minutes` are
left out by name. On a CPU two small cases.
"""

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels.attention import Backend
from kernels.timing import Row, about, describe, in_json, options, recover, seconds, show
from lvm import metrics, optim, parallel
from lvm.config import Reads, Run
from lvm.interop import to_llama
from lvm.learner import Learner, backward
from lvm.model import on_meta
from lvm.recipes import recipe
from tokenizer.world import World
from visual_sentences.batch import Batch

DOCUMENTS = 4  # of a packed row


@dataclass(frozen=True, slots=True)
class Case:
    recipe: str
    attention: Backend = "sdpa"
    compiled: bool = True
    packed: bool = True
    recompute: parallel.Recompute = "none"
    rival: bool = False  # transformers in place of ours

    @property
    def name(self) -> str:
        what = "transformers" if self.rival else self.attention
        words = [self.recipe, what, "packed" if self.packed else "causal"]
        words += ["compiled"] if self.compiled else []
        words += [f"{self.recompute} recomputation"] if self.recompute != "none" else []
        return ", ".join(words)


def cases(device: str) -> list[Case]:
    """Return what is timed, what matters most first."""
    if device == "cpu":
        return [Case("demo", compiled=False), Case("demo", compiled=False, recompute="full")]
    small, large = ("lvm_300m", "lvm_1b"), "lvm_3b"
    ours: list[Backend] = ["triton", "sdpa"]
    found = [Case(name, attention) for name in small for attention in ours]
    found += [Case(large, attention, recompute="selective") for attention in ours]
    found += [Case(name, attention, packed=False) for name in small for attention in ours]
    found += [Case(name, packed=False, compiled=False, rival=True) for name in small]
    found += [Case(small[0], "flex"), Case(small[0], "triton", compiled=False)]
    return [*found, Case(small[1], "triton", recompute="selective")]


def batch_of(run: Run, rows: int, length: int, *, packed: bool, device: torch.device) -> Batch:
    """Return random codes in rows of one document or of `DOCUMENTS`."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(run.model.vocab_size - 128, (rows, length), generator=generator)
    place = torch.arange(length, dtype=torch.int32, device=device).expand(rows, length)
    step = length // DOCUMENTS if packed else length
    return Batch(
        ids=codes.to(device),
        labels=codes.roll(-1, 1).to(device),
        doc=place // step,
        block=place.contiguous(),
        pos=place % step,
        source=torch.zeros(rows, dtype=torch.int32, device=device),
        exact=step % 128 == 0,
    )


def our_update(run: Run, batch: Batch, world: World) -> Callable[[], object]:
    """Return one update of a new model of ours."""
    model = on_meta(run.model)
    learner = Learner(model, z_loss=run.z_loss, attention=run.attention)
    parallel.parallelize(
        learner,
        model.layers,
        world,
        precision=run.precision,
        recompute=run.recompute,
        compiled=run.compile,
    )
    parallel.initialise(model, 0)
    made, parameters = optim.optimisers(learner, run.optim), list(learner.parameters())

    def update() -> None:
        backward(learner, batch, run=run, world=world)
        optim.clip(parameters, run.optim.clip)
        for optimiser in made:
            optimiser.step()
            optimiser.zero_grad()

    return update


def their_update(run: Run, batch: Batch, world: World) -> Callable[[], object]:
    """Return one update of transformers' model of the same shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = replace(run.model, qk_norm=False)
    reads = Reads(layout="bos", codes=8192, codes_per_image=256, row_len=batch.ids.shape[1])
    settings: dict[str, Any] = to_llama(shape, reads, dtype=torch.float32)
    with world.device:
        model: Any = LlamaForCausalLM(LlamaConfig(**settings))
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def update() -> None:
        with parallel.compute(world, precision=run.precision):
            loss: Tensor = model(input_ids=batch.ids, labels=batch.ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    return update


def measure(case: Case, world: World, *, repeats: int, length: int = 0) -> Row:
    """Time a case; a row with its figures, or with the error that ended it."""
    cuda = world.device.type == "cuda"
    rows, micro = (4, 4) if cuda else (2, 2)
    length = length or (4096 if cuda else 512)
    run = recipe(case.recipe)
    run = replace(
        run,
        model=replace(run.model, vocab_size=run.model.vocab_size or 640),
        optim=replace(run.optim, name="adamw"),
        batch_rows=rows,
        micro_rows=1 if case.recipe == "lvm_3b" else micro,
        attention=case.attention,
        compile=case.compiled,
        recompute=case.recompute,
    )
    batch = batch_of(run, rows, length, packed=case.packed, device=world.device)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        update = (their_update if case.rival else our_update)(run, batch, world)
        took = seconds(update, device=world.device.type, repeats=repeats)
    except Exception as error:  # one case that does not run leaves the others to be timed
        return {"case": case.name, "error": describe(error)}
    speed = rows * length / took
    used = metrics.utilisation(run.model.flops_per_token, world, tokens_per_s=speed, row_len=length)
    return {
        "case": case.name,
        "ms": round(took * 1e3, 1),
        "tokens/s": round(speed),
        **{name: round(value, 4) for name, value in used.items()},
        "GiB": round(metrics.memory_gib(world), 2),
    }


def add_minutes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no case after these")


def main() -> None:
    found = options("python -m lvm.bench_train", __doc__, more=add_minutes)
    end = time.monotonic() + 60 * found.minutes
    world = World(device=torch.device(found.device))
    table: list[Row] = []
    for case in cases(found.device):
        if time.monotonic() > end:
            row: Row = {"case": case.name, "error": f"not begun within {found.minutes} minutes"}
        else:
            row = measure(case, world, repeats=found.repeats)
            gc.collect()
            torch.compiler.reset()
            recover(found.device)
        show(row)
        table.append(row)
    in_json("train", about(found.device), table)


if __name__ == "__main__":
    main()
