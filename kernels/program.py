"""What a kernel is compiled with, so that it can be compiled for a GPU that is not there.

Each `*_triton.py` of this package yields its shipped launches as programs from `programs()`;
`python -m kernels.report` compiles them and holds each to what it promises.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

# none    no matrix product
# fp32    products of IEEE fp32: no tensor cores
# tensor  tensor cores fed from shared memory, at full speed: wgmma on sm_90, tcgen05 on sm_100,
#         mma before them
# mma     tensor cores fed from registers everywhere: tiles too small for wgmma, of under 64 rows
Products = Literal["none", "fp32", "tensor", "mma"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A kernel with the types and constants of one launch.

    What triton sees at a launch and specialises on has to be said: `unaligned` pointers, `aligned`
    integers; and an integer that is always 1 belongs into `constants`.
    """

    name: str  # unique, as "attention forward D=128 bf16 rows"
    kernel: Any  # triton.JITFunction
    # Of the arguments that are no constants, in triton's spelling: "*bf16", "i32", "fp32"; a
    # TensorDescriptor made on the host is "tensordesc<bf16[128, 64]>", with the shape of its block.
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]  # num_warps and so on
    products: Products = "none"
    tma: bool = False  # promises bulk tensor copies; not compiled below sm_90
    unaligned: frozenset[str] = field(default=frozenset())  # pointers not known divisible by 16
    aligned: frozenset[str] = field(default=frozenset())  # integers known divisible by 16
    # Compute capabilities that it is launched on, where launch code chooses by them; empty: all.
    targets: frozenset[int] = field(default=frozenset())
    # Bytes of stack granted, by compute capability; the reason stands beside it.
    allowance: dict[int, int] = field(default_factory=dict)
    core: bool = False  # one of the few that `make test` compiles
