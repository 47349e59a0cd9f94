"""StreamingLLM: attention sinks and the most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from kv_transition.cache.state import CacheState, LayerCache
from kv_transition.errors import UserError
from kv_transition.policies.base import Policy, on_device_of


@dataclass(frozen=True)
class StreamingLLM(Policy):
    """Keeps the first tokens of the text, which attention uses as sinks, and the newest tokens.

    With ``positions: cache``, attention uses the distances between places in the cache: the sinks stand directly before
    the recent tokens, so that no distance is longer than the cache. This is the paper's method, and it works beyond the
    length that a model was trained for. After each step only the sinks are rotated again, always from their original
    keys, because rotary attention depends on differences of positions only. When the rotary position of the next token
    reaches 2 K, all keys are rotated back so that it is K. This happens at most once to any key except those of the
    sinks.

    Source: Xiao et al., "Efficient streaming language models with attention sinks", arXiv 2309.17453.

    Cost: O(N) time, no statistic; with ``positions: cache`` a rotation of the sinks at each step.

    Differences: the prompt is read with the full cache before anything is evicted; the paper streams from the start.
    kvpress' StreamingLLMPress keeps the original positions, acts on the prompt only, and keeps all sinks however small
    K is; here the sinks take at most half of K.
    """

    acts_each_step = True

    n_sink: Annotated[int, (0, None)] = 4
    """first tokens of the text that are never evicted"""
    recent: Annotated[int | None, (1, None)] = None
    """newest tokens kept; null: the rest of the budget. With a number, the budget should be at least n_sink + recent"""
    positions: Literal["original", "cache"] = "original"
    """positions that keys are rotated to: those in the text, or those in the cache"""

    def protected(self, k: int) -> int:
        rest = k // 2 if self.recent is None else max(k // 2, k - self.recent)
        return min(self.n_sink, rest)

    def keep(self, k: int) -> int:
        return k if self.recent is None else min(k, self.protected(k) + self.recent)

    def score(self, layer: LayerCache, index: int, k: int, length: int, seed: int) -> Tensor:
        sinks = layer.positions < self.protected(k)
        return layer.positions.to(torch.float64).masked_fill(sinks, torch.inf)

    def compress(self, state: CacheState, k: int, *, seed: int = 0, keep_last: bool = False) -> CacheState:
        """Return the compressed state, as `Policy.compress`; raises UserError if keys must be rotated and the rotation
        is unknown.
        """
        return self._placed(state, super().compress(state, k, seed=seed, keep_last=keep_last), k, in_place=False)

    def hold(self, state: CacheState, k: int) -> CacheState:
        """Return the compressed state, as `Policy.hold`; raises UserError as `compress` does."""
        if type(self).compress is not StreamingLLM.compress:
            return self.compress(state, k)
        return self._placed(state, self._thinned(state, k, self._one_less), k, in_place=True)

    def _placed(self, state: CacheState, kept: CacheState, k: int, *, in_place: bool) -> CacheState:
        """Return the ``kept`` entries of a state, with rotated keys if requested.

        in_place: write the rotated sinks into their storage.
        """
        evicted = any(new is not old for new, old in zip(kept.layers, state.layers, strict=True))
        if self.positions == "original" or not evicted:
            return kept
        if any(layer.rotary is None for layer in kept.layers):
            raise UserError(
                "the policy streaming_llm rotates keys under positions: cache, but the rotary embedding of this model "
                "is not known; use positions: original for this model"
            )
        k = self.keep(k)
        # fewer than protected if an earlier, smaller budget had no space for them
        sinks = int((kept.evictable[0].positions < self.protected(k)).sum(-1).amin())
        following = state.length - state.shift
        # number of positions by which all keys are rotated back: an int, or [B, 1, 1]
        back = (following - k) * (following >= 2 * k)
        if isinstance(back, Tensor) and not back.any():
            back = 0
        layers = (
            _turned_back(new, back)
            if new.window is not None
            else _closed(new, sinks, following, back, in_place and new is not old)
            for new, old in zip(kept.layers, state.layers, strict=True)
        )
        return replace(kept, layers=tuple(layers), shift=state.shift + back)


def _turned_back(layer: LayerCache, back: int | Tensor) -> LayerCache:
    """Return the layer with every key rotated back by ``back`` positions."""
    if not isinstance(back, Tensor) and back == 0:
        return layer
    angles = _angles(layer) - on_device_of(layer, back)
    turned = layer.rotary.turn(layer.keys, angles - _angles(layer))
    return replace(layer, keys=turned, angles=angles, room=None)


def _closed(layer: LayerCache, sinks: int, following: int | Tensor, back: int | Tensor, in_place: bool) -> LayerCache:
    """Return the layer rotated back, and the sinks rotated to the places directly before the other entries."""
    anchors = _anchors(layer, sinks)
    layer = _turned_back(layer, back)
    n = layer.n
    following = on_device_of(layer, following - back)
    places = following - n + torch.arange(n, device=layer.positions.device)
    angles = places.float().expand(layer.positions.shape)
    turned = layer.rotary.turn(anchors, angles[..., :sinks] - layer.positions[..., :sinks])
    if in_place:
        layer.keys[..., :sinks, :] = turned
        return replace(layer, angles=angles, anchors=anchors)
    keys = torch.cat([turned, layer.keys[..., sinks:, :]], -2)
    return replace(layer, keys=keys, angles=angles, anchors=anchors, room=None)


def _anchors(layer: LayerCache, sinks: int) -> Tensor:
    """Return the original keys of the sinks, because repeated rotation of rounded keys would accumulate errors."""
    shape = (*layer.keys.shape[:-2], sinks, layer.keys.shape[-1])
    if layer.anchors is not None and layer.anchors.shape == shape:
        return layer.anchors
    back = layer.positions[..., :sinks] - _angles(layer)[..., :sinks]
    return layer.rotary.turn(layer.keys[..., :sinks, :], back)


def _angles(layer: LayerCache) -> Tensor:
    return layer.positions.float() if layer.angles is None else layer.angles
