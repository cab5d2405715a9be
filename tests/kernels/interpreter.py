"""Run the checks of a test file on kernels that triton interprets on the CPU.

Triton reads TRITON_INTERPRET when a kernel is decorated, so the checks run in a process of their
own, which is the test file as a program: `main(CHECKS)` prints what each raised. The fixture
`interpreted` of conftest.py starts it.

The interpreter keeps bf16 as 16-bit integers. Its `tl.dot` multiplies those integers (triton
#11584) and its cast to bf16 truncates; `mend_bf16` widens the operands and rounds to nearest even,
as the hardware does. tests/kernels/test_interpreter.py notices when triton changes either.
"""

import json
import sys
import traceback
from collections.abc import Callable, Sequence

import numpy as np
import torch


def widen(bits: np.ndarray) -> np.ndarray:
    """Return the fp32 values of bf16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """Return the bf16 bit patterns of fp32 values, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def mend_bf16() -> None:
    """Make `tl.dot` of bf16 and casts from fp32 to bf16 right in this process."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self, a, b, d, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a = TensorHandle(widen(a.data), tl.float32)
        if b.dtype.scalar == tl.bfloat16:
            b = TensorHandle(widen(b.data), tl.float32)
        return dot(self, a, b, d, *rest)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return TensorHandle(round_to_bf16(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = InterpreterBuilder.create_fp_trunc = cast_impl


def main(checks: Sequence[Callable[..., None]], *args: object) -> None:
    """Run every check as check(*args, generator) and print one JSON line: name to what it raised.

    With names on the command line only those are run, and the traceback is shown: for a developer,
    `TRITON_INTERPRET=1 PYTHONPATH=. python tests/kernels/test_x.py check_y`.
    """
    mend_bf16()
    chosen, raised = sys.argv[1:], {}
    for check in checks:
        if chosen and check.__name__ not in chosen:
            continue
        try:
            check(*args, torch.Generator().manual_seed(0))
            raised[check.__name__] = ""
        except Exception as error:
            if chosen:
                traceback.print_exc()
            raised[check.__name__] = f"{type(error).__name__}: {error}"
    print(json.dumps(raised))
