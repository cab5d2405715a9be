"""Time sampling on this machine: python -m lvm.bench_generate [--device cuda] [--only demo].

Tokens a second of drawing one image after a prompt that leaves room for just that, with random
weights in fp32: `draw`, and transformers' `generate` on the same weights with each of its caches,
one after the other in each round, so that a change of the machine's speed meets all.

    dynamic          as `generate` does by default: the prompt is computed once for each candidate
    static           preallocated; on a GPU transformers compiles the step
    shared prefill   dynamic, the prompt computed once and its cache repeated for the candidates

`ratio` is against the fastest of them. `first ms` is the time until a first image of 1 candidate
stands, `cache MB` what keys and values take: ours as allocated, theirs as its shapes say. On a CPU
start-up is timed besides, in processes of their own: `import lvm.prompt`, and `--help`.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.timing import Body, Row, about, in_json, options, ratio, show, turns
from lvm.config import ModelConfig, Reads
from lvm.decoding.windows import Work
from lvm.generate import Sampling, draw
from lvm.interop import hf_names, to_hf
from lvm.model import Transformer, build
from lvm.recipes import recipe

OURS = "ours"


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    recipe: str
    codes: int
    per_image: int
    images: int  # of a row
    rounds: int = 0  # at most (0: as asked for)


CASES = {
    "cpu": [
        Case("demo", "demo", 512, 64, 8),
        Case("16 images of 256 codes", "demo", 8192, 256, 16, rounds=2),
    ],
    "cuda": [Case("lvm_300m", "lvm_300m", 8192, 256, 16)],
}


def subject(case: Case, device: str) -> tuple[Transformer, Reads]:
    """Return the model that is timed and what it reads."""
    reads = Reads(
        layout="bos",
        codes=case.codes,
        codes_per_image=case.per_image,
        row_len=case.per_image * case.images,
    )
    config = replace(recipe(case.recipe).model, vocab_size=reads.vocab.size)
    return build(config, seed=0, reads=reads).to(device).eval(), reads


def in_transformers(model: Transformer, reads: Reads) -> Any:
    """Return transformers' model of the same kind, with the weights of `model`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**to_hf(model.config, reads, dtype=torch.float32))
    theirs: Any = AutoModelForCausalLM.from_config(config)
    names = hf_names(model.config)
    theirs.load_state_dict({names[k]: v for k, v in model.state_dict().items()})
    return theirs.to(model.head.weight.device).eval()


def rivals(
    theirs: Any, reads: Reads, codes: Tensor, *, candidates: int, device: str
) -> dict[str, Callable[[], Tensor]]:
    """Return transformers' ways to draw an image after codes [k, n]; each gives ids [C, T + n]."""
    from transformers import DynamicCache

    n = reads.codes_per_image
    ids = torch.cat([codes.new_tensor([reads.vocab.bos]), codes.flatten()])[None].to(device)
    rest = {"do_sample": True, "top_k": 0, "min_new_tokens": n, "max_new_tokens": n}
    rest |= {"pad_token_id": reads.vocab.pad}

    def generate(**cache: Any) -> Tensor:
        with torch.inference_mode():
            return theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                num_return_sequences=candidates,
                **cache,
                **rest,
            )

    def shared() -> Tensor:
        with torch.inference_mode():
            cache = DynamicCache(config=theirs.config)
            theirs(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
            cache.batch_repeat_interleave(candidates)
            many = ids.repeat(candidates, 1)
            return theirs.generate(
                many, attention_mask=torch.ones_like(many), past_key_values=cache, **rest
            )

    found = {
        "dynamic": generate,
        "static": lambda: generate(cache_implementation="static"),
        "shared prefill": shared,
    }
    if device == "cuda":
        found["static, not compiled"] = lambda: generate(
            cache_implementation="static", disable_compile=True
        )
    return found


def case_rows(case: Case, device: str, *, repeats: int, counts: Sequence[int]) -> list[Row]:
    """Time ours and all rivals; a row for each number of candidates."""
    model, reads = subject(case, device)
    theirs = in_transformers(model, reads)
    n, k = reads.codes_per_image, reads.images_per_row - 1
    codes = torch.randint(reads.codes, (k, n), generator=torch.Generator().manual_seed(0))
    if case.rounds:
        repeats = min(repeats, case.rounds)
    table: list[Row] = []
    for candidates in counts:
        sampling = Sampling(candidates=candidates)
        others = rivals(theirs, reads, codes, candidates=candidates, device=device)
        bodies = {OURS: Body(partial(_ours, model, codes, sampling))}
        bodies |= {name: Body(partial(_theirs, body)) for name, body in others.items()}
        times, failed = turns(bodies, device=device, repeats=repeats)
        medians = {name: statistics.median(found) for name, found in times.items()}
        cache = Work(model, reads, [codes.to(device)], sampling).decoder.cache_bytes
        row: Row = {"model": case.name, "candidates": candidates}
        row |= {f"{name} tokens/s": round(candidates * n / x) for name, x in medians.items()}
        row["ratio"] = ratio(times, OURS, others)
        if candidates == 1:
            row |= {f"{name} first ms": round(1e3 * x) for name, x in medians.items()}
        row["ours cache MB"] = round(cache / 1e6, 1)
        row["theirs cache MB"] = round(
            cache_bytes(model.config, rows=candidates, places=reads.row_len) / 1e6, 1
        )
        row |= {f"{name} error": error for name, error in failed.items()}
        show(row)
        table.append(row)
    return table


def _ours(model: Transformer, codes: Tensor, sampling: Sampling, call: int) -> Tensor:
    return draw(model, codes, sampling).codes


def _theirs(body: Callable[[], Tensor], call: int) -> Tensor:
    return body()


def cache_bytes(config: ModelConfig, *, rows: int, places: int) -> int:
    """Return the bytes of keys and values, fp32, of rows that each hold all of their places."""
    return 4 * 2 * config.layers * config.groups * config.dim * rows * places


def start_row(repeats: int) -> Row:
    """Time processes that do next to nothing, imports included."""
    programs = {
        "import torch ms": ["-c", "import torch"],
        "import lvm.prompt ms": ["-c", "import lvm.prompt"],
        "lvm.prompt --help ms": ["-m", "lvm.prompt", "--help"],
    }
    row: Row = {}
    for name, program in programs.items():
        times = []
        for _ in range(repeats + 1):  # the first one fills the disk's cache
            start = time.perf_counter()
            subprocess.run([sys.executable, *program], check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - start)
        row[name] = round(1e3 * statistics.median(times[1:]))
    return row


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--only", help="cases whose name contains this")
        parser.add_argument("--candidates", type=int, nargs="+", default=[1, 16])

    found = options("python -m lvm.bench_generate", __doc__, more=more)
    table: list[Row] = []
    for case in CASES[found.device]:
        if found.only is None or found.only in case.name:
            table += case_rows(case, found.device, repeats=found.repeats, counts=found.candidates)
    if found.device == "cpu":
        table.append(start_row(min(5, found.repeats)))
        show(table[-1])
    in_json("generate", about(found.device), table)


if __name__ == "__main__":
    main()
