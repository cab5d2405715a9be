"""RMSNorm, SwiGLU and rotary positions in the benchmark.

These layers are limited by bytes: GB/s are of the least that a pass has to move, as the docstring
of each kernel counts them, whatever a backend moves. Shapes are those of LVM 1B with 16,384 tokens.
"""

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import has_triton
from kernels.bench_case import Bench, Forward, compiled, doubled, passes, results, verify
from kernels.rms_norm import rms_norm, rms_norm_reference
from kernels.rope import rope, rope_reference
from kernels.swiglu import swiglu, swiglu_linear, swiglu_reference
from kernels.timing import Body, Row, ratio, rotation, turns


@dataclass(frozen=True, slots=True)
class Layer:
    """One elementwise layer: what it computes by backend, its oracle, its inputs, its bytes."""

    name: str
    by: Callable[[Any], Forward]  # backend → forward
    reference: Forward
    make: Callable[[], list[Tensor]]
    shapes: Sequence[tuple[int, ...]]  # of the outputs
    bytes: Mapping[str, int]  # at the least, by pass; 0 where matrix products decide
    others: Mapping[str, Forward] = field(default_factory=dict)  # compiled too


def layers(device: str, *, rows: int, length: int, heads: int, dim: int, ffn: int) -> list[Layer]:
    """Return the layers on tensors of `rows` times `length` tokens, all in bf16."""
    tokens, width, eps = rows * length, heads * dim, 1e-6

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).bfloat16()

    def leaf(*shape: int) -> Tensor:
        return draw(*shape).requires_grad_()

    def turned() -> list[Tensor]:
        pos = torch.arange(length, device=device, dtype=torch.float32)
        freq = 10_000 ** -(torch.arange(0, dim, 2, device=device) / dim)
        angles = (pos[:, None] * freq)[None, None].expand(rows, 1, length, dim // 2)
        q, k = (draw(rows, length, heads, dim).transpose(1, 2).requires_grad_() for _ in range(2))
        return [q, k, angles.cos().contiguous(), angles.sin().contiguous()]

    def turn_normed(backend: Any) -> Forward:
        return lambda q, k, cos, sin, a, b: rope(
            q, k, cos, sin, q_weight=a, k_weight=b, eps=eps, backend=backend
        )

    def turn_reference(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, a: Tensor | None = None,
        b: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return (
            rope_reference(q, cos, sin, weight=a, eps=eps),
            rope_reference(k, cos, sin, weight=b, eps=eps),
        )

    n, f, x = 2 * tokens * width, 2 * tokens * ffn, 2 * tokens * 2 * width
    angles = 4 * tokens * dim
    heads_out = [(rows, heads, length, dim)] * 2
    return [
        Layer(
            "RMSNorm",
            lambda backend: lambda s, w: rms_norm(s, w, eps=eps, backend=backend),
            lambda s, w: rms_norm_reference(s, w, eps=eps)[0],
            lambda: [leaf(tokens, width), leaf(width)],
            [(tokens, width)],
            {"fwd": 2 * n, "fwd+bwd": 5 * n},
        ),
        Layer(
            "RMSNorm + residual",
            lambda backend: lambda s, r, w: rms_norm(s, w, eps=eps, residual=r, backend=backend),
            lambda s, r, w: rms_norm_reference(s, w, eps=eps, residual=r),
            lambda: [leaf(tokens, width), leaf(tokens, width), leaf(width)],
            [(tokens, width)] * 2,
            {"fwd": 4 * n, "fwd+bwd": 8 * n},
        ),
        Layer(
            "SwiGLU",
            lambda backend: lambda gate, up: swiglu(gate, up, backend=backend),
            swiglu_reference,
            lambda: [leaf(tokens, ffn), leaf(tokens, ffn)],
            [(tokens, ffn)],
            {"fwd": 3 * f, "fwd+bwd": 8 * f},
        ),
        Layer(
            "SwiGLU + linear",
            lambda backend: lambda gate, up, w: swiglu_linear(gate, up, w, backend=backend),
            lambda gate, up, w: swiglu_reference(gate, up) @ w.T,
            lambda: [leaf(tokens, ffn), leaf(tokens, ffn), leaf(width, ffn)],
            [(tokens, width)],
            {"fwd": 0, "fwd+bwd": 0},
            {"compiled, product kept": lambda gate, up, w: F.linear(F.silu(gate) * up, w)},
        ),
        Layer(
            "RoPE",
            lambda backend: lambda q, k, cos, sin: rope(q, k, cos, sin, backend=backend),
            turn_reference,
            turned,
            heads_out,
            {"fwd": 2 * x + angles, "fwd+bwd": 4 * x + 2 * angles},
        ),
        Layer(
            "QK-norm + RoPE",
            turn_normed,
            turn_reference,
            lambda: [*turned(), leaf(dim), leaf(dim)],
            heads_out,
            {"fwd": 2 * x + angles, "fwd+bwd": 5 * x + 2 * angles},
        ),
    ]


def keeps(forward: Callable[[int], object]) -> float:
    """Return the MiB that are held between the passes, the result of the first among them."""
    before = torch.cuda.memory_allocated()
    out = forward(0)
    held = torch.cuda.memory_allocated() - before
    del out
    return round(held / 2**20, 1)


def case(bench: Bench, layer: Layer) -> None:
    """Check and time eager torch, compiled torch and our kernel."""
    device = bench.device
    makers: dict[str, Callable[[], Forward]] = {}
    if device == "cuda" and has_triton():
        makers["triton"] = lambda: layer.by("triton")
    makers["torch"] = lambda: layer.by("torch")
    if device == "cuda":
        makers["compiled"] = lambda: compiled(layer.by("torch"))
        for name, forward in layer.others.items():
            makers[name] = functools.partial(compiled, forward)
    size = layer.bytes["fwd"] or 2 * math.prod(layer.shapes[0])
    count = rotation(size, device)
    sets = [layer.make() for _ in range(count)]

    def gradient(shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 4:  # of heads, which lie beside each other
            b, h, t, c = shape
            return torch.randn(b, t, h, c, device=device).bfloat16().transpose(1, 2)
        return torch.randn(shape, device=device).bfloat16()

    grads = [[gradient(shape) for shape in layer.shapes] for _ in range(count)]
    want = results(layer.reference, doubled(sets[0]), [g.double() for g in grads[0]])
    bodies: dict[str, Body] = {}
    kept: dict[str, float] = {}
    for name, make in makers.items():
        forward = make()
        row: Row = {"layer": layer.name, "backend": name}
        if verify(
            bench, "elementwise", row, forward, want=want, inputs=sets[0], grads=grads[0],
            ours=name == "triton",
        ):  # fmt: skip
            several = passes(forward, sets, grads)
            if device == "cuda":
                kept[name] = keeps(several["fwd"].run)
            bodies |= {f"{what} {name}": several[what] for what in layer.bytes}
    times, failures = turns(bodies, device=device, repeats=bench.repeats)
    for key, why in failures.items():
        ours = key.endswith(" triton")
        bench.fail("elementwise", {"layer": layer.name, "backend": key}, why, ours=ours)
    for name in makers:
        timed: Row = {"layer": layer.name, "backend": name}
        for what, moved in layer.bytes.items():
            key = f"{what} {name}"
            if key in times:
                took = statistics.median(times[key])
                timed[f"{what} ms"] = round(took * 1e3, 4)
                timed[f"{what} GB/s"] = round(moved / took / 1e9, 1) if moved else None
                others = [f"{what} {other}" for other in makers if other != name]
                timed[f"{what} x best"] = ratio(times, key, others)
        if len(timed) > 2:
            bench.add("elementwise", {**timed, "kept MiB": kept.get(name)})


def table(bench: Bench) -> None:
    gpu = bench.device == "cuda"
    shape = (4, 4096, 16, 128, 5504) if gpu else (1, 256, 4, 64, 688)
    for layer in layers(
        bench.device, **dict(zip(("rows", "length", "heads", "dim", "ffn"), shape, strict=True))
    ):
        if bench.late("elementwise", layer.name):
            return
        with bench.guarded("elementwise", {"layer": layer.name}, ours=True):
            case(bench, layer)
