"""The trunk: a LLaMA-style decoder over visual sentences, single-device, parallelised from outside.

B batch, T positions, S cached keys, D width, H query heads, G key/value heads, C head channels,
V vocabulary. Pre-norm RMSNorm, rotary positions (angles always fp32), SwiGLU, no biases, untied
head: the architecture of LLaMA (Touvron et al. 2023), as LVM trains it; of Qwen3 with `qk_norm`.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import attention, resolve
from kernels.mask import Mask
from kernels.rope import rope
from lvm.config import ModelConfig, Reads


def rotary(pos: Tensor, *, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin, fp32 [B, 1, T, dim/2], of the rotary angles of positions [B, T].

    Angles in a 16-bit type are wrong by radians at position 1000; they are computed in fp32 here
    whatever the model's type is.
    """
    freq = theta ** -(torch.arange(0, dim, 2, device=pos.device, dtype=torch.float32) / dim)
    angles = pos.float()[:, None, :, None] * freq
    return angles.cos(), angles.sin()


class Cache:
    """Keys and values of all layers for generation: fixed storage, filled from the left."""

    def __init__(
        self, config: ModelConfig, *, rows: int, length: int, like: Tensor | None = None
    ) -> None:
        dtype, device = (like.dtype, like.device) if like is not None else (None, None)
        shape = (config.layers, rows, config.groups, length, config.dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0  # positions that are filled, the same for every row

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, G, T, C] behind what is there; return all of the layer as views."""
        end = self.length + k.shape[2]
        if end > self.k.shape[3]:
            raise ValueError(f"the cache holds {self.k.shape[3]} positions; {end} are needed")
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def expand(self, rows: int) -> "Cache":
        """Return a copy with each of the cache's rows repeated for `rows` candidates."""
        out = object.__new__(Cache)
        out.k = self.k.repeat_interleave(rows, dim=1)
        out.v = self.v.repeat_interleave(rows, dim=1)
        out.length = self.length
        return out


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dim = config.dim
        self.q = nn.Linear(config.width, config.heads * config.dim, bias=False)
        self.k = nn.Linear(config.width, config.groups * config.dim, bias=False)
        self.v = nn.Linear(config.width, config.groups * config.dim, bias=False)
        self.o = nn.Linear(config.heads * config.dim, config.width, bias=False)
        # QK-norm, one weight a channel for all heads (Dehghani et al. 2023; as in Qwen3).
        self.q_norm = nn.RMSNorm(config.dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.dim, eps=config.norm_eps) if config.qk_norm else None
        self.eps = config.norm_eps

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Mask,
        *,
        cache: Cache | None,
        layer: int,
    ) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (-1, self.dim)).transpose(1, 2)
            for y in (self.q(x), self.k(x), self.v(x))
        )
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
        self.gate = nn.Linear(config.width, config.ffn, bias=False)
        self.up = nn.Linear(config.width, config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Mask,
        *,
        cache: Cache | None = None,
        layer: int = 0,
    ) -> Tensor:
        h = self.attn_norm(x)
        x = x + self.attn(h, angles, mask, cache=cache, layer=layer)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """The language model of codes. `reads` says what rows it was trained on, if that is known."""

    def __init__(self, config: ModelConfig, *, reads: Reads | None = None) -> None:
        super().__init__()
        self.config, self.reads = config, reads
        # Given its weight, nn.Embedding draws none; on the meta device a draw costs two seconds.
        table = torch.zeros(config.vocab_size, config.width)
        self.embed = nn.Embedding(config.vocab_size, config.width, _weight=table)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter with what `draw_weights` draws for it."""
        for parameter, values in self.draw_weights(seed):
            parameter.copy_(values)

    def draw_weights(self, seed: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield each parameter and its first values on the CPU: the same on any device and rank.

        Norms are 1, matrices drawn from N(0, init_std²), each from a generator of its own. QK-norm
        changes the draw of no other tensor: its weights are not counted.
        """
        index = -1
        for name, parameter in self.named_parameters():
            index += not name.endswith(("q_norm.weight", "k_norm.weight"))
            if name.endswith("norm.weight"):
                yield parameter, torch.ones(parameter.shape)
                continue
            generator = torch.Generator().manual_seed(seed * 100_003 + index)
            noise = torch.randn(parameter.shape, generator=generator)
            yield parameter, noise * self.config.init_std

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
        angles = rotary(pos, dim=self.config.dim, theta=self.config.rope_theta)
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
