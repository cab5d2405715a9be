"""Cross-entropy of a linear head without its logits: value and gradients, a few rows at a time.

N positions, D width, V rows of the head, C <= V live columns. For x [N, D] and weight [V, D]

    z = x W^T        Z = sum_v exp z_v        nll = log Z - z_label
    loss = sum over positions that have a label of
           hard_weight nll + z_loss (log Z)^2 + soft_weight sum_v -t_v log softmax(z / T)_v

The whole of z in bf16, its fp32 copy and the gradients of both are 12 bytes an entry: 3 GiB for
32,768 positions and 8320 columns. Here one table of `TABLE` entries is written again and again, and
the gradients are formed in the forward pass, while a piece of z is at hand (the scheme of Liger
Kernel, Hsu et al. 2024):

            x[c] ── matmul W^T ──> z ── row by row ──> sums: nll, (log Z)^2, soft, correct
                                   │  overwritten
                                   └──> dz ── matmul W ─────> dx[c]
                                         └─── x[c]^T matmul ─> dW += (fp32)

    torch    softmax and what follows by torch operators
    triton   one kernel, a program a row: kernels/cross_entropy_triton.py

FLOPs: 6·N·V·D with gradients, as many as autograd spends, and 2·N·V·D without. Bytes besides those
of the products: a row of the table is read and written by the kernel, 4·C in 16 bits. Memory: the
table, dx [N, D] in the type of the products, dW [V, D] in fp32; without gradients the table alone.

The gradient is that of a sum: an entry of dz is a probability or less 1, whatever N is. A mean's
1/N and a loss scale come with the incoming gradient in `backward`, after the products. So fp16
loses only probabilities below 3e-8, and dW is kept in fp32, where the sum does not overflow. In
bf16 dz is rounded to bf16 before its products, as autograd rounds it.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import Backend, choose

# The table of logits: most rows, most entries. On a GPU 128 MiB in bf16, 8192 rows of 8320, for
# products large enough to fill it. On a CPU 16 MiB in fp32; 512 rows, as more fall out of the cache
# and fewer spend their time on adding to the gradient of the weight.
TABLE = {"cpu": (512, 1 << 22), "cuda": (1 << 16, 1 << 26)}
BLOCK = 64


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """Sums over the positions that have a label; a gradient passes through `loss` only."""

    loss: Tensor  # fp32 scalar
    nll: Tensor  # fp32 scalar
    soft: Tensor  # fp32 scalar, cross-entropy with the soft targets; 0 without
    correct: (
        Tensor  # int64 scalar, positions whose label has the largest logit, the first of equals
    )
    count: Tensor  # int64 scalar, positions that have a label


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a row's loss is made of."""

    columns: int
    ignore: int
    z_loss: float
    hard_weight: float
    soft_weight: float
    temperature: float


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore: int = -100,
    z_loss: float = 0.0,
    columns: int | None = None,
    soft: Tensor | None = None,
    hard_weight: float = 1.0,
    soft_weight: float = 1.0,
    temperature: float = 1.0,
) -> CrossEntropy:
    """Return the sums in float64 by whole tables and autograd; the oracle of every backend."""
    counts = labels != ignore
    z = (x.double() @ weight[:columns].double().T)[counts]
    labels = labels[counts]
    nll = F.cross_entropy(z, labels, reduction="sum")
    loss = hard_weight * nll + z_loss * z.logsumexp(1).square().sum()
    cross = z.new_zeros(())
    if soft is not None:
        target = soft.double()[counts, : z.shape[1]]
        cross = -(target * (z / temperature).log_softmax(1)).sum()
        loss = loss + soft_weight * cross
    correct = (z.argmax(1) == labels).sum()
    return CrossEntropy(loss, nll.detach(), cross.detach(), correct, counts.sum())


def first_highest(scores: Tensor) -> Tensor:
    """Return `scores.argmax(1)` of [N, C], the first of equals, int64 [N].

    Largest entry of each block, first block that has the largest, first place in it: on a CPU
    `amax` is vectorised and `argmax` is not.
    """
    if scores.shape[1] % BLOCK:
        return scores.max(1).indices
    blocks = scores.unflatten(1, (-1, BLOCK))
    block = blocks.amax(2).argmax(1)
    inside = blocks[torch.arange(len(block), device=block.device), block].argmax(1)
    return block * BLOCK + inside


def reduce_rows(
    logits: Tensor, labels: Tensor, soft: Tensor | None, sums: Tensor, terms: Terms, gradient: bool
) -> Tensor:
    """Write nll, (log Z)^2, soft and correct of each row to sums [4, n]; return d loss / d logits.

    Logits [n, C], labels [n], soft [n, C] or wider. Plain torch, softmax in fp32. What is returned
    without `gradient` has no meaning.
    """
    counts = labels != terms.ignore
    target = labels.where(counts, 0)[:, None]
    best = first_highest(logits)[:, None]
    top, chosen = logits.gather(1, torch.cat([best, target], 1)).float().unbind(1)
    p = logits.softmax(1, dtype=torch.float32)
    # p of the largest logit is at least 1/C: no logarithm of a number that has rounded to 0.
    log_sum = -p.gather(1, best)[:, 0].log()
    log_z = top + log_sum
    if gradient:
        p.mul_((counts * (terms.hard_weight + 2 * terms.z_loss * log_z))[:, None])
        hit = p.gather(1, target) - terms.hard_weight * counts[:, None]
        p.scatter_(1, target, hit)  # one a row: no two meet
    cross = torch.zeros_like(log_z)
    if soft is not None:
        log_q = logits.float().div(terms.temperature).log_softmax(1)
        wanted = soft[:, : logits.shape[1]].float()
        cross = -(wanted * log_q).sum(1)
        if gradient:
            factor = counts[:, None] * (terms.soft_weight / terms.temperature)
            p += log_q.exp_().mul_(wanted.sum(1, keepdim=True)).sub_(wanted).mul_(factor)
    rows = torch.stack([log_sum + (top - chosen), log_z.square(), cross, (best == target)[:, 0]])
    sums.copy_(rows.where(counts, 0))
    return p.to(logits.dtype)


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a^T b to the fp32 total [A, B]; a [n, A] and b [n, B] in one type.

    The product has to be fp32 too where the type is fp16: a column that is the label of 16,384 rows
    sums to more than fp16 holds. On a CPU bf16 products come rounded to bf16, as autograd's do.
    """
    if a.dtype != torch.float32 and a.is_cuda:
        total += torch.mm(a.T, b, out_dtype=torch.float32)
    elif a.dtype == torch.bfloat16:
        total += a.T @ b
    else:
        total.addmm_(a.T.float(), b.float())


def rows_of_chunk(columns: int, device: torch.device) -> int:
    """Return how many rows a table of logits has: the power of two nearest to its entries."""
    most, entries = TABLE.get(device.type, TABLE["cuda"])
    return min(most, 1 << max(0, round(math.log2(entries / columns))))


# One opaque operator: torch.compile then neither unrolls the loop over chunks nor looks into the
# kernel. `triton_op`, which it could look into, refuses kernels that triton interprets.
@torch.library.custom_op("kernels::linear_cross_entropy", mutates_args=())
def cross_entropy_op(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    soft: Tensor | None,
    columns: int,
    chunk: int,
    ignore: int,
    z_loss: float,
    hard_weight: float,
    soft_weight: float,
    temperature: float,
    dtype: torch.dtype,
    backend: str,
    x_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    terms = Terms(
        columns=columns,
        ignore=ignore,
        z_loss=z_loss,
        hard_weight=hard_weight,
        soft_weight=soft_weight,
        temperature=temperature,
    )
    n = len(x)
    gradient = x_gradient or weight_gradient
    reduce, live, pitch = reduce_rows, columns, columns
    if backend == "triton":
        from kernels.cross_entropy_triton import reduce_rows as reduce  # needs triton

        # Whole blocks, so that rows begin where 16 bytes do; columns beyond `columns` are masked.
        pitch = -(-columns // BLOCK) * BLOCK
        live = min(pitch, len(weight))
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        w = weight[:live].to(dtype)
        sums = torch.zeros(4, n, dtype=torch.float32, device=x.device)
        dx = torch.empty(x.shape if x_gradient else 0, dtype=dtype, device=x.device)
        dw = torch.zeros(
            weight.shape if weight_gradient else 0, dtype=torch.float32, device=x.device
        )
        rows = min(chunk or rows_of_chunk(columns, x.device), n)
        table = torch.empty(rows, pitch, dtype=dtype, device=x.device)
        for start in range(0, n, max(rows, 1)):
            part = slice(start, min(start + rows, n))
            inputs = x[part].to(dtype)
            logits = table[: len(inputs)]
            torch.mm(inputs, w.T, out=logits[:, :live])
            targets = None if soft is None else soft[part]
            dlogits = reduce(logits, labels[part], targets, sums[:, part], terms, gradient)
            if x_gradient:
                torch.mm(dlogits[:, :live], w, out=dx[part])
            if weight_gradient:
                accumulate(dw[:live], dlogits[:, :live], inputs)
        nll, square, cross, correct = sums.sum(1).unbind()
        loss = hard_weight * nll + z_loss * square + soft_weight * cross
        count = (labels != ignore).sum()
        return loss, nll.clone(), cross.clone(), correct.long(), count, dx, dw


@cross_entropy_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    soft: Tensor | None,
    columns: int,
    chunk: int,
    ignore: int,
    z_loss: float,
    hard_weight: float,
    soft_weight: float,
    temperature: float,
    dtype: torch.dtype,
    backend: str,
    x_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, nll, cross = (x.new_empty((), dtype=torch.float32) for _ in range(3))
    correct, count = (x.new_empty((), dtype=torch.int64) for _ in range(2))
    dx = x.new_empty(x.shape if x_gradient else 0, dtype=dtype)
    dw = x.new_empty(weight.shape if weight_gradient else 0, dtype=torch.float32)
    return loss, nll, cross, correct, count, dx, dw


def keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight = inputs[:2]
    *_, dx, dw = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros of the size of dx and dw
    ctx.save_for_backward(dx, dw)
    ctx.types = x.dtype, weight.dtype
    ctx.formed = inputs[-2:]


def scale_gradients(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Multiply what the forward pass has formed by the incoming scalar."""
    formed: list[Tensor | None] = [None, None]
    if grad is not None:
        # A vector of one entry: times a scalar a 16-bit tensor would round the scalar to 16 bits.
        factor = grad.reshape(1)
        for i, (saved, dtype) in enumerate(zip(ctx.saved_tensors, ctx.types, strict=True)):
            if ctx.formed[i]:
                out = torch.empty_like(saved, dtype=dtype)
                formed[i] = torch.mul(saved, factor, out=out)  # no fp32 copy of dx on a GPU
    return *formed, *[None] * 13


cross_entropy_op.register_autograd(scale_gradients, setup_context=keep_gradients)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore: int = -100,
    z_loss: float = 0.0,
    columns: int | None = None,
    soft: Tensor | None = None,
    hard_weight: float = 1.0,
    soft_weight: float = 1.0,
    temperature: float = 1.0,
    chunk: int | None = None,
    backend: Backend = "auto",
) -> CrossEntropy:
    """Return the sums of the cross-entropy of x weight^T on labels; logits never exist at once.

    x [N, D], weight [V, D], labels int64 [N]; positions whose label is `ignore` count nothing.
    `columns` are the live columns of a padded table (default V): the others are no part of the
    softmax and get no gradient. `soft` [N, columns or more] are target probabilities, for
    distillation at a `temperature` (Hinton et al. 2015; its factor T^2 goes into `soft_weight`);
    they get no gradient, and no position without a label counts. A label that is neither `ignore`
    nor a live column raises on the torch backend and makes the loss NaN on triton's, which does
    not wait for the device.

    x and weight are fp32, bf16 or fp16, of one type but under autocast, where the products run in
    autocast's type; softmax and sums are fp32. Gradients come in each input's type, cost nothing
    where none is wanted, and are deterministic; there is no second derivative. `chunk`, how many
    rows are computed at once, changes rounding only.
    """
    n, live = len(x), columns if columns is not None else len(weight)
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or labels.shape != (n,):
        raise ValueError(
            f"cross-entropy of x {tuple(x.shape)}, weight {tuple(weight.shape)}, labels "
            f"{tuple(labels.shape)}: wanted [N, D], [V, D] and [N]"
        )
    if labels.dtype != torch.int64 or temperature <= 0:
        raise ValueError(
            f"cross-entropy of labels in {labels.dtype} at temperature {temperature}: "
            "wanted int64 and a positive temperature"
        )
    if not 1 <= live <= len(weight):
        raise ValueError(f"cross-entropy over {live} columns of a table of {len(weight)}")
    if soft is not None and (soft.ndim != 2 or len(soft) != n or soft.shape[1] < live):
        raise ValueError(
            f"cross-entropy with soft targets {tuple(soft.shape)}: wanted [{n}, {live} or more]"
        )
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if not torch.is_autocast_enabled(kind) and x.dtype != weight.dtype:
        raise ValueError(f"cross-entropy of x in {x.dtype} and weight in {weight.dtype}")
    wanted = torch.is_grad_enabled()
    loss, nll, cross, correct, count, _, _ = cross_entropy_op(
        x,
        weight,
        labels,
        None if soft is None else soft.detach(),
        live,
        chunk or 0,
        ignore,
        z_loss,
        hard_weight,
        soft_weight,
        temperature,
        dtype,
        choose(backend, x.device, what="cross-entropy"),
        wanted and x.requires_grad,
        wanted and weight.requires_grad,
    )
    return CrossEntropy(loss, nll, cross, correct, count)
