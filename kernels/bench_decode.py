"""Decode attention in the benchmark: candidates of one prompt, with own caches and with one shared.

A step reads keys and values and computes little: GB/s are of the bytes that a form has to read,

    own caches       2·R·G·(prompt + drawn)·D·b
    shared prefix    2·G·prompt·D·b + 2·R·G·drawn·D·b

and tokens/s are of the attention of all layers and of nothing else. Times are of replayed CUDA
graphs, as a sampler of 22 layers would run them; caches are taken in turn so that none is found in
the L2 cache.
"""

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import has_triton
from kernels.bench_case import BOUNDS, Bench, relative
from kernels.decode import Backend, decode_attention, decode_reference, shared_prefix_attention
from kernels.timing import Body, ratio, rotation, turns

LAYERS = 22  # of the 300M and of the 1B model
DRAWN = 128  # of an image of 256: halfway
GRAPH = 8  # calls of a graph, at least

Step = Callable[..., Tensor]


def bytes_read(
    *, rows: int, groups: int, prompt: int, drawn: int, dim: int, shared: bool, size: int = 2
) -> int:
    """Return the bytes of keys and values that a step of `rows` candidates has to read."""
    places = prompt + rows * drawn if shared else rows * (prompt + drawn)
    return 2 * groups * places * dim * size


def caches(rows: int, groups: int, prompt: int, dim: int, device: str) -> dict[str, Tensor]:
    """Return a query, the prompt's cache, each candidate's, and both in one cache a candidate."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    def lengths(count: int, value: int) -> Tensor:
        return torch.full((count,), value, dtype=torch.int32, device=device)

    made = {"q": draw(rows, groups, dim), "drawn": lengths(rows, DRAWN)}
    made |= {"all": lengths(rows, prompt + DRAWN), "prompt": lengths(1, prompt)}
    for x in "kv":
        prefix, suffix = draw(1, groups, prompt, dim), draw(rows, groups, 2 * DRAWN, dim)
        made |= {f"prefix {x}": prefix, f"suffix {x}": suffix}
        made[f"own {x}"] = torch.cat([prefix.expand(rows, -1, -1, -1), suffix], 2)
    return made


def steps(device: str, filled: int) -> dict[str, tuple[Step, tuple[str, ...]]]:
    """Return by backend what it calls and the names of what it reads, queries first."""

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k[:, :, :filled], v[:, :, :filled]
        return F.scaled_dot_product_attention(q[:, :, None], k, v)[:, :, 0]

    own = ("q", "own k", "own v", "all")
    shared = ("q", "prefix k", "prefix v", "prompt", "suffix k", "suffix v", "drawn")
    ours: Backend = "triton" if device == "cuda" and has_triton() else "torch"
    return {
        f"{ours} own": (functools.partial(decode_attention, backend=ours), own),
        f"{ours} shared": (functools.partial(shared_prefix_attention, backend=ours), shared),
        "sdpa own": (sdpa, ("q", "own k", "own v")),
    }


def graphed(step: Callable[[int], object], calls: int) -> Body:
    """Return the body that replays `calls` of `step` from a CUDA graph."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # compiles and allocates outside the graph
        for i in range(2):
            step(i)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            step(i)
    return Body(lambda _: graph.replay(), calls=calls)


def reference(found: Mapping[str, Tensor], rows: Sequence[int]) -> Tensor:
    """Return the result of some candidates in float64, from the caches in one."""
    q, k, v, n = (found[name][list(rows)] for name in ("q", "own k", "own v", "all"))
    return decode_reference(q, k, v, n)


def case(bench: Bench, model: str, groups: int, *, rows: int, prompt: int, dim: int) -> None:
    """Check and time the backends on one number of candidates."""
    device, row = bench.device, {"model": model, "candidates": rows, "prompt": prompt}
    shape = {"rows": rows, "groups": groups, "prompt": prompt, "drawn": DRAWN, "dim": dim}
    count = rotation(bytes_read(**shape, shared=True), device)
    sets = [caches(rows, groups, prompt, dim, device) for _ in range(count)]
    some = [0, rows - 1]
    want = reference(sets[0], some)
    bodies: dict[str, Body] = {}
    for name, (step, names) in steps(device, prompt + DRAWN).items():

        def call(i: int, step: Step = step, names: tuple[str, ...] = names) -> Tensor:
            return step(*(sets[i % count][x] for x in names))

        with bench.guarded("decode", {**row, "backend": name}, ours="sdpa" not in name):
            bench.verdict(
                "decode",
                {**row, "backend": name},
                error=relative(call(0)[some], want),
                bound=BOUNDS[torch.bfloat16],
            )
            calls = count * math.ceil(GRAPH / count)
            bodies[name] = graphed(call, calls) if device == "cuda" else Body(call)
    times, failures = turns(bodies, device=device, repeats=bench.repeats)
    for name, why in failures.items():
        bench.fail("decode", {**row, "backend": name}, why, ours="sdpa" not in name)
    for name, found in times.items():
        took = statistics.median(found)
        read = bytes_read(**shape, shared=name.endswith("shared"))
        bench.add(
            "decode",
            {
                **row,
                "backend": name,
                "us": round(took * 1e6, 2),
                "MB": round(read / 1e6, 2),
                "GB/s": round(read / took / 1e9, 1),
                "tokens/s": round(rows / took / LAYERS),
                "x own": ratio(times, name, [name.replace("shared", "own")])
                if name.endswith("shared")
                else None,
                "x sdpa": ratio(times, name, ["sdpa own"]) if name != "sdpa own" else None,
            },
        )


@torch.no_grad()
def table(bench: Bench) -> None:
    gpu = bench.device == "cuda"
    models = {"300M": 8, "1B": 16} if gpu else {"small": 4}
    prompt, dim = (3840, 128) if gpu else (480, 64)
    for model, groups in models.items():
        for rows in (1, 4, 16, 64) if gpu else (1, 16):
            if bench.late("decode", f"{model} {rows}"):
                return
            with bench.guarded("decode", {"model": model, "candidates": rows}, ours=True):
                case(bench, model, groups, rows=rows, prompt=prompt, dim=dim)
