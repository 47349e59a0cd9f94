"""What a model remembers: keys, values and positions per layer, and the statistics that policies read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

WINDOW = 64
"""Queries kept per layer: any attention window of up to this many last queries can be recomputed."""


@dataclass(frozen=True)
class LayerCache:
    """One layer's memory of one sequence. Survivors of a compression keep all they had.

    H query heads in Hkv groups, n entries per KV head in rising order of position, d channels.
    """

    keys: Tensor
    """[Hkv, n, d], rotated to the entries' true positions"""
    values: Tensor
    """[Hkv, n, d]"""
    positions: Tensor
    """[Hkv, n] int64, the place of each entry in the text"""
    attn_sum: Tensor
    """[Hkv, n] fp32, attention received from every query so far, mean over the group's query heads"""
    recent_queries: Tensor
    """[H, w, d] rotated, the last w <= WINDOW queries"""
    scale: float
    """factor of query-key products before the softmax"""

    @property
    def n(self) -> int:
        return self.keys.shape[1]

    def select(self, index: Tensor) -> LayerCache:
        """Keep the entries ``index`` [Hkv, K], rising in each row."""
        wide = index.unsqueeze(-1).expand(-1, -1, self.keys.shape[-1])
        return replace(
            self,
            keys=self.keys.gather(1, wide),
            values=self.values.gather(1, wide),
            positions=self.positions.gather(1, index),
            attn_sum=self.attn_sum.gather(1, index),
        )

    def first(self, n: int) -> LayerCache:
        """The first ``n`` entries, as views."""
        return replace(
            self,
            keys=self.keys[:, :n],
            values=self.values[:, :n],
            positions=self.positions[:, :n],
            attn_sum=self.attn_sum[:, :n],
        )


@dataclass(frozen=True)
class CacheState:
    """A sequence as the model remembers it.

    Immutable: `extend` and `compress` return new states, which may share memory with the old one.
    """

    layers: tuple[LayerCache, ...]
    length: int
    """tokens read so far; the position of the next one"""
    logits: Tensor | None = field(default=None, repr=False)
    """[V] fp32, of the next token; None before the first token"""

    @property
    def entries(self) -> float:
        """Entries per KV head, mean over layers."""
        return sum(layer.n for layer in self.layers) / len(self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, measured from the tensors."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in (layer.keys, layer.values))

    def select(self, indices: Sequence[Tensor]) -> CacheState:
        """Keep ``indices[l]`` [Hkv, K_l] of each layer; the next token's logits stay."""
        return replace(self, layers=tuple(layer.select(i) for layer, i in zip(self.layers, indices, strict=True)))

    def without_last(self) -> CacheState:
        """Forget that the last token was read, so that it can be read again against what is left.

        Every head must still hold the last token's entry, which is then its last one.
        """
        last = self.length - 1
        for layer in self.layers:
            if not bool((layer.positions[:, -1] == last).all()):
                raise ValueError("the last token's entry has been evicted; it cannot be taken back")
        layers = tuple(
            replace(layer.first(layer.n - 1), recent_queries=layer.recent_queries[:, :-1]) for layer in self.layers
        )
        return CacheState(layers=layers, length=last)


def tensors_of(layer: LayerCache) -> dict[str, Tensor]:
    return {f.name: value for f in fields(layer) if isinstance(value := getattr(layer, f.name), Tensor)}


def same(a: CacheState, b: CacheState, *, rtol: float = 0.0, atol: float = 0.0) -> bool:
    """Whether two states agree in every tensor."""
    if a.length != b.length or len(a.layers) != len(b.layers):
        return False
    pairs = [(tensors_of(x), tensors_of(y)) for x, y in zip(a.layers, b.layers, strict=True)]
    tensors = [(x[k], y[k]) for x, y in pairs for k in x]
    if a.logits is not None and b.logits is not None:
        tensors.append((a.logits, b.logits))
    return all(x.shape == y.shape and torch.allclose(x, y, rtol=rtol, atol=atol) for x, y in tensors)
