"""Muon on sharded matrices: each is orthogonalised whole, once, by the rank that owns it.

The arithmetic is that of torch.optim.Muon (Jordan et al. 2024; Liu et al. 2025, "Muon is scalable
for LLM training"), and so are its options, the names of its state and its bits: on any number of
ranks the weights after an update are those of one process with the same gradients. torch's own,
given FSDP's DTensors, redistributes every product of the Newton–Schulz iteration instead.

Ranks stand in C copies by S shards (lvm.parallel), all of them owners. A round takes at most one
matrix an owner, of similar sizes, and on each rank

    own rows of S matrices ── momentum, bf16, all-to-all in the copy ──> one whole matrix
    one whole matrix ── Newton–Schulz, all-to-all in the copy ──> own rows of S updates
    own rows of S updates ── all-gather over the copies ──> own rows of all updates of the round

so that every matrix is sent once to its owner and once back. Momentum stays sharded. What the next
round brings travels while this one computes; the all-gather, which only copies need, does not.
Beside weights, gradients and momenta a rank holds at most nine of its largest matrices in bf16, for
the iteration and three rounds under way, and with copies the updates of its rows in a round.

Not done: batched products of equal matrices and torch.compile, whose use on a GPU was not measured.
"""

import functools
import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

Shape = tuple[int, int]
Deal = tuple[tuple[int | None, ...], ...]  # of rounds, of owners: the matrix, if any


def products(shape: Shape, *, steps: int = 5) -> int:
    """Return the FLOPs of orthogonalising a matrix: X Xᵀ, its square, and that times X, a step."""
    a, b = sorted(shape)
    return steps * (4 * a * a * b + 2 * a**3)


@functools.cache
def deal(shapes: tuple[Shape, ...], *, shards: int, copies: int = 1) -> Deal:
    """Return who orthogonalises which matrix, the same on every rank: owners are copy by copy.

    The largest first, each to the owner with the fewest FLOPs so far (Graham 1969: at most 4/3 of
    the best there is); of equals to another copy, so that all copies gather alike.
    """
    loads = [(0, shard, copy) for shard in range(shards) for copy in range(copies)]
    hands: list[list[int]] = [[] for _ in loads]
    for i in sorted(range(len(shapes)), key=lambda i: -products(shapes[i])):
        load, shard, copy = loads[0]
        hands[copy * shards + shard].append(i)
        heapq.heapreplace(loads, (load + products(shapes[i]), shard, copy))
    length = max(map(len, hands))
    padded = [[*hand, *[None] * (length - len(hand))] for hand in hands]
    return tuple(zip(*padded, strict=True))


def rows_of(rows: int, shards: int) -> list[int]:
    """Return how many of a matrix' rows each shard has, as DTensor cuts: equal parts rounded up."""
    part = -(-rows // shards)
    return [max(0, min(part, rows - part * shard)) for shard in range(shards)]


def orthogonalise(
    matrix: Tensor, *, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Return the singular vectors of a bf16 matrix [A, B] with values between about 0.7 and 1.2.

    The quintic Newton–Schulz iteration of Jordan et al. 2024, in the order of torch.optim.Muon's,
    on which bits depend. Scales `matrix` in place.
    """
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x.div_(x.norm().clamp(min=eps))  # no singular value is above 1
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def scale_of(shape: Shape, name: str | None) -> float:
    """Return what multiplies the rate of a matrix [A, B]: see `Optim.muon_scale`."""
    if name == "match_rms_adamw":
        return 0.2 * math.sqrt(max(shape))
    return math.sqrt(max(1.0, shape[0] / shape[1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the parts of matrices are: owners are the ranks of C copies by S shards, in that order.

    A group is None where there is nobody to speak to.
    """

    copies: int = 1
    shards: int = 1
    copy: int = 0
    shard: int = 0
    across: dist.ProcessGroup | None = None
    """Ranks with the same shard of all copies."""
    within: dist.ProcessGroup | None = None
    """Ranks of the same copy."""

    @classmethod
    def of(cls, matrix: Tensor) -> "Layout":
        """Return the layout of a matrix; raises ValueError where parts are not whole rows."""
        if not isinstance(matrix, DTensor):
            return cls()
        mesh, places = matrix.device_mesh, matrix.placements
        coordinates = mesh.get_coordinate()
        cut = [i for i, place in enumerate(places) if type(place) is Shard and place.dim == 0]
        whole = [i for i, place in enumerate(places) if isinstance(place, Replicate)]
        if coordinates is None or len(cut) > 1 or len(whole) > 1 or len(cut + whole) < len(places):
            raise ValueError(
                f"Muon was given a matrix placed as {places} on {mesh}; wanted Shard(0) on one "
                "dimension of the mesh, Replicate() on one, or both: what lvm.parallel makes. "
                "Matrices that are divided otherwise (tensor parallel) can be AdamW's"
            )
        found: dict[str, Any] = {}
        groups = [mesh.get_group(i) if mesh.size(i) > 1 else None for i in range(mesh.ndim)]
        for i in cut:
            found |= {"shards": mesh.size(i), "shard": coordinates[i], "within": groups[i]}
        for i in whole:
            found |= {"copies": mesh.size(i), "copy": coordinates[i], "across": groups[i]}
        return cls(**found)

    def part(self, hands: Sequence[int | None], copy: int) -> Sequence[int | None]:
        """Return the matrices of a round that ranks of one copy own."""
        return hands[copy * self.shards : (copy + 1) * self.shards]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """What travels in a round; `work` is None where it has arrived."""

    own: int | None
    """The matrix that this rank orthogonalises."""
    hands: Sequence[int | None]
    """The matrices of the round by owner: rows of a copy's lie in a buffer in this order."""
    sent: Tensor
    """Kept while it may be read."""
    found: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.found


class Muon(torch.optim.Muon):
    """torch.optim.Muon for matrices that are plain, sharded by rows, or copied.

    Takes its arguments, of which `lr` is a number. Its state is `momentum_buffer`, placed as the
    matrix: a checkpoint of one is one of the other. All matrices of a parameter group are of one
    layout, and all ranks call `step` with gradients for the same ones; ranks of different copies
    hold equal gradients.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        """Raises ValueError where matrices of a group are of several layouts or of a wrong one."""
        super().__init__(params, **options)
        for group in self.param_groups:
            layouts = {Layout.of(p) for p in group["params"]}
            if len(layouts) > 1:
                raise ValueError(
                    f"Muon was given matrices of {len(layouts)} layouts in one group; wanted one"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every matrix that has a gradient; returns what `closure` does, which computes it.

        Waits for no device.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            for matrix in matrices:
                if "momentum_buffer" not in self.state[matrix]:
                    self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix).detach()
            if matrices:
                _Update(group, matrices, [self.state[p]["momentum_buffer"] for p in matrices]).go()
        return loss


class _Update:
    """One update of the matrices of a parameter group."""

    def __init__(
        self, group: dict[str, Any], matrices: Sequence[Tensor], momenta: Iterable[Tensor]
    ) -> None:
        self.group = group
        self.layout = Layout.of(matrices[0])
        self.shapes: list[Shape] = [(p.shape[0], p.shape[1]) for p in matrices]
        self.weights = [_local(p) for p in matrices]
        self.gradients = [_local(p.grad) for p in matrices if p.grad is not None]
        self.momenta = [_local(momentum) for momentum in momenta]

    def go(self) -> None:
        """Make the rounds, each of which travels while the one before computes."""
        layout = self.layout
        rounds = deal(tuple(self.shapes), shards=layout.shards, copies=layout.copies)
        arriving, leaving = [self.collect(rounds[0])], list[Parcel]()
        for i in range(len(rounds)):
            arriving += [self.collect(hands) for hands in rounds[i + 1 : i + 2]]
            leaving.append(self.orthogonalise(arriving.pop(0)))
            if i:
                self.apply(leaving.pop(0))
        self.apply(leaving.pop())

    def collect(self, hands: Sequence[int | None]) -> Parcel:
        """Move the momenta of a round's matrices, and send their owners in this copy the rows here.

        Momenta of the other copies' matrices move alike: only the update is the owner's to compute.
        """
        layout, group = self.layout, self.group
        for moved in (i for i in hands if i is not None):
            self.momenta[moved].lerp_(self.gradients[moved], 1 - group["momentum"])
        part = layout.part(hands, layout.copy)
        own, sizes = part[layout.shard], self.sizes(part)
        sent = self.weights[0].new_empty(sum(sizes), dtype=torch.bfloat16)
        for i, place in zip(part, sent.split(sizes), strict=True):
            if i is not None:
                new = self.momenta[i]
                if group["nesterov"]:
                    new = self.gradients[i].lerp(new, group["momentum"])
                place.view_as(new).copy_(new)
        found, work = self.exchange(sent, give=sizes, take=self.cuts(own))
        return Parcel(own=own, hands=hands, sent=sent, found=found, work=work)

    def orthogonalise(self, parcel: Parcel) -> Parcel:
        """Compute the update of the matrix that has come, and send every shard its rows of it."""
        found, own, hands = parcel.wait(), parcel.own, parcel.hands
        if own is not None:
            group = self.group
            found = orthogonalise(
                found.view(self.shapes[own]),
                coefficients=group["ns_coefficients"],
                steps=group["ns_steps"],
                eps=group["eps"],
            ).reshape(-1)
        take = self.sizes(self.layout.part(hands, self.layout.copy))
        back, work = self.exchange(found, give=self.cuts(own), take=take)
        return Parcel(own=own, hands=hands, sent=found, found=back, work=work)

    def apply(self, parcel: Parcel) -> None:
        """Decay this rank's rows of a round's matrices and move them by what has come back."""
        group, layout = self.group, self.layout
        updates = parcel.wait()
        parts = [layout.part(parcel.hands, copy) for copy in range(layout.copies)]
        sizes = [self.sizes(part) for part in parts]
        lines = updates[None]
        if layout.copies > 1:  # of unequal lengths, which not every backend gathers
            padded = updates.new_zeros(max(map(sum, sizes)))
            padded[: len(updates)] = updates
            lines = padded.new_empty(layout.copies, len(padded))
            dist.all_gather(list(lines), padded, group=layout.across)
        for part, size, line in zip(parts, sizes, lines, strict=True):
            for i, update in zip(part, line[: sum(size)].split(size), strict=True):
                if i is None:
                    continue
                weight, rate = self.weights[i], group["lr"]
                scale = scale_of(self.shapes[i], group["adjust_lr_fn"])
                weight.mul_(1 - rate * group["weight_decay"])
                weight.add_(update.view_as(weight), alpha=-rate * scale)

    def sizes(self, part: Sequence[int | None]) -> list[int]:
        """Return how many values of each matrix this rank has."""
        return [0 if i is None else self.weights[i].numel() for i in part]

    def cuts(self, own: int | None) -> list[int]:
        """Return how many values of a matrix each shard has."""
        if own is None:
            return [0] * self.layout.shards
        rows, columns = self.shapes[own]
        return [columns * n for n in rows_of(rows, self.layout.shards)]

    def exchange(
        self, sent: Tensor, *, give: list[int], take: list[int]
    ) -> tuple[Tensor, dist.Work | None]:
        """Send each shard of the copy `give` values; returns where `take` of each arrive."""
        if self.layout.shards == 1:
            return sent, None
        found = sent.new_empty(sum(take))
        work = dist.all_to_all_single(
            found, sent, take, give, group=self.layout.within, async_op=True
        )
        return found, work


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
