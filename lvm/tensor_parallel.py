"""Ranks that compute the same rows between them: heads and channels of the trunk divided.

A sequence is cut where every position is computed by itself (norms, residual sums, the term) and
whole where positions meet (Korthikanti et al. 2022, "Reducing activation recomputation in large
transformer models"). On n ranks:

    x [B, T/n, D] ── gather ──> q k v: own heads [B, T, H/n] ── o, sum and cut ──> x [B, T/n, D]
    x [B, T/n, D] ── gather ──> gate up: own channels [B, T, F/n] ── down, sum and cut ──> …

The embedding is cut by ids, the head by ids too and gathered where the term reads it. Gradients of
every weight come out as those of the sum over all positions. Names of parameters do not change.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from lvm.model import Transformer

CUT = Shard(1)  # along positions


def divide(trunk: Transformer, mesh: DeviceMesh) -> None:
    """Divide a trunk on the meta device over the ranks of `mesh`; FSDP may follow.

    Heads of both kinds, channels of the SwiGLU and positions of a row are multiples of the ranks;
    nothing has a bias.
    """
    outer: dict[str, ParallelStyle] = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=CUT),
        "norm": SequenceParallel(use_local_output=True),
    }
    inner: dict[str, ParallelStyle] = {
        **{f"attn.{name}": ColwiseParallel() for name in "qkv"},
        "attn.o": RowwiseParallel(output_layouts=CUT),
        "mlp.gate": ColwiseParallel(),
        "mlp.up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(output_layouts=CUT),
        "attn_norm": SequenceParallel(use_local_output=True),
        "mlp_norm": SequenceParallel(use_local_output=True),
    }
    parallelize_module(trunk, mesh, outer)
    _place(trunk.head, mesh, Shard(0))
    block: Any
    for block in trunk.layers:
        parallelize_module(block, mesh, inner)
        norms = [norm for norm in (block.attn.q_norm, block.attn.k_norm) if norm is not None]
        for norm in norms:
            _place(norm, mesh, Replicate())
        _gather(block.attn, mesh, norms=norms)
        _gather(block.mlp, mesh)


def own(values: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return of values [B, T] those of the positions that this rank has, [B, T/n]."""
    return values.chunk(mesh.size(), dim=1)[mesh.get_local_rank()]


@contextmanager
def head_whole(trunk: Transformer) -> Iterator[None]:
    """Let the term read the whole head, each rank for its own positions, whose gradients add up."""
    weight: Any = trunk.head.weight
    with _lent(trunk.head, weight.full_tensor(grad_placements=[Partial()])):
        yield


def _place(module: Any, mesh: DeviceMesh, placement: Shard | Replicate) -> None:
    """Keep a weight that a forward pass reads whole in parts on the ranks, or once on each."""
    module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [placement]))


def _gather(module: nn.Module, mesh: DeviceMesh, *, norms: Sequence[Any] = ()) -> None:
    """Give a module whole sequences, once for all products that read them, and its norms' weights.

    Each rank norms its own heads, so that gradients of these weights are parts of a sum.
    """
    forward = module.forward

    def gathered(x: Tensor, *args: Any, **rest: Any) -> Tensor:
        whole = DTensor.from_local(x, mesh, [CUT]).redistribute(mesh, [Replicate()])
        with ExitStack() as stack:
            for norm in norms:
                weight = norm.weight.to_local(grad_placements=[Partial()])
                stack.enter_context(_lent(norm, weight))
            return forward(whole, *args, **rest)

    module.forward = gathered


@contextmanager
def _lent(module: nn.Module, weight: Tensor) -> Iterator[None]:
    """Let `module.weight` be this tensor: attributes of an instance come before its parameters."""
    vars(module)["weight"] = weight
    try:
        yield
    finally:
        del vars(module)["weight"]
