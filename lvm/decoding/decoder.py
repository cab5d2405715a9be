"""The engine of generation: many rows, one code a step, a prompt's keys kept once.

N contexts (prompts; with guidance their bare forms behind them), R rows, C = R/N candidates of a
context, W width, H query heads, G key/value heads, D head channels, K codes, V vocabulary.

    prefill     contexts -> prefix store        one pass for all contexts of one length
    extend      images drawn before -> suffix   where the window has moved on (see `windows`)
    choose      logits -> codes                 on the device, one uniform number a code
    advance     last codes -> suffix, logits    attention over prefix and suffix; then choose

A step reads no tensor on the host and allocates nothing that outlives it: places, positions and
lengths are counted in device memory. On CUDA it is therefore captured once, as a CUDA graph, and
replayed for every code of a draw; that branch has not run on a GPU yet.

Weights that are small are copied once a draw: joined (queries with keys and values, gate with up)
and, in fp32, with the norm's weight taken in and in the order in memory that a CPU's product of a
few rows reads fastest. Large ones, where that gains nothing, are read where they are.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.decode import shared_prefix_attention
from lvm.decoding.cache import Fill, Store
from lvm.decoding.sampling import Sampling, pick
from lvm.model import Block, Transformer, rotary

PREFILL = 16_384  # positions of a pass, so that its activations stay small beside the caches
JOIN = 64 * 2**20  # bytes of the blocks' weights up to which they are copied


Matrices = Sequence[
    tuple[Tensor, Tensor | None]
]  # [out, in] and a bias [out], to be applied to one x


class Weights(NamedTuple):
    """The products of a block."""

    qkv: Matrices
    o: Matrices
    up: Matrices  # with the gate before it, if there is one
    down: Matrices


def weights_of(block: Block) -> Weights:
    """Return the block's own weights."""
    attn, mlp = block.attn, block.mlp
    gate = [] if mlp.gate is None else [mlp.gate]
    qkv, o, up, down = (
        [(x.weight, x.bias) for x in linears]
        for linears in ([attn.q, attn.k, attn.v], [attn.o], [*gate, mlp.up], [mlp.down])
    )
    return Weights(qkv, o, up, down)


def join(matrices: Matrices, before: nn.Module | None = None) -> Matrices:
    """Return one matrix in place of several, a copy; in fp32 its memory is [in, out].

    `before`, the RMSNorm of what it is applied to, gives its weight and the root of the width to
    the matrix: what remains of the norm is x / sqrt(Σx² + width·eps).
    """
    weight = torch.cat([weight for weight, _ in matrices])
    if isinstance(before, nn.RMSNorm):
        weight = weight * (before.weight * weight.shape[1] ** 0.5)
    biases = [bias for _, bias in matrices if bias is not None]
    if weight.dtype == torch.float32:  # products of 16-bit types read [out, in] as fast
        weight = weight.T.contiguous().T
    return [(weight, torch.cat(biases) if biases else None)]


def project(x: Tensor, matrices: Matrices) -> Tensor:
    """Return x [R, in] times all the matrices, one result beside the other."""
    parts = [F.linear(x, weight, bias) for weight, bias in matrices]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def passes(lengths: Sequence[int], positions: int) -> Iterator[tuple[int, list[int]]]:
    """Yield each length and the rows that have it, no more of them than a pass may compute."""
    most = max(1, PREFILL // max(1, positions))
    for length in sorted(set(lengths)):
        rows = [row for row, each in enumerate(lengths) if each == length]
        for i in range(0, len(rows), most):
            yield length, rows[i : i + most]


class Decoder:
    """Static state of one draw. Built under inference mode, as everything here is called."""

    def __init__(
        self,
        model: Transformer,
        *,
        contexts: int,
        candidates: int,
        places: tuple[int, int],
        u: Tensor,
        sampling: Sampling,
    ) -> None:
        """Allocate for `places` of a prefix and of a suffix; u fp32 [drawn rows, steps] is kept."""
        config, weight = model.config, model.head.weight
        assert model.reads is not None
        self.model, self.sampling, self.candidates = model, sampling, candidates
        self.codes_n = model.reads.codes
        rows = contexts * candidates
        device = weight.device
        self.prefix = Store(config, rows=contexts, places=places[0], like=weight)
        self.suffix = Store(config, rows=rows, places=places[1], like=weight)
        self.starts: list[int] = []  # what prefix_lengths holds
        self.prefix_lengths = torch.zeros(contexts, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        self.place = torch.zeros(1, dtype=torch.long, device=device)  # of the suffix, to be filled
        self.pos = torch.zeros(rows, dtype=torch.long, device=device)
        self.column = torch.zeros(1, dtype=torch.long, device=device)  # of u, to be drawn
        self.last = torch.zeros(rows, dtype=torch.long, device=device)
        self.u = u
        self.codes = torch.zeros(u.shape, dtype=torch.long, device=device)
        self.scores = torch.zeros(u.shape, dtype=torch.float32, device=device)
        self.blocks = [block for block in model.layers if isinstance(block, Block)]
        self.weights = [weights_of(block) for block in self.blocks]
        self.head: Matrices = [(model.head.weight, None)]
        self.norm_scale: Tensor | None = None
        whole = sum(p.numel() * p.element_size() for p in model.layers.parameters())
        if whole <= JOIN:
            folds = config.norm == "rms" and weight.dtype == torch.float32
            if folds:
                self.norm_scale = weight.new_tensor((config.width * config.norm_eps) ** 0.5)
            self.weights = [
                Weights(
                    join(qkv, block.attn_norm if folds else None),
                    join(o),
                    join(up, block.mlp_norm if folds else None),
                    join(down),
                )
                for block, (qkv, o, up, down) in zip(self.blocks, self.weights, strict=True)
            ]
            self.head = join(self.head, model.norm if folds else None)
        angles = rotary(
            torch.arange(sum(places), device=device)[None], dim=config.dim, theta=config.rope_theta
        )
        cos, sin = (x[0, 0] for x in angles)
        # Halves change places by a roll: y = x·[cos, cos] + roll(x)·[-sin, sin].
        self.cos, self.sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        self.graph: torch.cuda.CUDAGraph | None = None

    @property
    def cache_bytes(self) -> int:
        return self.prefix.bytes + self.suffix.bytes

    def prefill(self, contexts: Sequence[Tensor]) -> Tensor:
        """Fill the prefix with contexts of ids [t]; return features [N, W] behind each's last.

        Contexts of equal length share a pass, so that none is computed padded. Features of empty
        ones are zero.
        """
        self.starts = lengths = [len(ids) for ids in contexts]
        self.prefix_lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        out = self.cos.new_zeros(len(contexts), self.model.config.width, dtype=self.prefix.k.dtype)
        for length, rows in passes(lengths, max(lengths)):
            if length:
                ids = torch.stack([contexts[i] for i in rows])
                index = torch.tensor(rows, device=out.device)
                out[index] = self.model.features(ids, cache=Fill(self.prefix, index))[:, -1]
        return out

    def extend(self, codes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Fill the suffix with codes [R, t]; yield rows [n] and their features [n, t, W]."""
        lengths = [self.starts[r // self.candidates] for r in range(len(codes))]
        for start, rows in passes(lengths, codes.shape[1]):
            index = torch.tensor(rows, device=codes.device)
            fill = Fill(
                self.suffix,
                index,
                prefix=self.prefix,
                owners=index // self.candidates,
                start=start,
            )
            yield index, self.model.features(codes[index], cache=fill)

    def begin(self, contexts: Sequence[Tensor], own: Tensor, column: int) -> None:
        """Read contexts and codes [R, t] that follow them, and choose the codes of a column."""
        features = self.prefill(contexts).repeat_interleave(self.candidates, 0)
        if own.shape[1]:
            for rows, found in self.extend(own):
                features[rows] = found[:, -1]
        self.lengths.fill_(own.shape[1])
        self.place.fill_(own.shape[1])
        self.pos.copy_(self.prefix_lengths.repeat_interleave(self.candidates) + own.shape[1])
        self.column.fill_(column)
        self.choose(self.model.head(features))

    def choose(self, logits: Tensor) -> None:
        """Draw a code of each row from logits [R, V]; write it and its log-likelihood down."""
        logits = logits.float()
        if len(logits) > len(self.codes):
            logits, bare = logits.chunk(2)
            choice = torch.lerp(
                bare[:, : self.codes_n], logits[:, : self.codes_n], self.sampling.guidance
            )
        else:
            choice = logits[:, : self.codes_n]
        chosen = pick(choice, self.u.index_select(1, self.column), self.sampling)
        score = logits.log_softmax(-1).gather(-1, chosen)
        self.codes.index_copy_(1, self.column, chosen)
        self.scores.index_copy_(1, self.column, score)
        self.last.view(-1, len(chosen)).copy_(chosen[:, 0])
        self.column.add_(1)

    def advance(self) -> None:
        """Read the last codes and choose the next ones."""
        if self.last.device.type == "cuda":
            self.graph = self.graph or self.capture()
            self.graph.replay()
        else:
            self.step()

    def step(self) -> None:
        model = self.model
        self.lengths.add_(1)
        x = model.embed(self.last)
        angles = [x.index_select(0, self.pos)[:, None] for x in (self.cos, self.sin)]
        for layer, block in enumerate(self.blocks):
            x = self.block(block, layer, x, angles)
        self.place.add_(1)
        self.pos.add_(1)
        self.choose(project(self.norm(x, model.norm), self.head))

    def norm(self, x: Tensor, module: nn.Module) -> Tensor:
        """Norm x [R, W]; without the module's weight where the next matrix has it."""
        if self.norm_scale is None:
            return module(x)
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.norm_scale)

    def block(self, block: Block, layer: int, x: Tensor, angles: Sequence[Tensor]) -> Tensor:
        """Run a block on one position a row, x [R, W]; as `Block.forward`."""
        attn, weights, config = block.attn, self.weights[layer], self.model.config
        heads, both = config.heads, config.heads + config.groups
        y = project(self.norm(x, block.attn_norm), weights.qkv).unflatten(-1, (-1, config.dim))
        turned, v = y[:, :both], y[:, both:]
        if attn.q_norm is not None and attn.k_norm is not None:
            turned = torch.cat([attn.q_norm(y[:, :heads]), attn.k_norm(y[:, heads:both])], 1)
        if config.rotary:
            turned, (cos, sin) = turned.float(), angles
            turned = torch.addcmul(turned * cos, turned.roll(config.dim // 2, -1), sin).to(v.dtype)
        k_store, v_store = self.suffix.k[layer], self.suffix.v[layer]
        k_store.index_copy_(2, self.place, turned[:, heads:, None])
        v_store.index_copy_(2, self.place, v[:, :, None])
        out = shared_prefix_attention(
            turned[:, :heads],
            self.prefix.k[layer],
            self.prefix.v[layer],
            self.prefix_lengths,
            k_store,
            v_store,
            self.lengths,
        )
        x = x + project(out.flatten(1), weights.o)
        y = project(self.norm(x, block.mlp_norm), weights.up)
        if block.mlp.gate is None:
            return x + project(F.gelu(y), weights.down)
        gate, up = y.chunk(2, -1)
        return x + project(F.silu(gate) * up, weights.down)

    def capture(self) -> torch.cuda.CUDAGraph:
        """Record a step. It runs before, to compile and warm up, and what it counts is put back."""
        counted = (self.lengths, self.place, self.pos, self.column, self.last)
        kept = [x.clone() for x in counted]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.step()  # writes a place and a column that the next step writes again
                for x, before in zip(counted, kept, strict=True):
                    x.copy_(before)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph
