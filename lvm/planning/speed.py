"""Time of a training step by arithmetic: what computes, what is sent, what hides behind what.

Computation of a row of T tokens, on one device (docs/planning.md says where the shares are from):

    products     6 FLOPs a weight of the blocks' matrices and the head, at a share of the peak
    attention    4·H·C·T²/2 a layer forward and 2.5 times that backward, at shares of their own; one
                 document a row, the most work there is
    elementwise  norms 16·e·D, rotations 4·e·(H + G)·C, SwiGLU 9·e·F a token and layer, forward and
                 backward, at a share of the memory's bandwidth; more where nothing is fused
    recompute    full: the forward pass of the blocks again; selective: its elementwise part
    optimiser    once a step: AdamW reads and writes 28 bytes a weight that this rank holds, taken
                 for Muon too; Muon's products, those of the rank that owns most

Communication of a micro-batch among the S shards of a copy, each FSDP unit by itself: weights are
gathered in the compute type before the forward and again before the backward pass (the root's stay
from the one to the other), gradients are reduced and scattered in fp32. Once a step, W/S copies sum
their fp32 shards, and Muon's matrices go to their owners and back (lvm.muon), as if nothing hid it.
"""

from dataclasses import dataclass, replace

from lvm.planning.cards import Card
from lvm.planning.memory import Setting
from lvm.planning.muon import Load, muon_load
from lvm.planning.units import Units

NODE = 8
"""Cards of a node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """How fast cards speak. Assumptions, all of them; none was measured by us."""

    bandwidth: float
    """Bytes a second a card to other nodes, one direction."""
    share: float = 0.8
    """Of nominal bandwidth that a collective reaches, within a node and between nodes."""
    hop: float = 1e-6
    """Seconds from card to card of a node, of which a ring has S − 1."""
    far_hop: float = 5e-6
    """Seconds from node to node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Shares of a card's nominal rates that kernels reach: assumptions, not results."""

    name: str
    products: float
    attention_forward: float
    attention_backward: float
    elementwise: float
    """Times the bytes of fully fused code."""
    memory: float = 4.3 / 4.8
    """Of the memory's bandwidth."""


RATES = (
    # Products at 93 and 90 % of the 790 TFLOP/s that large bf16 products reach of a nominal 989;
    # attention at the published 667 and 444 TFLOP/s of FlashAttention-3, and at 450 and 300.
    Rates(
        name="best",
        products=0.93 * 790 / 989,
        attention_forward=667 / 989,
        attention_backward=444 / 989,
        elementwise=1.0,
    ),
    Rates(
        name="plain",
        products=0.90 * 790 / 989,
        attention_forward=450 / 989,
        attention_backward=300 / 989,
        elementwise=2.5,
    ),
)
"""Compiled with fast attention, and eager with slower kernels. Of an H100 or H200, and taken for
the other cards too, where nobody has checked them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes that a card receives."""

    gather_forward: float
    """A micro-batch."""
    gather_backward: float
    """A micro-batch."""
    reduce_scatter: float
    """A micro-batch."""
    all_reduce: float
    """A step, between copies of the model."""
    optimiser: float
    """A step: Muon's matrices, of the card that receives most of them."""

    def step(self, micro_batches: int) -> float:
        once = self.gather_forward + self.gather_backward + self.reduce_scatter
        return micro_batches * once + self.all_reduce + self.optimiser


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One update, in seconds, and what follows from it."""

    rates: str
    forward: float
    """Computation of all micro-batches."""
    backward: float
    exposed: float
    """Communication that computation does not hide."""
    communication: float
    """All of it, hidden or not."""
    optimiser: float
    seconds: float
    tokens_per_s: float
    """Of all cards."""
    mfu: float
    """Causal half of attention counted, as metrics.jsonl has it."""
    mfu_full: float


def traffic(setting: Setting, units: Units) -> Traffic:
    """Return what a card receives; nothing on one card."""
    e, s, layers = setting.element, setting.shards, setting.run.model.layers
    others = (s - 1) / s
    blocks, weights = layers * units.block, layers * units.block + units.root
    copies = setting.gpus // s
    muon = muon_of(setting)
    return Traffic(
        gather_forward=others * e * weights,
        gather_backward=others * e * blocks,
        reduce_scatter=others * 4 * weights,
        all_reduce=2 * (copies - 1) / copies * 4 * units.local,
        optimiser=float(muon.exchanged + muon.gathered) if muon else 0.0,
    )


def ring(bytes_: float, cards: int, *, card: Card, network: Network) -> float:
    """Return the seconds of a collective in which each of `cards` receives `bytes_`.

    Within a node over NVLink; beyond, rings go through every card's own link to the network, and
    the slower of the two bounds them: `NODE` links serve one node's share of the traffic.
    """
    if cards == 1:
        return 0.0
    nodes = -(-cards // NODE)
    rate = card.nvlink if nodes == 1 else min(card.nvlink, NODE * network.bandwidth)
    near = cards - nodes
    return bytes_ / (rate * network.share) + near * network.hop + (nodes - 1) * network.far_hop


def muon_of(setting: Setting) -> Load | None:
    """Return what Muon does in an update, None where it is not used."""
    if setting.run.optim.name != "muon":
        return None
    copies = setting.gpus // setting.shards
    return muon_load(setting.run.model, shards=setting.shards, copies=copies)


def muon_seconds(load: Load, setting: Setting, *, rates: Rates, net: Network) -> float:
    """Return the time of Muon's products and messages, as if neither hid the other.

    What a rank receives in an exchange is its own, and comes over its own link.
    """
    card, s, copies = setting.card, setting.shards, setting.gpus // setting.shards

    def link(near: bool) -> float:
        return net.share * (card.nvlink if near else min(card.nvlink, net.bandwidth))

    seconds = load.products / (rates.products * card.peak)
    if s > 1:
        seconds += load.exchanged / link(s <= NODE)
        seconds += 2 * load.rounds * ring(0.0, s, card=card, network=net)
    if copies > 1:
        near = setting.gpus <= NODE
        seconds += load.gathered / link(near)
        seconds += load.rounds * (copies - 1) * (net.hop if near else net.far_hop)
    return seconds


def step(
    setting: Setting, units: Units, *, micro_rows: int, batch_rows: int, rates: Rates, net: Network
) -> Step:
    """Return the expected time of one update of `batch_rows` rows over all cards.

    Within a forward or backward pass communication hides behind computation but for the first
    unit's gathering and the last unit's reduction; the all-reduce between copies, which the last
    micro-batch's backward pass carries, hides behind that pass as far as it has room.
    """
    card, config, t = setting.card, setting.run.model, setting.row_len
    e, layers = setting.element, config.layers
    micros = batch_rows // (setting.gpus * micro_rows)
    rows = micros * micro_rows
    head = config.vocab_size * config.width
    third = 2.0 * t * rows / (rates.products * card.peak)  # of a weight, forward
    pairs = 4.0 * config.heads * config.dim * t * t / 2 * layers * rows
    attention = pairs / (rates.attention_forward * card.peak)
    attention_back = 2.5 * pairs / (rates.attention_backward * card.peak)
    bandwidth = rates.memory * card.bandwidth
    turned = 2 * (config.heads + config.groups) * config.dim
    e_forward = 8 * config.width + turned + 3 * config.ffn
    e_backward = 8 * config.width + turned + 6 * config.ffn
    each = rates.elementwise * e * layers * t * rows / bandwidth
    forward = third * (units.matrices + head) + attention + each * e_forward
    backward = 2 * third * (units.matrices + head) + attention_back + each * e_backward
    if setting.run.recompute == "full":
        backward += forward - third * head
    elif setting.run.recompute == "selective":
        backward += each * e_forward
    optimiser = 28 * units.local / bandwidth
    sent = traffic(setting, units)
    if (load := muon_of(setting)) is not None:
        optimiser += muon_seconds(load, setting, rates=rates, net=net)
    gather, first, back, last, between = _times(setting, units, sent, net)
    room = backward / micros - (back - last)  # behind the last micro-batch's backward pass
    exposed = micros * (
        first
        + max(0.0, gather - first - forward / micros)
        + last
        + max(0.0, back - last - backward / micros)
    ) + max(0.0, between - max(0.0, room))
    total = forward + backward + exposed + optimiser
    speed = batch_rows * t / total
    per_card = speed / (setting.gpus * card.peak)
    return Step(
        rates=rates.name,
        forward=forward,
        backward=backward,
        exposed=exposed,
        communication=micros * (gather + back) + between,
        optimiser=optimiser,
        seconds=total,
        tokens_per_s=speed,
        mfu=per_card * config.flops_per_token(t),
        mfu_full=per_card * config.flops_per_token(t, causal=False),
    )


def _times(
    setting: Setting, units: Units, sent: Traffic, net: Network
) -> tuple[float, float, float, float, float]:
    """Return the seconds of a micro-batch's gathering before the forward pass and of the root's in
    it, of its traffic in the backward pass and of the root's in it, of a step's all-reduce."""
    s, layers, card = setting.shards, setting.run.model.layers, setting.card

    def of(bytes_: float, calls: int) -> float:
        return calls * ring(bytes_ / calls, s, card=card, network=net)

    others = (s - 1) / s
    first = of(others * setting.element * units.root, 1)
    last = of(others * 4 * units.root, 1)
    blocks = layers * units.block * others
    copies = setting.gpus // s
    between = 0.0
    if copies > 1:  # ranks of one number in each copy, each over its own link if nodes differ
        near = setting.gpus <= NODE
        rate = card.nvlink if near else min(card.nvlink, net.bandwidth)
        hops = 2 * (copies - 1) * (net.hop if near else net.far_hop) * (layers + 1)
        between = sent.all_reduce / (rate * net.share) + hops
    return (
        of(setting.element * blocks, layers) + first,
        first,
        of((setting.element + 4) * blocks, 2 * layers) + last,
        last,
        between,
    )


def at(setting: Setting, *, gpus: int, shards: int) -> Setting:
    """Return the same run on other numbers of cards."""
    return replace(setting, gpus=gpus, shards=shards)
