"""What a model reads: ids, labels and the integer vectors of the mask rule."""

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

IGNORE = -100  # label of a position that has none; the default of torch's cross entropy


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B rows of T positions.

    Position q may read k iff `doc[q] == doc[k]` and `block[k] <= block[q]` and, where there are
    islands, `island[k] == 0` or `island[k] == island[q]`.

        ids     [B, T] int64   inputs
        labels  [B, T] int64   what each position predicts; IGNORE where nothing
        doc     [B, T] int32   document of a position; contiguous, non-decreasing along a row
        block   [B, T] int32   order inside the row; causal: the position
        pos     [B, T] int32   position for the rotary embedding; starts again at each document
        island  [B, T] int32   or None where there are none
        source  [B]    int32   which source of the manifest the row comes from
        soft    [B, T, K]      logits of a teacher that were stored, or None
        soft_id [B, T, K]      ids that these are of
        exact   bool           each 128 positions, from 0 on, are of one document and causal, which
                               spares a kernel the bounds of single positions
    """

    ids: Tensor
    labels: Tensor
    doc: Tensor
    block: Tensor
    pos: Tensor
    source: Tensor
    island: Tensor | None = None
    soft: Tensor | None = None
    soft_id: Tensor | None = None
    exact: bool = False

    @property
    def rows(self) -> int:
        return self.ids.shape[0]

    @property
    def tokens(self) -> int:
        """Positions in all rows, padding included: what the hardware computes."""
        return self.ids.numel()

    @property
    def predicted(self) -> Tensor:
        """How many positions have a label, a scalar on the device."""
        return (self.labels != IGNORE).sum()

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in self._tensors().items()
        }
        return replace(self, **moved)

    def split(self, rows: int) -> list[Self]:
        """Cut into micro-batches of at most `rows` rows; the tensors are views."""
        if rows < 1:
            raise ValueError(f"a micro-batch has at least one row, not {rows}")
        return [self._cut(slice(first, first + rows)) for first in range(0, self.rows, rows)]

    def _cut(self, part: slice) -> Self:
        views: dict[str, Any] = {name: value[part] for name, value in self._tensors().items()}
        return replace(self, **views)

    def _tensors(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}
