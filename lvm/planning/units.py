"""What sharding does to a model: the bytes and numbers of each FSDP unit, whole and on one rank.

Two ways to the same figures. `count` is arithmetic over parameter shapes; `count_on_mesh` applies
the trainer's own `parallelize` to the model on a fake process group of as many ranks, in which this
process is rank 0 and no message is sent, and looks at what rank 0 holds. The command uses the
second where there are several ranks, so that plan and trainer cannot drift apart.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lvm.config import ModelConfig
from lvm.model import on_meta
from lvm.optim import role
from lvm.parallel import parallelize
from tokenizer.cli import CommandError
from tokenizer.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """Numbers of weights. A block is one unit; embedding, last norm and head are the root's."""

    block: int
    """Of one block, whole."""
    root: int
    matrices: int
    """Of all blocks' matrices, whole: what Muon updates."""
    local: int
    """That the fullest rank stores, padding included."""
    local_matrices: int
    """Of these, of blocks' matrices."""

    def total(self, layers: int) -> int:
        return layers * self.block + self.root


def count(config: ModelConfig, *, shards: int) -> Units:
    """Count by arithmetic: FSDP2 cuts the first dimension into equal parts, rounded up."""
    return _sum(
        [(n, p, -(-p.shape[0] // shards) * p[0].numel()) for n, p in _shapes(config)], config.layers
    )


@functools.cache
def _shapes(config: ModelConfig) -> list[tuple[str, Tensor]]:
    return list(on_meta(config).named_parameters())


def matrix_shapes(config: ModelConfig) -> tuple[tuple[int, int], ...]:
    """Return rows and columns of all blocks' matrices, in the order in which Muon is given them."""
    matrices = [p for n, p in _shapes(config) if role(n, p) == "matrix"]
    return tuple((p.shape[0], p.shape[1]) for p in matrices)


def count_on_mesh(config: ModelConfig, *, gpus: int, shards: int) -> Units:
    """Count what rank 0 of `gpus` holds once the trainer's own code has sharded the model.

    Raises CommandError within a process group: the fake one would have to take its place.
    """
    if dist.is_initialized():
        raise CommandError("a plan for several GPUs cannot be made inside a process group")
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers "fake"

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    try:
        model = on_meta(config)
        world = World(rank=0, size=gpus, device=torch.device("cpu"))
        parallelize(_Root(model), model.layers, world, precision="bf16", shards=shards)
        held = ((n, p, _local(p)) for n, p in model.named_parameters())
        return _sum(held, config.layers)
    finally:
        dist.destroy_process_group()


class _Root(nn.Module):
    """Stands for the trainer's Learner, which owns no weight besides the model's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def _local(parameter: Tensor) -> int:
    return parameter.to_local().numel() if isinstance(parameter, DTensor) else parameter.numel()


def _sum(held: Iterable[tuple[str, Tensor, int]], layers: int) -> Units:
    blocks = root = matrices = local = local_matrices = 0
    for name, parameter, here in held:
        inside, size = "layers." in name, parameter.numel()
        blocks, root = blocks + size * inside, root + size * (not inside)
        local += here
        if role(name, parameter) == "matrix":
            matrices, local_matrices = matrices + size, local_matrices + here
    return Units(
        block=blocks // layers,
        root=root,
        matrices=matrices,
        local=local,
        local_matrices=local_matrices,
    )
