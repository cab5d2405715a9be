"""Attention in the benchmark: shapes of LVM, masks of visual sentences, our backends and others.

TFLOP/s are of the pairs that a mask allows, 4·D forward and 10·D backward a pair and head: a
backend that computes pairs which nothing reads gets no credit for them. Queries, keys and values
lie in memory as the model has them, heads beside each other.
"""

import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import Backend, attention, attention_reference, resolve
from kernels.backend import has_triton
from kernels.bench_case import Bench, Forward, doubled, limits, passes, relative, results
from kernels.mask import Mask, densify, is_exact
from kernels.timing import Body, Row, ratio, rotation, turns

Maker = Callable[[], Forward]

IMAGES = 16  # of a row; documents of several are `DOCUMENT` images long
DOCUMENT = 4
CHOSEN = "1B"  # of the full table, and the shape that `auto` is chosen by
OURS = ("triton", "triton rows")


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    rows: int
    heads: int
    length: int
    dim: int

    def __str__(self) -> str:
        return f"{self.name} {self.rows}x{self.heads}x{self.length}x{self.dim}"


def shapes(device: str) -> list[Shape]:
    """Return those of LVM, with about as many rows times heads each; small ones on a CPU."""
    if device != "cuda":
        return [Shape("small", 1, 4, 512, 64)]
    return [
        Shape("1B", 4, 16, 4096, 128),
        Shape("300M", 8, 8, 4096, 128),
        Shape("3B", 2, 25, 4096, 128),
        Shape("7B", 2, 32, 4096, 128),
    ]


def cut_at(cuts: Tensor, length: int) -> Tensor:
    """Return [B, T] the first position of each position's document; `cuts` [B, n] start one."""
    index = torch.arange(length, device=cuts.device).expand(len(cuts), length)
    starts = torch.cat([torch.zeros_like(cuts[:, :1]), cuts], 1).sort(1).values.contiguous()
    at = torch.searchsorted(starts, index.contiguous(), right=True) - 1
    return starts.gather(1, at).int()


def masks(shape: Shape, device: str) -> dict[str, Mask]:
    """Return the masks by name: whole rows, packed documents, prefixes, blocks and islands."""
    rows, length = shape.rows, shape.length
    drawn = torch.Generator().manual_seed(0)
    index = torch.arange(length, device=device, dtype=torch.int32).expand(rows, length)
    image = max(1, length // IMAGES)
    document = DOCUMENT * image
    prefix = torch.randint(1, length, (rows, 1), generator=drawn).to(device)
    cuts = torch.randint(1, length, (rows, IMAGES // DOCUMENT - 1), generator=drawn).to(device)
    zeros = torch.zeros_like(index)
    near = (index[:, :, None] // document == index[:, None, :] // document) | (
        index[:, None, :] < document
    )

    def interval(lo: Tensor, hi: Tensor) -> Mask:
        lo, hi = lo.int().contiguous(), hi.int().contiguous()
        return Mask.interval(lo, hi, exact=bool(is_exact(lo, hi)))

    return {
        "causal": Mask(causal=True),
        "packed": interval(index // document * document, index + 1),
        "unaligned": interval(cut_at(cuts, length), index + 1),
        "prefix": interval(zeros, torch.maximum(index + 1, prefix.int())),
        "image blocks": interval(zeros, (index // image + 1) * image),
        "full": Mask.full(),
        "islands": Mask(dense=near & (index[:, None, :] <= index[:, :, None])),
    }


def pairs(mask: Mask, rows: int, length: int) -> int:
    """Return how many pairs of query and key a mask allows in all rows together."""
    if mask.lo is not None and mask.hi is not None:
        return int((mask.hi.long() - mask.lo.long()).clamp(min=0).sum())
    if mask.dense is not None:
        return int(mask.dense.sum())
    return rows * (length * (length + 1) // 2 if mask.causal else length * length)


def rows_of(mask: Mask) -> Mask:
    """Return the same mask without the promise of exact blocks."""
    return Mask(lo=mask.lo, hi=mask.hi)


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Mask, allowed: Tensor | None) -> Tensor:
    """Attend by a whole table of scores, as plain torch writes it."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if mask.causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()[None]
    if allowed is not None:
        scores = scores.masked_fill(~allowed[:, None], float("-inf"))
    return scores.softmax(-1) @ v


def makers(mask: Mask, shape: Shape, device: str) -> dict[str, Maker]:
    """Return by name what makes each rival ready; made one by one, since some cannot be made."""
    length = shape.length

    def ready(backend: Backend, of: Mask) -> Mask:
        where = torch.device(device)
        return resolve(of, queries=length, keys=length, device=where, backend=backend)

    def by(backend: Backend, of: Mask = mask) -> Maker:
        def make() -> Forward:
            return functools.partial(attend, mask=ready(backend, of))

        return make

    def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask) -> Tensor:
        return attention(q, k, v, mask)

    def flex() -> Forward:
        from torch.nn.attention.flex_attention import flex_attention

        blocks = ready("flex", mask).flex
        torch._dynamo.reset()  # it gives up on the ninth shape, and runs uncompiled
        compiled = cast(Any, torch.compile(flex_attention, dynamic=False))
        return lambda q, k, v: compiled(q, k, v, block_mask=blocks)

    def forced(name: str) -> Maker:
        def make() -> Forward:
            from torch.nn.attention import SDPBackend, sdpa_kernel

            dense = ready("sdpa", mask).dense
            table = None if dense is None else dense[:, None]
            which = getattr(SDPBackend, name)

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                with sdpa_kernel(which):
                    return F.scaled_dot_product_attention(
                        q, k, v, attn_mask=table, is_causal=mask.causal
                    )

            return attend

        return make

    def eager() -> Forward:
        allowed = densify(mask, length)
        return lambda q, k, v: written_out(q, k, v, mask, allowed)

    found: dict[str, Maker] = {"sdpa": by("sdpa")}  # first: the measure of the others' errors
    if device == "cuda":
        if mask.kind in ("causal", "full"):
            found["sdpa flash"] = forced("FLASH_ATTENTION")
        found["sdpa cudnn"] = forced("CUDNN_ATTENTION")
        if mask.kind != "dense":
            found["triton"] = by("triton")
        if mask.exact:
            found["triton rows"] = by("triton", rows_of(mask))
    found["flex"] = flex if device == "cuda" else by("flex")
    if shape.name in (CHOSEN, "small"):
        found["eager"] = eager
    return found


def inputs(shape: Shape, device: str, count: int) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Return `count` sets of random q, k, v and of a gradient, bf16."""

    def draw() -> Tensor:
        lying = (shape.rows, shape.length, shape.heads, shape.dim)
        return torch.randn(lying, device=device, dtype=torch.bfloat16).transpose(1, 2)

    sets = [[draw().requires_grad_() for _ in range(3)] for _ in range(count)]
    return sets, [[draw()] for _ in range(count)]


def piece(x: Tensor) -> Tensor:
    """Return the first and the last head of the first row."""
    return x[:1, [0, -1]]


def wanted(tensors: Sequence[Tensor], grads: Sequence[Tensor], mask: Mask) -> list[Tensor]:
    """Return output and gradients of `piece` in float64."""

    def first(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[:1]

    one = Mask(mask.causal, first(mask.lo), first(mask.hi), dense=first(mask.dense))
    cut = doubled([piece(x.detach()).requires_grad_() for x in tensors])
    return results(
        lambda q, k, v: attention_reference(q, k, v, one), cut, [piece(x).double() for x in grads]
    )


def has_backward(backend: str, device: str) -> bool:
    return device == "cuda" or backend != "flex"  # torch has none for it on a CPU


def check_case(
    bench: Bench, row: Row, made: Mapping[str, Forward], tensors: list[Tensor], grads: list[Tensor],
    mask: Mask,
) -> dict[str, str]:  # fmt: skip
    """Compare every rival with float64; returns "ok" or "BROKEN" by name, for those that run.

    Ours must also have at most 1.5 times the error of SDPA (see `limits`), and the same bits twice.
    """
    want = wanted(tensors, grads, mask)
    measure: list[float] = []
    words: dict[str, str] = {}
    for name, forward in made.items():
        found: Row = {**row, "backend": name}
        with bench.guarded("attention", found, ours=name in OURS):
            if has_backward(name, bench.device):
                got = results(forward, tensors, grads)
            else:
                got = results(forward, [x.detach() for x in tensors], None)
            errors = [relative(piece(a), b) for a, b in zip(got, want, strict=False)]
            rival = measure if name in OURS else []
            bounds = limits(torch.bfloat16, rival, len(errors))
            if name == "sdpa":
                measure = errors
            if name in OURS:
                again = results(forward, tensors, grads)
                if not all(torch.equal(a, b) for a, b in zip(got, again, strict=True)):
                    found["bits"], errors = "differ", [float("inf")] * len(errors)
            worst = max(range(len(errors)), key=lambda i: errors[i] / bounds[i])
            found["worst"] = ("o", "dq", "dk", "dv")[worst]
            words[name] = bench.verdict(
                "attention", found, error=errors[worst], bound=bounds[worst]
            )
    return words


def case(bench: Bench, shape: Shape, name: str, mask: Mask) -> None:
    """Check and time every backend on one mask."""
    device = bench.device
    row: Row = {"shape": str(shape), "mask": name, "kind": mask.kind}
    size = 4 * 2 * shape.rows * shape.heads * shape.length * shape.dim
    sets, grads = inputs(shape, device, rotation(size, device))
    made: dict[str, Forward] = {}
    for backend, make in makers(mask, shape, device).items():
        with bench.guarded("attention", {**row, "backend": backend}, ours=backend in OURS):
            made[backend] = make()
    words = check_case(bench, row, made, sets[0], grads[0], mask)
    bodies: dict[str, Body] = {}
    for backend in words:
        if has_backward(backend, device):
            several = passes(made[backend], sets, grads)
        else:
            plain = [[x.detach() for x in tensors] for tensors in sets]
            several = {"fwd": passes(made[backend], plain, grads)["fwd"]}
        bodies |= {f"{what} {backend}": body for what, body in several.items()}
    times, failures = turns(bodies, device=device, repeats=bench.repeats)
    for key, why in failures.items():
        backend = key.split(" ", 1)[1]
        bench.fail("attention", {**row, "backend": key}, why, ours=backend in OURS)
    count = pairs(mask, shape.rows, shape.length)
    for timed in table_rows(times, list(words), shape=shape, count=count):
        bench.add("attention", {**row, **timed, "checked": words[str(timed["backend"])]})


def table_rows(
    times: Mapping[str, Sequence[float]], backends: Sequence[str], *, shape: Shape, count: int
) -> Iterator[Row]:
    """Yield a row a backend from the seconds of "fwd sdpa" and so on.

    `count` pairs are allowed in all rows together. "x best" is how many times as fast a backend is
    as the fastest other one; ours are not compared with each other. "spread %" is that of the last
    pass in the row, all rounds: differences of single rounds below it are noise.
    """
    flops = {"fwd": 4, "bwd": 10, "fwd+bwd": 14}
    for backend in backends:
        row: Row = {"backend": backend}
        spread = 0.0
        others = [b for b in backends if b != backend and not (b in OURS and backend in OURS)]
        for what, each in flops.items():
            found = times.get(f"{what} {backend}")
            if not found:
                continue
            took = statistics.median(found)
            speed = each * shape.dim * shape.heads * count / took / 1e12
            row[f"{what} ms"] = round(took * 1e3, 4)
            row[f"{what} TFLOP/s"] = round(speed, 4 if speed < 1 else 1)
            row[f"{what} x best"] = ratio(
                times, f"{what} {backend}", [f"{what} {other}" for other in others]
            )
            spread = round(100 * (max(found) - min(found)) / took, 1)
        if len(row) > 1:
            yield {**row, "spread %": spread}


def table(bench: Bench) -> None:
    """Check and time all masks at the first shape and the two commonest at the others."""
    if bench.device == "cuda" and not has_triton():
        bench.fail("attention", {"backend": "triton"}, "triton does not import here", ours=True)
    for i, shape in enumerate(shapes(bench.device)):
        for name, mask in masks(shape, bench.device).items():
            if i and name not in ("causal", "packed"):
                continue
            if bench.late("attention", f"{shape} {name}"):
                return
            with bench.guarded("attention", {"shape": str(shape), "mask": name}, ours=True):
                case(bench, shape, name, mask)


def summary(rows: Sequence[Row]) -> list[str]:
    """Return a short line a mask: TFLOP/s forward / backward of every backend."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        if "fwd TFLOP/s" in row:
            speeds = f"{row['backend']} {row['fwd TFLOP/s']}/{row.get('bwd TFLOP/s', '-')}"
            lines.setdefault(f"{row['shape']} {row['mask']}", []).append(speeds)
    return [f"{name}: {', '.join(speeds)}" for name, speeds in lines.items()]
