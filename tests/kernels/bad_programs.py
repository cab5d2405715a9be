"""Programs that break one promise each, and a good one, for tests of kernels/report.py.

As a program it is `python -m kernels.report` on these, with the figures committed in the folder
that is its first argument.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
import triton.language as tl

from kernels.program import Program


@triton.jit
def product(
    x_ptr, y_ptr, out_ptr, k,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Multiply a tile [BM, k] by [k, BN]."""
    rows, columns, inner = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, k, BK):
        x = tl.load(x_ptr + rows[:, None] * k + start + inner[None, :])
        y = tl.load(y_ptr + (start + inner[:, None]) * BN + columns[None, :])
        total = tl.dot(x, y, total, input_precision=PRECISION)
    tl.store(out_ptr + rows[:, None] * BN + columns[None, :], total)


@triton.jit
def described_product(x_desc, y_desc, out_ptr, k, BM: tl.constexpr, BN: tl.constexpr):
    """Multiply a tile [BM, k] by [k, BN], both read through descriptors made on the host."""
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, k, 64):
        total = tl.dot(x_desc.load([0, start]), y_desc.load([start, 0]), total)
    at = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    tl.store(out_ptr + at, total)


class EndsTheProcess:
    """A kernel at which the compiler does not raise but dies."""

    @property
    def arg_names(self) -> list[str]:
        os._exit(3)


def make(
    name: str, *, tile: tuple[int, int], kind: str = "bf16", precision: str = "tf32",
    products: Any = "tensor", warps: int = 4, stages: int = 2, **more: Any,
) -> Program:  # fmt: skip
    """Return a program of `product` with `tile` [BM, BN]."""
    (bm, bn) = tile
    return Program(
        name=name,
        kernel=product,
        types={"x_ptr": f"*{kind}", "y_ptr": f"*{kind}", "out_ptr": "*fp32", "k": "i32"},
        constants={"BM": bm, "BN": bn, "BK": 64, "PRECISION": precision},
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
        products=products,
        **{"aligned": frozenset({"k"}), **more},
    )


def programs() -> Iterator[Program]:
    yield make("good", tile=(128, 128), core=True)
    # 256 registers a thread for the tile of sums alone.
    yield make("spills", tile=(128, 256))
    yield make("spills as granted", tile=(128, 256), allowance={90: 1 << 11})
    # A wgmma is of four warps and 64 rows.
    yield make("few warps", tile=(64, 64), warps=2)
    yield make("few rows", tile=(32, 64))
    yield make("few rows as promised", tile=(32, 64), products="mma")
    # 48 KiB a stage.
    yield make("much shared", tile=(128, 256), warps=8, stages=6)
    yield make("tf32", tile=(64, 64), kind="fp32", products="fp32")
    yield make("ieee", tile=(64, 64), kind="fp32", products="fp32", precision="ieee")
    yield make("no bulk copies", tile=(128, 128), tma=True)
    described = make("described", tile=(128, 128), tma=True)
    yield Program(
        name="described",
        kernel=described_product,
        types={
            "x_desc": "tensordesc<bf16[128, 64]>",
            "y_desc": "tensordesc<bf16[64, 128]>",
            "out_ptr": "*fp32",
            "k": "i32",
        },
        constants={"BM": 128, "BN": 128},
        options=described.options,
        products="tensor",
        tma=True,
    )
    yield make("no compilation", tile=(128, 100))  # not a power of two
    yield make("misspelt", tile=(64, 64), unaligned=frozenset({"x"}))
    yield make("elsewhere", tile=(64, 64), targets=frozenset({80}))
    yield Program(
        name="no compiler left", kernel=EndsTheProcess(), types={}, constants={}, options={}
    )


if __name__ == "__main__":
    from kernels import report

    report.modules = lambda: ["bad_programs"]
    report.COMMITTED = Path(sys.argv.pop(1))
    report.main()
