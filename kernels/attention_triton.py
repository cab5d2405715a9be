"""Launches the Triton kernels of `attention`; importing this file needs triton, nothing else does.

A launch chooses the tiles (`configure`), tensor maps or pointers (`uses_tma`), the kind of mask.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.attention_kernels import (
    EXACT,
    ROWS,
    STATIC,
    forward_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
)
from kernels.mask import STRETCH, Mask, padded
from kernels.program import Program

LOG2E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Config:
    """Tile of a program and how it is compiled. BM queries, BN keys."""

    bm: int
    bn: int
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, int]:
        return {"BM": self.bm, "BN": self.bn}

    @property
    def options(self) -> dict[str, Any]:
        # Fused multiply-adds are part of the schedule; said so, as triton's default will change.
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


@dataclass(frozen=True, slots=True)
class Configs:
    forward: Config
    by_query: Config
    by_key: Config


INTERPRETED = Configs(Config(64, 32, 4, 1), Config(32, 64, 4, 1), Config(32, 64, 4, 1))
SINGLE = Configs(Config(32, 16, 4, 1), Config(32, 32, 8, 1), Config(32, 32, 8, 1))  # fp32
HOPPER = Configs(Config(128, 128, 8, 2), Config(128, 64, 8, 2), Config(32, 128, 8, 2))
HOPPER_POINTERS = Configs(Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(32, 128, 8, 2))
HOPPER_NARROW = Configs(Config(128, 128, 8, 2), Config(128, 64, 8, 2), Config(64, 128, 8, 2))
AMPERE = Configs(Config(64, 32, 4, 3), Config(64, 32, 4, 2), Config(32, 64, 8, 2))
NARROW = 64


def configure(capability: int, *, channels: int, itemsize: int, tma: bool) -> Configs:
    """Return the tiles for heads of `channels` (a power of two) on sm_`capability`; 0 on a CPU.

    Chosen by what compiles without spilling a register, with both triton 3.6 and 3.9
    (python -m kernels.report), not by a GPU's clock. sm_89 has room for AMPERE's, sm_100 for
    HOPPER's.
    """
    if capability == 0:
        return INTERPRETED
    if itemsize == 4:
        return SINGLE
    if capability < 90:
        return AMPERE
    if channels <= NARROW:
        return HOPPER_NARROW
    return HOPPER if tma else HOPPER_POINTERS


def kind_of(mask: Mask) -> int:
    if mask.lo is None:
        return STATIC.value
    return EXACT.value if mask.exact else ROWS.value


def capability_of(device: torch.device) -> int:
    """Return 90 for sm_90 and so on, 0 for a CPU, where triton interprets."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def fits_tma(*tensors: Tensor) -> bool:
    """Say whether tensor maps can describe [B, H, T, D]: starts and strides of 16 bytes."""
    return all(
        x.data_ptr() % 16 == 0
        and all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])
        for x in tensors
    )


def uses_tma(capability: int, *tensors: Tensor) -> bool:
    """Say whether tiles are read through tensor maps: from sm_90 on, where the strides allow it."""
    return capability >= 90 and fits_tma(*tensors)


def source(x: Tensor, rows: int, channels: int, *, tma: bool) -> Any:
    """Return what `load_tile` reads: a tensor map of tiles [rows, channels], or the tensor."""
    if not tma:
        return x
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, channels])


def like(x: Tensor) -> Tensor:
    """Return an empty [B, H, T, D] that lies in memory as [B, T, H, D], where heads are joined."""
    b, h, t, d = x.shape
    return x.new_empty(b, t, h, d).transpose(1, 2)


def strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


@dataclass(frozen=True, slots=True)
class Launch:
    """What the three kernels of one attention share."""

    kind: int
    prefix: int
    tma: bool
    configs: Configs
    channels: int  # BD
    lo: Tensor
    hi: Tensor
    by_query: Tensor
    by_key: Tensor

    @classmethod
    def of(cls, mask: Mask, tensors: tuple[Tensor, ...]) -> "Launch":
        q, k = tensors[:2]
        capability = capability_of(q.device)
        channels = max(16, triton.next_power_of_2(q.shape[-1]))
        tma = uses_tma(capability, *tensors)
        configs = configure(capability, channels=channels, itemsize=q.element_size(), tma=tma)
        absent = q.new_empty(0, dtype=torch.int32)  # a pointer that no kernel of this kind reads
        return cls(
            kind=kind_of(mask),
            prefix=0 if mask.causal else k.shape[2],
            tma=tma,
            configs=configs,
            channels=channels,
            lo=absent if mask.lo is None else mask.lo,
            hi=absent if mask.hi is None else mask.hi,
            by_query=absent if mask.by_query is None else mask.by_query,
            by_key=absent if mask.by_key is None else mask.by_key,
        )

    def constants(self, config: Config, *, group: int, dim: int) -> dict[str, Any]:
        shape = {"GROUP": group, "D": dim, "BD": self.channels}
        return shape | config.constants | {"KIND": self.kind, "TMA": self.tma} | config.options


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    """Return o as q, and the logarithms fp32 [B, H, T rounded up to 128]; arguments as `attention`.

    The last dimension of q, k, v is contiguous. Rows past T are zeros, and so are their gradients.
    """
    (batch, heads, queries, dim), keys = q.shape, k.shape[2]
    o, log = like(q), q.new_empty(batch, heads, padded(queries), dtype=torch.float32)
    if o.numel() == 0:
        return o, log
    run = Launch.of(mask, (q, k, v))
    c = run.configs.forward
    sources = [
        source(x, n, run.channels, tma=run.tma) for x, n in ((q, c.bm), (k, c.bn), (v, c.bn))
    ]
    with torch.cuda.device_of(q):
        forward_kernel[triton.cdiv(log.shape[2], c.bm), batch * heads](
            *sources, o, log, run.lo, run.hi, run.by_query, *strides(q, k, v, o),
            queries, log.shape[2], keys, triton.cdiv(queries, STRETCH), run.prefix,
            scale * LOG2E, heads, **run.constants(c, group=heads // k.shape[1], dim=dim),
        )  # fmt: skip
    return o, log


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, log: Tensor, mask: Mask, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v; `o` and `log` as `forward` returned them."""
    (batch, heads, queries, dim), (groups, keys) = q.shape, k.shape[1:3]
    dq, dk, dv, delta = like(q), like(k), like(v), torch.empty_like(log)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    run = Launch.of(mask, (q, k, v, do))
    group, stretches = heads // groups, triton.cdiv(queries, STRETCH)

    def sources(c: Config) -> list[Any]:
        tiles = ((q, c.bm), (k, c.bn), (v, c.bn), (do, c.bm))
        return [source(x, n, run.channels, tma=run.tma) for x, n in tiles]

    with torch.cuda.device_of(q):
        c = run.configs.by_query
        query_gradient_kernel[triton.cdiv(log.shape[2], c.bm), batch * heads](
            *sources(c), o, log, delta, dq, run.lo, run.hi, run.by_query,
            *strides(q, k, v, do, o, dq), queries, log.shape[2], keys, stretches, run.prefix,
            scale * LOG2E, scale, heads, **run.constants(c, group=group, dim=dim),
        )  # fmt: skip
        c = run.configs.by_key
        key_gradient_kernel[triton.cdiv(keys, c.bn), batch * groups](
            *sources(c), log, delta, dk, dv, run.lo, run.hi, run.by_query, run.by_key,
            *strides(q, k, v, do, dk, dv), queries, log.shape[2], keys, stretches,
            triton.cdiv(keys, STRETCH), run.prefix, scale * LOG2E, scale, groups,
            **run.constants(c, group=group, dim=dim),
        )  # fmt: skip
    return dq, dk, dv


def argument(name: str, *, dtype: str, tile: str) -> str:
    """Return triton's spelling of the type that an argument of any of the kernels has."""
    kind, _, ending = name.rpartition("_")
    if ending == "src":
        return tile
    if ending == "ptr":
        return {"log": "*fp32", "delta": "*fp32", "lo": "*i32", "hi": "*i32"}.get(kind, f"*{dtype}")
    if name in ("by_query", "by_key"):
        return "*i32"
    if name in ("c", "scale"):
        return "fp32"
    return "i64" if ending == "b" else "i32"  # rows of a batch may lie 2^31 elements apart


def program(
    which: str, kind: int, *, dim: int, dtype: str, capability: int, tma: bool, group: int = 1
) -> Program:
    """Return one launch as the compile gate wants it; `kind` and the rest as `Launch` has them."""
    itemsize, channels = 4 if dtype == "fp32" else 2, triton.next_power_of_2(dim)
    configs = configure(capability, channels=channels, itemsize=itemsize, tma=tma)
    kernel, config = {
        "forward": (forward_kernel, configs.forward),
        "dQ": (query_gradient_kernel, configs.by_query),
        "dK dV": (key_gradient_kernel, configs.by_key),
    }[which]
    constants = {"GROUP": group, "D": dim, "BD": channels, "KIND": kind, "TMA": tma}
    constants |= config.constants
    types = {}
    for name in set(kernel.arg_names) - set(constants):
        rows = config.bm if name in ("q_src", "do_src") else config.bn
        tile = f"tensordesc<{dtype}[1, 1, {rows}, {channels}]>" if tma else f"*{dtype}"
        types[name] = argument(name, dtype=dtype, tile=tile)
    mask = {STATIC.value: "static", EXACT.value: "exact", ROWS.value: "rows"}[kind]
    shape = f"{dim} {dtype} {mask}" + (f" group {group}" if group > 1 else "")
    core = capability == 90 and tma and dim == 128 and mask == "exact" and group == 1
    return Program(
        name=f"attention {which} {shape} {'tma' if tma else f'pointers {capability}'}",
        kernel=kernel,
        types=types,
        constants=constants,
        options=config.options,
        products="tensor" if itemsize == 2 else "mma",
        tma=tma,
        aligned=frozenset(n for n in types if n == "padded" or n[-2:] in ("_b", "_h", "_t")),
        targets=frozenset({90, 100} if capability >= 90 else {80, 89}),
        # fp32 is for comparing, in three TF32 products each; no tile of 128 channels does without.
        allowance=dict.fromkeys((80, 89, 90, 100), 96) if itemsize == 4 else {},
        core=core,
    )


def programs() -> Iterator[Program]:
    """Yield launches for heads of 128, of LVM's paper (96; 100 as 112), of less, and in fp32."""
    static, exact, rows = STATIC.value, EXACT.value, ROWS.value
    shapes: list[dict[str, Any]] = [
        *(
            {"kind": kind, "dim": 128, "dtype": "bf16", "tma": True}
            for kind in (static, exact, rows)
        ),
        {"kind": exact, "dim": 128, "dtype": "bf16", "tma": True, "group": 4},
        {"kind": rows, "dim": 128, "dtype": "fp16", "tma": True},
        {"kind": rows, "dim": 128, "dtype": "bf16", "tma": False},
        {"kind": rows, "dim": 112, "dtype": "bf16", "tma": True},
        {"kind": rows, "dim": 96, "dtype": "bf16", "tma": False},
        {"kind": exact, "dim": 64, "dtype": "bf16", "tma": True},
        {"kind": rows, "dim": 64, "dtype": "bf16", "tma": False},
        {"kind": static, "dim": 32, "dtype": "bf16", "tma": True},
        {"kind": rows, "dim": 128, "dtype": "fp32", "tma": False},
        {"kind": rows, "dim": 64, "dtype": "fp32", "tma": False},
    ]
    for capability in (90, 80):
        for shape in shapes:
            if capability >= 90 or not shape["tma"]:
                for which in ("forward", "dQ", "dK dV"):
                    yield program(which, capability=capability, **shape)
