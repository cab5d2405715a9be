"""The trunk: a LLaMA-style decoder over visual sentences, single-device, parallelised from outside.

B batch, T positions, S cached keys, D width, H query heads, G key/value heads, C head channels,
V vocabulary. Pre-norm RMSNorm, rotary positions (angles always fp32), SwiGLU, no biases, untied
head: the architecture of LLaMA (Touvron et al. 2023), as LVM trains it; of Qwen3 with `qk_norm`;
of DeLVM with `attn_bias` and a codebook. AIM's trunk (`lvm.vision`) is of the same blocks.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import attention, resolve
from kernels.mask import Mask
from kernels.rope import rope
from lvm.config import ModelConfig, Reads
from lvm.init import draw_weights


def rotary(pos: Tensor, *, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin, fp32 [B, 1, T, dim/2], of the rotary angles of positions [B, T].

    Angles in a 16-bit type are wrong by radians at position 1000; they are computed in fp32 here
    whatever the model's type is.
    """
    freq = theta ** -(torch.arange(0, dim, 2, device=pos.device, dtype=torch.float32) / dim)
    angles = pos.float()[:, None, :, None] * freq
    return angles.cos(), angles.sin()


Angles = tuple[Tensor, Tensor] | None  # cos and sin; None where positions are not rotary


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    """Return the norm of a residual stream of so many channels."""
    if config.norm == "layer":
        return nn.LayerNorm(width, eps=config.norm_eps)
    return nn.RMSNorm(width, eps=config.norm_eps)


class Cache(Protocol):
    """What `features` keeps keys and values in: `lvm.decoding.cache.Fill`."""

    length: int  # positions that are filled, the same for every row

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, G, T, C] behind what is there; return all of the layer."""
        ...


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dim, bias = config.dim, config.attn_bias
        self.q = nn.Linear(config.width, config.heads * config.dim, bias=bias)
        self.k = nn.Linear(config.width, config.groups * config.dim, bias=bias)
        self.v = nn.Linear(config.width, config.groups * config.dim, bias=bias)
        self.o = nn.Linear(config.heads * config.dim, config.width, bias=bias)
        # QK-norm, one weight a channel for all heads (Dehghani et al. 2023; as in Qwen3).
        self.q_norm = nn.RMSNorm(config.dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.dim, eps=config.norm_eps) if config.qk_norm else None
        self.eps = config.norm_eps

    def forward(
        self,
        x: Tensor,
        angles: Angles,
        mask: Mask,
        *,
        cache: Cache | None,
        layer: int,
    ) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (-1, self.dim)).transpose(1, 2)
            for y in (self.q(x), self.k(x), self.v(x))
        )
        if angles is not None:
            # Weights in the type of the heads, as FSDP casts them. CUDA's autocast norms in fp32
            # anyway, while attention and the cache want q and k in the type of v.
            q_weight = self.q_norm.weight.to(q.dtype) if self.q_norm is not None else None
            k_weight = self.k_norm.weight.to(k.dtype) if self.k_norm is not None else None
            q, k = rope(q, k, *angles, q_weight=q_weight, k_weight=k_weight, eps=self.eps)
            q, k = q.to(v.dtype), k.to(v.dtype)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        y = attention(q, k, v, mask)
        return self.o(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        gated = config.mlp == "swiglu"
        self.gate = nn.Linear(config.width, config.ffn, bias=False) if gated else None
        self.up = nn.Linear(config.width, config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(F.gelu(self.up(x)))
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn_norm = make_norm(config, config.width)
        self.attn = Attention(config)
        self.mlp_norm = make_norm(config, config.width)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        angles: Angles,
        mask: Mask,
        *,
        cache: Cache | None = None,
        layer: int = 0,
    ) -> Tensor:
        h = self.attn_norm(x)
        x = x + self.attn(h, angles, mask, cache=cache, layer=layer)
        return x + self.mlp(self.mlp_norm(x))


class CodebookEmbedding(nn.Module):
    """A frozen codebook [V, E], projected to the width (DeLVM); ids past V are padding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        codebook = torch.zeros(config.vocab_size, config.codebook_dim)
        self.codebook = nn.Parameter(codebook, requires_grad=False)
        self.proj = nn.Linear(config.codebook_dim, config.width, bias=False)

    @property
    def weight(self) -> Tensor:
        """The table [V, D] that this embedding stands for."""
        return self.codebook @ self.proj.weight.T

    def forward(self, ids: Tensor) -> Tensor:
        return self.proj(F.embedding(ids.clamp_max(len(self.codebook) - 1), self.codebook))


class Transformer(nn.Module):
    """The language model of codes. `reads` says what rows it was trained on, if that is known."""

    def __init__(self, config: ModelConfig, *, reads: Reads | None = None) -> None:
        super().__init__()
        self.config, self.reads = config, reads
        # Given its weight, nn.Embedding draws none; on the meta device a draw costs two seconds.
        self.embed: nn.Embedding | CodebookEmbedding
        if config.codebook_dim:
            self.embed = CodebookEmbedding(config)
        else:
            table = torch.zeros(config.vocab_size, config.width)
            self.embed = nn.Embedding(config.vocab_size, config.width, _weight=table)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = make_norm(config, config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter with what `draw_weights` draws for it."""
        for parameter, values in self.draw_weights(seed):
            parameter.copy_(values)

    def draw_weights(self, seed: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield each parameter and its first values on the CPU: see `lvm.init`."""
        return draw_weights(self, self.config, seed=seed)

    def features(
        self,
        ids: Tensor,
        *,
        pos: Tensor | None = None,
        mask: Mask | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return the normalised residual stream [B, T, D] of ids [B, T].

        Without `mask` and `pos` the rows are single causal documents. With a cache the ids continue
        what it holds, and its length moves on.
        """
        start = cache.length if cache is not None else 0
        steps = ids.shape[1]
        if pos is None:
            pos = torch.arange(start, start + steps, device=ids.device).expand_as(ids)
        if mask is None:
            if start == 0:
                mask = Mask(causal=True)
            elif steps == 1:
                mask = Mask.full()
            else:
                hi = torch.arange(
                    start + 1, start + steps + 1, device=ids.device, dtype=torch.int32
                )
                hi = hi.expand_as(ids)
                mask = Mask.interval(torch.zeros_like(hi), hi)
            mask = resolve(mask, queries=steps, keys=start + steps, device=ids.device)
        config = self.config
        angles = rotary(pos, dim=config.dim, theta=config.rope_theta) if config.rotary else None
        x = self.embed(ids)
        for i, block in enumerate(self.layers):
            x = block(x, angles, mask, cache=cache, layer=i)
        if cache is not None:
            cache.length += steps
        return self.norm(x)

    def forward(
        self,
        ids: Tensor,
        *,
        pos: Tensor | None = None,
        mask: Mask | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return logits [B, T, V] of ids [B, T]; arguments as in `features`."""
        return self.head(self.features(ids, pos=pos, mask=mask, cache=cache))


def build(config: ModelConfig, *, seed: int, reads: Reads | None = None) -> Transformer:
    """Make a model with drawn weights on the CPU; torch's own initialisation is skipped."""
    with torch.device("meta"):
        model = Transformer(config, reads=reads)
    model = model.to_empty(device="cpu")
    model.init_weights(seed)
    return model


def on_meta(config: ModelConfig) -> Transformer:
    """Make the model without memory, to count and to plan."""
    with torch.device("meta"):
        return Transformer(config)
