"""Quantization: every entry is kept, with fewer bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from kv_transition.cache.quantize import Packed
from kv_transition.cache.state import CacheState, Layer, LayerCache, SplitLayer
from kv_transition.policies.base import Policy


@dataclass(frozen=True)
class Quantized(Policy):
    """Evicts nothing, but stores keys (after rotation) and values with ``bits`` bits a channel, asymmetrically, with a
    scale and a zero point for each token and group of at most 64 channels. New tokens are quantized when they are read.
    The footprint follows from the bits, so there is one cell for all budgets, which is compared at equal bytes.

    Source: rounding to the nearest level per token and group, as in Sheng et al., "FlexGen", arXiv 2303.06865.

    Cost: O(N d) time once, and the whole cache is dequantized for each attention.

    Differences: KIVI (arXiv 2402.02750) quantizes keys by channel rather than by token, and keeps the newest tokens in
    full precision; here every token is quantized, keys and values alike.
    """

    acts_each_step = True
    ignores_budget = True

    bits: Literal[4, 8] = 4
    """bits of each channel"""

    def compress(self, state: CacheState, k: int, *, seed: int = 0, keep_last: bool = False) -> CacheState:
        """Return the state with all evictable layers quantized, whatever ``k`` is; quantized layers are unchanged."""
        layers = (layer if layer.window is not None else self._packed(layer) for layer in state.layers)
        return replace(state, layers=tuple(layers))

    def _packed(self, layer: Layer) -> Layer:
        if isinstance(layer, SplitLayer):
            return layer.with_parts([self._packed(part) for part in layer.parts])
        if isinstance(layer.keys, Packed):
            return layer
        return _stored(layer, self.bits)


def _stored(layer: LayerCache, bits: int) -> LayerCache:
    return replace(layer, keys=Packed.pack(layer.keys, bits), values=Packed.pack(layer.values, bits), room=None)
