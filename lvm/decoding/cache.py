"""Keys and values of generation: fixed storage, and what a forward pass reads and leaves there.

L layers, N rows, G key/value heads, S places, C head channels. Two stores hold a draw of R
candidates after B prompts, in place of R copies of a prompt:

    prefix   [L, B, G, P, C]   the prompts, filled once, each from place 0 to its own length
    suffix   [L, R, G, S, C]   what each candidate has drawn since

A store is written by a forward pass through a `Fill` (`Transformer.features`), or a place at a time
by `lvm.decoding.decoder`.
"""

import torch
from torch import Tensor

from lvm.config import ModelConfig


class Store:
    """Storage of all layers, k and v [L, N, G, S, C]; places that nothing filled hold anything."""

    def __init__(self, config: ModelConfig, *, rows: int, places: int, like: Tensor) -> None:
        shape = (config.layers, rows, config.groups, places, config.dim)
        self.k, self.v = like.new_empty(shape), like.new_empty(shape)

    def at(self, layer: int, rows: Tensor, places: slice) -> tuple[Tensor, Tensor]:
        """Return copies of keys and values [n, G, T, C] of some rows [n]."""
        return self.k[layer, rows, :, places], self.v[layer, rows, :, places]

    @property
    def bytes(self) -> int:
        return 2 * self.k.numel() * self.k.element_size()


class Fill:
    """One pass's rows of a store, filled from the left; the `cache` of `Transformer.features`.

    `rows` int64 [n] are the store's rows that the pass computes. With `prefix` they go on from the
    first `start` places of its rows `owners` int64 [n], which are read and not copied into the
    store. `length` counts both.
    """

    def __init__(
        self,
        store: Store,
        rows: Tensor,
        *,
        prefix: Store | None = None,
        owners: Tensor | None = None,
        start: int = 0,
    ) -> None:
        self.store, self.rows = store, rows
        self.prefix, self.owners, self.start = prefix, owners, start
        self.length = start

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [n, G, T, C] of a layer behind what is there; return all that a row reads."""
        begin = self.length - self.start
        end = begin + k.shape[2]
        if end > self.store.k.shape[3]:
            raise ValueError(f"the cache holds {self.store.k.shape[3]} places; {end} are needed")
        self.store.k[layer, self.rows, :, begin:end] = k
        self.store.v[layer, self.rows, :, begin:end] = v
        parts = [(k, v)]
        if begin:
            parts.insert(0, self.store.at(layer, self.rows, slice(begin)))
        if self.prefix is not None and self.owners is not None and self.start:
            parts.insert(0, self.prefix.at(layer, self.owners, slice(self.start)))
        if len(parts) == 1:
            return k, v
        keys, values = zip(*parts, strict=True)
        return torch.cat(keys, 2), torch.cat(values, 2)
