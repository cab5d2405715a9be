"""SwiGLU: silu(gate) · up, and the linear layer behind it that keeps no product.

F hidden width, D model width, T tokens, e bytes an element (Shazeer, "GLU variants improve
Transformer", 2020). With σ = sigmoid(gate) and dp the gradient of the product p = gate · σ · up:

    dup = dp · gate · σ            dgate = dp · up · σ · (1 + gate · (1 - σ))

What each form keeps of gate, up, silu(gate), p until the backward pass, bytes a token and layer:

    F.silu(gate) * up, then linear, eager            4·e·F   gate, silu(gate), up, p
    the same through torch.compile                   3·e·F   gate, up, p (its partitioner never
                                                             recomputes the input of a matmul)
    swiglu_linear                                    2·e·F   gate, up; p is computed again for dW

    gate ─┬─► silu ─┐                     gate, up ─► p again ──► dW = dyᵀ · p
          │         ├─► p ─► · Wᵀ ─► y    dy ─► dp = dy · W ─┬─► dgate
    up  ──┼─────────┘   │                                    └─► dup
          └ kept        └ dropped

At F = 5504, bf16, 22 layers and rows of 4096 that is 0.92 GiB a row less. Its price is p written
once more, 2·F bytes a token: 0.2 ms a row at 4.3 TB/s, 0.4 % of the step (computed, not measured).

Bytes a token of the kernels: forward 3·e·F, backward 5·e·F, with p 6·e·F. One op at a time: 5, 9
and 14. torch.compile can fuse to the same 3, 5 and 6, so the kernels are for code that is not
compiled and stay behind `backend="triton"` until a GPU has timed them. The saving needs no kernel:
it is there on both backends, and the torch backend changes no bit of any result or gradient.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from kernels.rms_norm import Backend, wants_kernel


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) · up in float64 by the formula; the oracle of every backend."""
    gate, up = gate.double(), up.double()
    return gate / (1 + (-gate).exp()) * up


@torch.library.custom_op("kernels::swiglu", mutates_args=())
def swiglu_op(gate: Tensor, up: Tensor) -> Tensor:
    from kernels.swiglu_triton import forward  # needs triton, which only some machines have

    return forward(gate, up)


@swiglu_op.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("kernels::swiglu_backward", mutates_args=())
def swiglu_backward_op(
    dproduct: Tensor, gate: Tensor, up: Tensor, recompute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dgate, dup and, to recompute it, the product (else empty)."""
    from kernels.swiglu_triton import backward

    return backward(dproduct, gate, up, recompute)


@swiglu_backward_op.register_fake
def _(dproduct: Tensor, gate: Tensor, up: Tensor, recompute: bool) -> tuple[Tensor, Tensor, Tensor]:
    product = gate.new_empty(gate.shape if recompute else (0,))
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape), product


def keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def differentiate(ctx, dproduct: Tensor):
    return swiglu_backward_op(dproduct, *ctx.saved_tensors, False)[:2]


swiglu_op.register_autograd(differentiate, setup_context=keep)


# The matmul is inside, so that autograd keeps what `keep` says and not its input.
@torch.library.custom_op("kernels::swiglu_linear", mutates_args=())
def swiglu_linear_op(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    from kernels.swiglu_triton import forward

    with torch.autocast(gate.device.type, enabled=False):
        return F.linear(forward(gate, up), weight)


@swiglu_linear_op.register_fake
def _(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    return gate.new_empty(*gate.shape[:-1], len(weight))


def differentiate_linear(ctx, dy: Tensor):
    gate, up, weight = ctx.saved_tensors
    with torch.autocast(gate.device.type, enabled=False):
        dgate, dup, product = swiglu_backward_op(dy @ weight, gate, up, True)
        rows = dy.reshape(-1, dy.shape[-1]), product.reshape(-1, product.shape[-1])
        return dgate, dup, rows[0].T @ rows[1]


swiglu_linear_op.register_autograd(differentiate_linear, setup_context=keep)


MATMULS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default]
keep_matmuls = partial(create_selective_checkpoint_contexts, MATMULS)


def check(gate: Tensor, up: Tensor) -> None:
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.ndim == 0:
        raise ValueError(
            f"SwiGLU of gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype}: "
            "wanted one shape [..., F] and one type"
        )


def swiglu(gate: Tensor, up: Tensor, *, backend: Backend = "torch") -> Tensor:
    """Return silu(gate) · up, of one shape [..., F] and floating type.

    `torch` is `F.silu(gate) * up` and open to torch.compile; `triton` rounds once, at the end.
    """
    check(gate, up)
    return swiglu_op(gate, up) if wants_kernel(backend) else F.silu(gate) * up


def swiglu_linear(
    gate: Tensor, up: Tensor, weight: Tensor, *, backend: Backend = "torch"
) -> Tensor:
    """Return (silu(gate) · up) · weightᵀ, [..., D] of gate, up [..., F] and weight [D, F].

    Keeps gate and up for the backward pass, and not their product. `torch` has every result and
    gradient of `F.linear(F.silu(gate) * up, weight)` bit for bit, eager and under autocast; through
    torch.compile it keeps as little. `triton` computes in the type of gate, to which it casts the
    weight. Hooks of an `nn.Linear` whose weight this is (tensor parallelism's) do not run.
    """
    check(gate, up)
    if weight.ndim != 2 or weight.shape[1] != gate.shape[-1]:
        raise ValueError(
            f"linear of SwiGLU {tuple(gate.shape)} with weight {tuple(weight.shape)}: "
            "wanted [..., F] and [D, F]"
        )
    if wants_kernel(backend):
        return swiglu_linear_op(gate, up, weight.to(gate.dtype))
    # Backward recomputes up to the last tensor that autograd wants, the matmul's input, and stops
    # before the matmul. torch.compile's partitioner does not stop there by itself: it would also
    # multiply again to get back a result that a later layer reads. Nothing is random: without the
    # generator's state there is no host sync.
    more: dict[str, Any] = {"context_fn": keep_matmuls} if torch.compiler.is_compiling() else {}
    return checkpoint(
        lambda *x: F.linear(F.silu(x[0]) * x[1], x[2]),
        gate,
        up,
        weight,
        use_reentrant=False,
        preserve_rng_state=False,
        **more,
    )
