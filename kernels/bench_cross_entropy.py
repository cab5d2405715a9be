"""The linear head and its loss in the benchmark: time and peak memory of value and gradients."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import has_triton
from kernels.bench_case import Bench, Forward, compiled, doubled, passes, results, verify
from kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from kernels.timing import Body, Row, ratio, turns


def plain_loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the cross-entropy as torch has it, logits in fp32 for the softmax."""
    return F.cross_entropy(F.linear(x, weight).float(), labels, reduction="sum")


def losses(device: str) -> dict[str, Callable[[], Forward]]:
    """Return by backend what makes the loss of (x, weight, labels)."""

    def ours(backend: Any) -> Callable[[], Forward]:
        return lambda: lambda x, w, y: linear_cross_entropy(x, w, y, backend=backend).loss

    found: dict[str, Callable[[], Forward]] = {}
    if device == "cuda" and has_triton():
        found["triton"] = ours("triton")
    found["torch"] = ours("torch")
    found["F.cross_entropy"] = lambda: plain_loss
    if device == "cuda":
        found["compiled"] = lambda: compiled(plain_loss)
    return found


def peak(body: Callable[[int], object]) -> float:
    """Return the MiB that a call needs at most beyond what is allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    body(0)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def case(bench: Bench, tokens: int, width: int, columns: int) -> None:
    device = bench.device
    row: Row = {"tokens": tokens, "width": width, "columns": columns}
    x, w = (
        torch.randn(n, width, device=device).mul(scale).bfloat16().requires_grad_()
        for n, scale in ((tokens, 1.0), (columns, width**-0.5))
    )
    labels = torch.randint(columns, (tokens,), device=device)
    inputs, grads = [x, w, labels], [torch.ones((), device=device)]
    want = results(
        lambda a, b, y: linear_cross_entropy_reference(a, b, y).loss,
        doubled(inputs), [grads[0].double()],
    )  # fmt: skip
    bodies: dict[str, Body] = {}
    peaks: dict[str, float] = {}
    for name, make in losses(device).items():
        forward, about, ours = make(), {**row, "backend": name}, name in ("triton", "torch")
        if verify(
            bench, "cross_entropy", about, forward, want=want, inputs=inputs, grads=grads, ours=ours
        ):
            both = passes(forward, [inputs], [grads])["fwd+bwd"]
            bodies[f"fwd+bwd {name}"] = both
            bodies[f"value {name}"] = Body(torch.no_grad()(lambda _, f=forward: f(*inputs)))
            if device == "cuda":
                peaks[name] = peak(both.run)
    times, failures = turns(bodies, device=device, repeats=bench.repeats)
    for key, why in failures.items():
        ours = key.split(" ", 1)[1] in ("triton", "torch")
        bench.fail("cross_entropy", {**row, "backend": key}, why, ours=ours)
    names = [key.removeprefix("fwd+bwd ") for key in times if key.startswith("fwd+bwd ")]
    for name in names:
        took = statistics.median(times[f"fwd+bwd {name}"])
        value = times.get(f"value {name}")
        bench.add(
            "cross_entropy",
            {
                **row,
                "backend": name,
                "value ms": round(statistics.median(value) * 1e3, 3) if value else None,
                "fwd+bwd ms": round(took * 1e3, 3),
                "TFLOP/s": round(6 * tokens * width * columns / took / 1e12, 3),
                "x best": ratio(
                    times, f"fwd+bwd {name}", [f"fwd+bwd {n}" for n in names if n != name]
                ),
                "peak MiB": round(peaks[name]) if name in peaks else None,
            },
        )


def table(bench: Bench) -> None:
    gpu = bench.device == "cuda"
    for tokens in (8192, 32768) if gpu else (1024,):
        if bench.late("cross_entropy", str(tokens)):
            return
        with bench.guarded("cross_entropy", {"tokens": tokens}, ours=True):
            case(bench, tokens, *((2048, 8320) if gpu else (256, 1024)))
