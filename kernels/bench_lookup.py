"""Code search in the benchmark: the nearest of K codes for each of N points, in fp32."""

import statistics

import torch
from torch import Tensor

from kernels.backend import Backend, has_triton
from kernels.bench_case import Bench
from kernels.timing import Body, Row, ratio, turns
from kernels.vq_lookup import vq_lookup


def excess(points: Tensor, codes: Tensor, found: Tensor) -> float:
    """Return by how much a chosen code is farther than the closest, of |p|² + |c|², at most."""
    p, c = points.double(), codes.double()
    chosen = c[found]
    got = (p - chosen).square().sum(1)
    best = torch.cat([torch.cdist(x, c).amin(1) for x in p.split(1024)]) ** 2
    return float(((got - best) / (p.square().sum(1) + chosen.square().sum(1))).max())


def case(bench: Bench, name: str, count: int, width: int, images: int) -> None:
    device = bench.device
    codes = torch.randn(count, width, device=device)
    points = torch.randn(256 * images, width, device=device)
    backends: list[Backend] = ["torch"]
    if device == "cuda" and has_triton():
        backends.append("triton")
    row: Row = {"codebook": f"{name} {count}x{width}", "points": len(points)}
    bodies = {}
    for backend in backends:

        def search(_: int, backend: Backend = backend) -> Tensor:
            return vq_lookup(points, codes, backend=backend)

        with bench.guarded("lookup", {**row, "backend": backend}, ours=True):
            # fp32 rounds the terms of |c|² - 2 p·c: 17 times 2^-24 of |p|² + |c|².
            error = excess(points, codes, search(0))
            bench.verdict("lookup", {**row, "backend": backend}, error=error, bound=1e-6)
            bodies[str(backend)] = Body(search)
    times, failures = turns(bodies, device=device, repeats=bench.repeats)
    for key, why in failures.items():
        bench.fail("lookup", {**row, "backend": key}, why, ours=True)
    for key, found in times.items():
        took = statistics.median(found)
        bench.add(
            "lookup",
            {
                **row,
                "backend": key,
                "ms": round(took * 1e3, 4),
                "Gpairs/s": round(len(points) * count / took / 1e9, 3),
                "x best": ratio(times, key, [other for other in times if other != key]),
            },
        )


def table(bench: Bench) -> None:
    """Find the nearest code of the images of one batch, and of one image, by each backend."""
    shapes = {"muse": (8192, 64), "LlamaGen": (16384, 8), "taming": (1024, 256)}
    for name, (count, width) in shapes.items():
        for images in (1, 64) if bench.device == "cuda" else (1, 8):
            if bench.late("lookup", name):
                return
            with bench.guarded("lookup", {"codebook": name}, ours=True):
                case(bench, name, count, width, images)
