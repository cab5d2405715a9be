"""Rows as they are stored to batches as a model reads them."""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from kernels.mask import EXACT
from visual_sentences.batch import IGNORE, Batch
from visual_sentences.vocab import Vocab

Layout = Literal["bos", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """B stored rows; small integers, since this is what crosses the process border.

    tokens  [B, row_len] uint16, or int32 above 65,536 codes; 0 after `length`
    starts  [B, D] int32   where the documents start, ascending; -1 where there are no more
    length  [B]    int32   valid codes of each row
    source  [B]    int32   which source of the manifest
    row     [B]    int64   which row of that source's split
    """

    tokens: Tensor
    starts: Tensor
    length: Tensor
    source: Tensor
    row: Tensor

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        return type(self)(
            tokens=self.tokens.to(device, non_blocking=non_blocking),
            starts=self.starts.to(device, non_blocking=non_blocking),
            length=self.length.to(device, non_blocking=non_blocking),
            source=self.source.to(device, non_blocking=non_blocking),
            row=self.row.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Self:
        """Move to page-locked memory, from which a copy to a GPU runs beside its work."""
        return type(self)(
            tokens=self.tokens.pin_memory(),
            starts=self.starts.pin_memory(),
            length=self.length.pin_memory(),
            source=self.source.pin_memory(),
            row=self.row.pin_memory(),
        )


def pack(rows: Rows, *, layout: Layout, vocab: Vocab, whole_rows: bool = False) -> Batch:
    """Turn stored rows into a causal batch on the device of `rows`.

    A row of two documents, a b c and x y, and one place of padding (_ is IGNORE, B is bos, P pad):

        stored  tokens  a b c x y 0     starts 0 3     length 5

        bos     ids     B a b B x P     a document of n codes is exactly n positions, and
                labels  a b c x y _     each of its codes is predicted

        none    ids     a b c x y P     LVM's released layout: the first code of a document
                labels  b c _ y _ _     is never predicted, its last position predicts nothing

        both    doc     0 0 0 1 1 2     padding is a document of its own, so nothing reads it
                block   0 1 2 3 4 5
                pos     0 1 2 0 1 0

    `whole_rows` makes the whole row one document whatever its sentences are (LVM's paper recipes):
    above, doc 0 0 0 0 0 1, one bos, and labels across the border of the sentences.
    """
    _check(rows)
    batch, width = rows.tokens.shape
    device = rows.tokens.device
    place = torch.arange(width, device=device, dtype=torch.int32).expand(batch, width)
    valid = place < rows.length[:, None]
    codes = rows.tokens.long()

    starts = rows.starts[:, :1] if whole_rows else rows.starts
    starts = torch.cat([starts, rows.length[:, None].to(starts.dtype)], dim=1)
    starts = torch.where(starts < 0, width, starts).long()
    first = torch.zeros(batch, width + 1, dtype=torch.int32, device=device)
    first = first.scatter_(1, starts, 1)[:, :width]  # column `width` only takes what is no start

    doc = first.cumsum(1, dtype=torch.int32) - 1
    begin = torch.where(first.bool(), place, 0).cummax(1).values
    if layout == "bos":
        shifted = codes.roll(1, dims=1)
        ids = torch.where(first.bool(), vocab.bos, shifted)
        labels = torch.where(valid, codes, IGNORE)
    elif layout == "none":
        ids = codes
        last = torch.cat([first[:, 1:], first.new_ones(batch, 1)], dim=1).bool()
        labels = torch.where(valid & ~last, codes.roll(-1, dims=1), IGNORE)
    else:
        raise ValueError(f'layout "{layout}" is unknown; wanted "bos" or "none"')
    return Batch(
        ids=torch.where(valid, ids, vocab.pad),
        labels=labels,
        doc=doc,
        block=place.contiguous(),
        pos=place - begin,
        source=rows.source,
        exact=vocab.codes_per_image % EXACT == 0,
    )


def _check(rows: Rows) -> None:
    """Assert what makes `doc` contiguous and `block` non-decreasing: ordered starts from 0 on.

    On the CPU alone: on a GPU the answer would have to be waited for in every step.
    """
    if rows.tokens.device.type != "cpu":
        return
    starts, length = rows.starts, rows.length
    used = starts >= 0
    empty = length == 0
    assert bool(((starts[:, 0] == 0) | empty).all()), "the first document of a row starts at 0"
    ascending = (starts[:, 1:] > starts[:, :-1]) & used[:, :-1] | ~used[:, 1:]
    assert bool(ascending.all()), "document starts ascend, and -1 stands after all of them"
    assert bool(((starts < length[:, None]) | ~used).all()), "a document is not empty"
    assert bool((length <= rows.tokens.shape[1]).all()), "a row is no longer than its tokens"
