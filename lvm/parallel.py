"""Sharding, recomputation, compilation and precision, applied to single-device models from outside.

W ranks stand in a mesh of W/S copies by S shards:

    ranks 0 1 2 3 | 4 5 6 7     S = 4: four hold one whole model between them (FSDP2), gradients are
          shard       shard     summed in the four and then over the two (HSDP; Zhao et al. 2023)
          └──── copies ────┘

What is applied to a block, from the inside out, is recomputation, compilation, sharding: the order
in which the compiler sees what is recomputed and the gathered weights come before both. Names of
parameters do not change.
"""

import itertools
import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from tokenizer.cli import InputError
from tokenizer.world import World


class Drawn(Protocol):
    """A model that knows its first values."""

    def draw_weights(self, seed: int) -> Iterable[tuple[nn.Parameter, Tensor]]: ...


Recompute = Literal["none", "selective", "full"]

# Results that selective recomputation keeps: products, which are most of the time, and attention.
# What it computes again is cheap and large: norms, rotations, SwiGLU, residual sums.
KEPT = (
    "aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu", "kernels::attention",
)  # fmt: skip


def check_shards(shards: int, *, world: int) -> int:
    """Return how many ranks share one copy of the model; 0 asks for all. Raises InputError."""
    if shards < 0 or (shards and world % shards):
        fitting = [n for n in range(1, world + 1) if world % n == 0]
        raise InputError(f"--shards {shards} does not divide {world} ranks; one of {fitting} does")
    return shards or world


def mesh_of(world: World, shards: int) -> DeviceMesh:
    """Return the mesh of a run: one dimension, or copies by shards where there are copies."""
    size, kind = check_shards(shards, world=world.size), world.device.type
    if size == world.size:
        return init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (world.size // size, size), mesh_dim_names=("copy", "shard"))


def keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Tell selective recomputation what to keep."""
    name = operator.name() if isinstance(operator, torch._ops.OpOverload) else ""
    kept = name.split(".")[0] in KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def recompute_block(block: nn.Module, mode: Recompute) -> None:
    """Keep of a block's forward pass its inputs ("full") or these and its products ("selective").

    The rest is computed again in the backward pass: same values, in a block's worth of memory.
    """
    if mode == "none":
        return
    context: dict[str, Any] = {}
    if mode == "selective":
        context["context_fn"] = partial(create_selective_checkpoint_contexts, keep_products)
    # Nothing in a block is random: without the generators' states there is no host sync.
    rest: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, **context}
    forward = block.forward

    def recomputed(*args: Any, **kwargs: Any) -> Any:  # a frame of ours, which the compiler enters
        return checkpoint(forward, *args, **rest, **kwargs)

    block.forward = recomputed


def parallelize(
    root: nn.Module,
    blocks: Sequence[nn.Module] | nn.ModuleList,
    world: World,
    *,
    precision: str,
    recompute: Recompute = "none",
    compiled: bool = False,
    shards: int = 0,
    mesh: DeviceMesh | None = None,
) -> None:
    """Prepare a model for training on the device; with several ranks shard it, each block a unit.

    In "bf16" the gathered weights and the activations are bf16, gradients are reduced over ranks in
    fp32, and the stored weights stay fp32. Gradients come out as the mean over ranks. A model on
    the meta device, which no rank has whole, gets memory here and values from `initialise`. `mesh`
    stands in for that of `mesh_of` where something else has laid out the ranks.
    """
    for block in blocks:
        recompute_block(block, recompute)
        if compiled:
            block.compile(fullgraph=True)
    meta = any(parameter.is_meta for parameter in root.parameters())
    if world.size == 1:
        root.to_empty(device=world.device) if meta else root.to(world.device)
        return
    mesh = mesh_of(world, shards) if mesh is None else mesh
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the only fp32 inputs are rotary angles, and they stay fp32
    )
    for unit in (*blocks, root):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    if meta:
        root.to_empty(device=world.device)
    # Gather the next block's weights while this one computes, in both directions.
    units = [block for block in blocks if isinstance(block, FSDPModule)]
    for this, after in itertools.pairwise(units):
        this.set_modules_to_forward_prefetch([after])
        after.set_modules_to_backward_prefetch([this])


@torch.no_grad()
def initialise(model: Drawn, seed: int) -> None:
    """Fill the parameters of a prepared model as on one device, one tensor in memory at a time."""
    for parameter, values in model.draw_weights(seed):
        if isinstance(parameter, DTensor):
            values = values.to(parameter.device)
            # Every rank has drawn the same: each keeps its part, and no message is sent.
            part = distribute_tensor(
                values, parameter.device_mesh, parameter.placements, src_data_rank=None
            )
            parameter.to_local().copy_(part.to_local())
        else:
            parameter.copy_(values)


def reduce_gradients(root: nn.Module, now: bool) -> None:
    """Say whether the backward passes from here on also sum gradients over copies of the model.

    Within a copy every micro-batch's are summed at once, which is what keeps them sharded; over
    copies the last micro-batch's pass sums all.
    """
    if isinstance(root, FSDPModule):
        root.set_requires_all_reduce(now)


def reshard(root: nn.Module) -> None:
    """Put into parts again what forward passes without a backward pass left whole.

    FSDP keeps the root's own weights gathered, in the type of the forward pass, for a backward pass
    to come; until then the optimiser's state belongs to other tensors than the module holds.
    """
    if isinstance(root, FSDPModule):
        root.reshard()


def set_deterministic(wanted: bool) -> None:
    """Make operators of torch that have a deterministic form take it, for the whole process.

    What has none raises. cuBLAS needs a workspace of its own, which is read at its first call.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)


def compute(world: World, *, precision: str) -> AbstractContextManager[object]:
    """Return the context of a forward pass: bf16 by autocast on one process.

    With several ranks FSDP casts, and the residual stream is bf16 too; autocast keeps that in fp32.
    """
    if world.size == 1 and precision == "bf16":
        return torch.autocast(world.device.type, dtype=torch.bfloat16)
    return nullcontext()
