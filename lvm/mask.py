"""The mask rule: what a position may read, from three integer vectors.

    q reads k  iff  doc[q] == doc[k]  and  block[k] <= block[q]
                    and  (island[k] == 0 or island[k] == island[q])

    doc    0 0 0 1 1      1 . . . .        block  0 0 2 3      1 1 . .     a prefix of two,
    block  0 1 2 3 4      1 1 . . .        (doc one)           1 1 . .     then causal
                          1 1 1 . .                            1 1 1 .
    causal documents      . . . 1 .                            1 1 1 1
                          . . . 1 1

`island` marks groups that only their own members read (0: everybody). The rule is transitive: what
q cannot read it cannot learn through others either, so one layer's mask speaks for the whole model.
B batch, T positions.
"""

import torch
from torch import Tensor

from kernels.attention import Backend, resolve
from kernels.mask import Mask


def allowed(doc: Tensor, block: Tensor, island: Tensor | None = None) -> Tensor:
    """Return the rule as bool [B, T, T] (row q, column k) from int vectors [B, T]."""
    same = doc[:, :, None] == doc[:, None, :]
    reads = same & (block[:, None, :] <= block[:, :, None])
    if island is not None:
        reads &= (island[:, None, :] == 0) | (island[:, None, :] == island[:, :, None])
    return reads


def intervals(doc: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """Return (lo, hi), int32 [B, T]: row q reads lo <= k < hi.

    Right only where documents are contiguous and `block` never falls along the row.
    """
    length = doc.shape[1]
    index = torch.arange(length, device=doc.device).expand_as(doc)
    change = doc[:, 1:] != doc[:, :-1]
    first, last = torch.zeros_like(index), torch.full_like(index, length)
    first[:, 1:] = torch.where(change, index[:, 1:], 0)
    lo = first.cummax(dim=1).values
    last[:, :-1] = torch.where(change, index[:, 1:], length)
    end = last.flip(1).cummin(dim=1).values.flip(1)
    read = torch.searchsorted(block.contiguous(), block.contiguous(), right=True)
    return lo.int(), torch.minimum(read, end).int()


def attention_mask(
    doc: Tensor,
    block: Tensor,
    island: Tensor | None = None,
    *,
    exact: bool = False,
    backend: Backend = "auto",
) -> Mask:
    """Return the mask value of a batch, in the form that `backend` wants, for all layers.

    `exact` as in `Mask.interval`. With islands `backend` is "auto", "flex" or "sdpa".
    """
    if island is not None:
        mask = Mask(dense=allowed(doc, block, island))
    else:
        mask = Mask.interval(*intervals(doc, block), exact=exact)
    length = doc.shape[1]
    return resolve(mask, queries=length, keys=length, device=doc.device, backend=backend)


def leaks(reads: Tensor, ids: Tensor, labels: Tensor, doc: Tensor, *, ignore: int) -> Tensor:
    """Count the positions that may read the input which is their own label (must be none).

    `reads` [B, T, T] is the dense mask; ids, labels, doc [B, T]. The label of q stands at q + 1 of
    its document, which is asserted, so that a wrong shift cannot pass as a clean mask.
    """
    inside = (doc[:, 1:] == doc[:, :-1]) & (labels[:, :-1] != ignore)
    assert torch.equal(labels[:, :-1][inside], ids[:, 1:][inside]), "labels are not the next inputs"
    ahead = reads.diagonal(offset=1, dim1=1, dim2=2)  # [B, T-1]: q reads q + 1
    return (inside & ahead).sum()
