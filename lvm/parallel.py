"""Sharding and precision, applied to single-device models from outside."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tokenizer.world import World


def shard(root: nn.Module, blocks: nn.ModuleList, world: World, *, precision: str) -> None:
    """Move a model to the device; with several ranks shard it by FSDP2, each block a unit.

    In "bf16" the gathered weights and the activations are bf16, gradients are reduced over ranks in
    fp32, and the stored weights stay fp32. Gradients come out as the mean over ranks. Parameter
    names do not change.
    """
    if world.size == 1:
        root.to(world.device)
        return
    mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("fsdp",))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the only fp32 inputs are rotary angles, and they stay fp32
    )
    for unit in (*blocks, root):
        fully_shard(unit, mesh=mesh, mp_policy=policy)


def compute(world: World, *, precision: str) -> AbstractContextManager[object]:
    """Return the context of a forward pass: bf16 by autocast on one process.

    With several ranks FSDP casts, and the residual stream is bf16 too; autocast keeps that in fp32.
    """
    if world.size == 1 and precision == "bf16":
        return torch.autocast(world.device.type, dtype=torch.bfloat16)
    return nullcontext()
