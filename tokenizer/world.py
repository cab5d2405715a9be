"""The processes of one run: which this one is, what they tell each other, what stops them.

One process needs no process group and runs the same code. Several processes are told who they are
by the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), which torchrun sets,
and our Slurm scripts for srun.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tokenizer.cli import InputError

T = TypeVar("T")

NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Which of how many processes this one is, and the device that it computes on."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def add(self, *values: float) -> list[float]:
        """Return each value summed over ranks, by way of the hosts: no device is waited for."""
        if self.size == 1:
            return list(values)
        host = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(host)
        return host.tolist()

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over ranks of a tensor on the device."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one type on the device by their means over ranks, in one message."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        parts = flat.div_(self.size).split([t.numel() for t in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def gather(self, values: Tensor) -> Tensor:
        """Return the tensors [n, …] of all ranks, one below the other, [ranks · n, …]."""
        if self.size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def share(self, value: T) -> T:
        """Return the value that rank 0 gave."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def wait(self) -> None:
        """Return when every rank has come here."""
        self.add(0.0)


@contextmanager
def world(device: str) -> Iterator[World]:
    """Join the other processes of this run, if there are any, on `device` (auto, cpu, cuda).

    Raises InputError where the device or a variable of the environment is missing.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: torch sees no CUDA device here; use --device cpu or auto")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(device=torch.device(device))
        return
    if missing := [name for name in NEEDED if name not in os.environ]:
        raise InputError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set; start several processes "
            "by torchrun, or by srun with our launch scripts, which set them"
        )
    local = torch.device(device)
    if device == "cuda":
        local = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(local)
    # gloo beside nccl: `World.add` and `share` pass host values without waiting for the device
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    yield World(rank=dist.get_rank(), size=size, device=local)
    dist.destroy_process_group()  # not after an error: it would wait for ranks that are gone


class Signals:
    """Note SIGTERM, SIGUSR1 and SIGINT within the block; a second one acts as it always did."""

    NAMES = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.seen = ""

    def __enter__(self) -> Self:
        self.before = {name: signal.signal(name, self._note) for name in self.NAMES}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name, handler in self.before.items():
            signal.signal(name, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.seen = signal.Signals(number).name
        signal.signal(number, self.before[signal.Signals(number)])
