"""Bytes of one device at the moments when a training step holds most.

D width, F hidden width, L layers, H query and G key heads of C channels, V rows of the tables,
P weights of one block, N tokens of a micro-batch; e bytes of the compute type, r of the residual
stream: r = e where FSDP casts (several ranks), r = 4 under autocast (one process).

A block keeps for its backward pass, bytes a token:

    none       two norms' inputs 2·r·D + 8, their outputs 2·e·D, q, k, v and attention's result
               2·e·(H + G)·C, its log-sums 4·H, and gate, up, silu(gate) and the product 4·e·F;
               QK-norm: also its inputs e·(H + G)·C and 4·(H + G)
    selective  its input r·D and what `lvm.parallel.KEPT` lists: attention, and seven products,
               e·(2·D + (H + 2·G)·C + 2·F) + e·H·C + 4·H
    full       its input r·D

What differs from that. Eager on a CPU: norms keep input and normalised input in fp32, 8 in place of
r or e. On a CPU: attention keeps q, k, v and its result in fp32, and a copy of that in e. On a GPU:
heads of no multiple of 16 channels are padded copies. Eager under autocast: a cast copy for each
product that reads a norm, 3 + 2 in place of 2, and QK-norm's inputs in fp32. Compiled: not
silu(gate), which is computed again, nor the last product of selective.

    end of the forward pass    what L blocks keep, last norm, gradient of the features, one table of
                               logits, gradient of the head in fp32; the root's gathered weights
    backward pass, last block  what L blocks keep, one block recomputed, the residual's gradient
                               r·D, two gradients of width F; gathered: the root, this block and the
                               next; the head's gradient, which waits for the embedding's
    second last block          the same without what the last block kept; that one's gradients, in
                               fp32, on their way to the other ranks

A device always holds fp32 weights, gradients and optimiser state of its shard besides.

Tests hold it to allocations counted on a CPU, and what the operator of a GPU's attention keeps to
its shapes (tests/lvm/test_plan.py). That a GPU's norms keep their inputs alone is assumed;
nothing has been measured on a GPU.
"""

from dataclasses import dataclass

import torch

from kernels.attention import GRAIN
from kernels.cross_entropy import rows_of_chunk
from lvm.config import Run
from lvm.planning.cards import Card
from lvm.planning.units import Units

MOST_ROWS = 4096
"""No plan looks for a larger micro-batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What decides how many bytes a step holds, besides the rows computed at once."""

    run: Run
    """Its model, optimiser, precision, recompute and compile are read."""
    card: Card
    gpus: int
    shards: int
    """GPUs that hold one copy of the model."""
    row_len: int
    reserve: float
    """Bytes of the card that are left to driver, communication and fragmentation."""

    @property
    def sharded(self) -> bool:
        return self.gpus > 1

    @property
    def element(self) -> int:
        """Bytes of the compute type."""
        return 2 if self.run.precision == "bf16" else 4

    @property
    def residual(self) -> int:
        """Bytes of an entry of the residual stream."""
        return self.element if self.sharded else 4

    @property
    def autocast(self) -> bool:
        return not self.sharded and self.element == 2


def kept(setting: Setting, mode: str) -> float:
    """Return the bytes a token that a block keeps under a mode of recomputation."""
    config, cpu = setting.run.model, setting.card.kind == "cpu"
    e, r, d = setting.element, setting.residual, config.width
    if mode == "full":
        return r * d
    heads = (config.heads + config.groups) * config.dim
    # Our kernels read heads of a multiple of 16 channels, from padded copies where they are not.
    padded = not cpu and config.dim % GRAIN > 0
    dim = -(-config.dim // GRAIN) * GRAIN if padded else config.dim
    a = 4 if cpu else e
    logs = 4 * config.heads
    result = a * config.heads * dim
    if mode == "selective":
        products = d if setting.run.compile else 2 * d  # eager keeps the last one, unread, as well
        raw = (config.heads + 2 * config.groups) * config.dim
        return r * d + e * (products + raw + 2 * config.ffn) + result + logs
    copy = e * config.heads * config.dim if cpu or padded else 0
    attention = a * (config.heads + 2 * config.groups) * dim + result + logs + copy
    fp32_norms = cpu and not setting.run.compile
    each = 8 if fp32_norms else 4 if setting.autocast and not setting.run.compile else e
    qk = each * heads + 4 * (config.heads + config.groups)
    attention += qk if config.qk_norm else 0
    if setting.run.compile:  # under autocast the second norm's input is summed again
        norms = r * d + (e if setting.autocast else r) * d + 8
        return norms + 2 * e * d + attention + 3 * e * config.ffn
    norms = 2 * ((8 if fp32_norms else r) * d + 4)
    casts = 5 if setting.autocast else 2
    return norms + casts * e * d + attention + 4 * e * config.ffn


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one device, by part, at its fullest moment."""

    weights: float
    """fp32, this rank's shard."""
    optimiser: float
    gradients: float
    """fp32, this rank's shard."""
    gathered: float
    """Weights in the compute type: FSDP's gathered units, or autocast's copies."""
    reducing: float
    """Gradients of whole units that are not summed over ranks yet."""
    kept: float
    """What all blocks keep for the backward pass."""
    working: float
    """One block's backward pass, or the loss at the end of the forward pass."""
    reserve: float
    moment: str

    @property
    def total(self) -> float:
        parts = (self.weights, self.optimiser, self.gradients, self.gathered, self.reducing)
        return sum(parts) + self.kept + self.working + self.reserve


def memory(setting: Setting, units: Units, rows: int) -> Memory:
    """Return what a device holds when it computes `rows` rows at once."""
    run, config = setting.run, setting.run.model
    e, r, d = setting.element, setting.residual, config.width
    tokens = rows * setting.row_len
    states = 8.0 * units.local
    if run.optim.name == "muon":  # momentum alone for the blocks' matrices
        states -= 4 * units.local_matrices
    table_rows = min(rows_of_chunk(config.vocab_size, torch.device(setting.card.kind)), tokens)
    head = config.vocab_size * d
    angles = 4 * config.dim + 8
    last_norm = (8 if setting.card.kind == "cpu" else r) * d + 4
    loss = 1.0 * tokens * (angles + last_norm + e * d)
    loss += table_rows * config.vocab_size * e + 4 * head
    block = kept(setting, run.recompute)
    backward = 1.0 * tokens * (angles + r * d + 2 * e * config.ffn)
    if run.recompute != "none":
        backward += tokens * (kept(setting, "none") - block)
        backward += tokens * e * d if run.recompute == "selective" else 0
    blocks = tokens * block * config.layers
    if setting.sharded:
        root, waiting = float(units.root * e), float(head * e)
        two = root + 2 * units.block * e
        sent = waiting + 4 * units.block * (1 + 1 / setting.shards)
        moments = {
            "end of the forward pass": (root, 0.0, blocks, loss),
            "last block's backward pass": (two, waiting, blocks, backward),
            "second last block's backward pass": (two, sent, blocks - tokens * block, backward),
        }
    else:
        # Recomputed blocks cast their weights anew; otherwise the blocks keep the casts.
        casts = units.matrices * e if setting.autocast else 0.0
        again = casts if run.recompute == "none" else casts / config.layers
        loss += head * e if setting.autocast else 0.0
        moments = {
            "end of the forward pass": (casts, 0.0, blocks, loss),
            "last block's backward pass": (again, 0.0, blocks, backward),
        }
    moment = max(moments, key=lambda name: sum(moments[name]))
    gathered, reducing, blocks, working = moments[moment]
    return Memory(
        weights=4 * units.local,
        optimiser=states,
        gradients=4 * units.local,
        gathered=gathered,
        reducing=reducing,
        kept=blocks,
        working=working,
        reserve=setting.reserve,
        moment=moment,
    )


def largest(setting: Setting, units: Units) -> int:
    """Return the most rows that fit at once; 0 where not even one does."""
    low, high = 0, MOST_ROWS + 1  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        if memory(setting, units, middle).total <= setting.card.memory:
            low = middle
        else:
            high = middle
    return low
