"""Time attention in bf16 and code search in fp32: python -m kernels.bench [--device cuda].

Prints one line a case, with TFLOP/s counted over the pairs that the mask allows and pairs of point
and code a second, then one JSON line with the device and the versions, for docs/benchmarks.md.
argparse, since a GPU host may have torch and little else.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path

import torch

from kernels.attention import Mask, attention, densify, resolve
from kernels.vq_lookup import Backend, has_triton, vq_lookup


def seconds(body: Callable[[], object], *, device: str, repeats: int) -> float:
    """Return the median time of a call, after one that warms up."""
    times = []
    for i in range(repeats + 1):
        start = time.perf_counter()
        body()
        if device == "cuda":
            torch.cuda.synchronize()
        if i:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def masks(rows: int, length: int, device: str) -> dict[str, Mask]:
    """Return the masks of one document a row, of sixteen, and of four with sixteenths between."""
    index = torch.arange(length, device=device, dtype=torch.int32).expand(rows, length)
    image = max(1, length // 16)
    return {
        "causal": Mask(causal=True),
        "packed by 1 image": Mask.interval(index // image * image, index + 1),
        "packed by 4 images": Mask.interval(index // (4 * image) * (4 * image), index + 1),
    }


def attention_table(device: str, *, repeats: int, dtype: torch.dtype) -> list[dict[str, object]]:
    """Time forward and forward with backward over shapes and masks."""
    shapes = [(4, 16, 4096, 128), (4, 32, 4096, 100)] if device == "cuda" else [(1, 4, 1024, 64)]
    table: list[dict[str, object]] = []
    for rows, heads, length, dim in shapes:
        q, k, v = (
            torch.randn(
                rows, heads, length, dim, device=device, dtype=dtype, requires_grad=True
            )
            for _ in range(3)
        )  # fmt: skip
        for name, mask in masks(rows, length, device).items():
            dense = densify(mask, length)
            pairs = float(length * (length + 1) // 2 if dense is None else int(dense[0].sum()))
            prepared = resolve(mask, length)

            def forward() -> torch.Tensor:
                return attention(q, k, v, prepared)  # noqa: B023 - called before the next turn

            def both() -> None:
                forward().sum().backward()

            flops = 4.0 * rows * heads * dim * pairs
            fwd = seconds(forward, device=device, repeats=repeats)
            all_ = seconds(both, device=device, repeats=repeats)
            table.append(
                {
                    "shape": f"{rows}x{heads}x{length}x{dim}",
                    "mask": name,
                    "fwd ms": round(fwd * 1e3, 3),
                    "fwd+bwd ms": round(all_ * 1e3, 3),
                    "fwd TFLOP/s": round(flops / fwd / 1e12, 4),
                    "fwd+bwd TFLOP/s": round(3.5 * flops / all_ / 1e12, 4),
                }
            )
    return table


def lookup_table(device: str, *, repeats: int) -> list[dict[str, object]]:
    """Time the nearest code of the images of one batch, and of one image, by each backend."""
    shapes = {"muse": (8192, 64), "LlamaGen": (16384, 8), "taming": (1024, 256)}
    backends: list[Backend] = ["torch"]
    if device == "cuda" and has_triton():
        backends.append("triton")
    table: list[dict[str, object]] = []
    for name, (count, width) in shapes.items():
        codes = torch.randn(count, width, device=device)
        for images in (1, 64) if device == "cuda" else (1, 8):
            points = torch.randn(256 * images, width, device=device)
            for backend in backends:

                def search() -> torch.Tensor:
                    return vq_lookup(points, codes, backend=backend)  # noqa: B023 - called at once

                took = seconds(search, device=device, repeats=repeats)
                table.append(
                    {
                        "codebook": f"{name} {count}x{width}",
                        "points": len(points),
                        "backend": backend,
                        "ms": round(took * 1e3, 3),
                        "Gpairs/s": round(len(points) * count / took / 1e9, 3),
                    }
                )
    return table


def options(
    prog: str, description: str | None, *, folders: Mapping[str, str] | None = None
) -> argparse.Namespace:
    """Parse device and repeats, which every benchmark takes, and `folders`: name → its help."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls; the median counts")
    for name, text in (folders or {}).items():
        parser.add_argument(f"--{name}", type=Path, help=text)
    found = parser.parse_args()
    if found.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, f"{prog}: no CUDA device here; run it with --device cpu\n")
    return found


def report(what: str, device: str, table: list[dict[str, object]]) -> None:
    """Print the lines of a benchmark and the JSON that names its device and software."""
    for row in table:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    about = {
        "bench": what,
        "device": name or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }
    print(json.dumps({**about, "rows": table}))


def main() -> None:
    found = options("python -m kernels.bench", __doc__)
    table = attention_table(found.device, repeats=found.repeats, dtype=torch.bfloat16)
    report("attention", found.device, table)
    report("vq_lookup", found.device, lookup_table(found.device, repeats=found.repeats))


if __name__ == "__main__":
    main()
