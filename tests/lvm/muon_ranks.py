"""What test_muon runs on each of several ranks: updates of sharded matrices beside torch's whole.

Usage: muon_ranks.py OUT RANK RANKS; writes OUT/RANK.json: by case what differed, nothing where
all is well.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from lvm.muon import Muon

# Rows that 2 and 4 ranks do not divide, fewer rows than ranks, tall and wide, more than one round.
SHAPES = [(7, 5), (5, 7), (16, 16), (3, 8), (1, 6), (33, 12), (2, 2), (48, 20), (20, 48), (9, 9)]
UPDATES = 4

Place = Callable[[Tensor], Tensor]


def meshes(world: int) -> dict[str, tuple[DeviceMesh, list[Placement]]]:
    """Return the layouts that a number of ranks allows, by name."""
    flat = init_device_mesh("cpu", (world,))
    found: dict[str, tuple[DeviceMesh, list[Placement]]] = {
        "shards": (flat, [Shard(0)]),
        "copies": (flat, [Replicate()]),
        "copies of one shard": (init_device_mesh("cpu", (world, 1)), [Replicate(), Shard(0)]),
    }
    if world == 4:
        found["copies of shards"] = (init_device_mesh("cpu", (2, 2)), [Replicate(), Shard(0)])
    return found


def matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def gradients() -> Iterator[list[Tensor]]:
    """Yield those of each update; the third matrix has none in the second."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(UPDATES):
        yield [torch.randn(shape, generator=generator) for shape in SHAPES]


def differences(place: Place, **options: Any) -> list[str]:
    """Return where updates of placed matrices have other bits than torch's of whole ones.

    After half of the updates a new optimiser goes on from torch's state.
    """
    whole, placed = matrices(), [nn.Parameter(place(p.detach().clone())) for p in matrices()]
    reference, ours = torch.optim.Muon(whole, **options), Muon(placed, **options)
    wrong = []
    for step, given in enumerate(gradients()):
        if step == UPDATES // 2:
            ours = Muon(placed, **options)
            for p, q in zip(whole, placed, strict=True):
                momentum = reference.state[p]["momentum_buffer"]
                ours.state[q]["momentum_buffer"] = place(momentum.clone())
        for i, (p, q, gradient) in enumerate(zip(whole, placed, given, strict=True)):
            absent = step == 1 and i == 2
            p.grad, q.grad = (None, None) if absent else (gradient.clone(), place(gradient.clone()))
        reference.step()
        ours.step()
        for i, (p, q) in enumerate(zip(whole, placed, strict=True)):
            momenta = reference.state[p]["momentum_buffer"], ours.state[q]["momentum_buffer"]
            for what, one, many in (("weight", p.detach(), q.detach()), ("momentum", *momenta)):
                found: Any = many
                if not torch.equal(found.to_local(), place(one.clone()).to_local()):
                    wrong.append(f"{what} {i} of shape {SHAPES[i]} after update {step}")
    return wrong


def main(out: Path, rank: int, world: int) -> None:
    store = dist.FileStore(str(out / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    found = {}
    for name, (mesh, placements) in meshes(world).items():

        def place(tensor: Tensor, mesh=mesh, placements=placements) -> Tensor:
            return distribute_tensor(tensor, mesh, placements, src_data_rank=None)

        for nesterov in (True, False):
            scale = "match_rms_adamw" if nesterov else "original"
            wrong = differences(place, lr=0.02, nesterov=nesterov, adjust_lr_fn=scale)
            found[f"{name}, {'nesterov' if nesterov else 'plain'}"] = wrong
    (out / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
