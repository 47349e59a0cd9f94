"""Expected attention: entries that future queries are expected to attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from kv_transition.cache.state import CacheState, LayerCache
from kv_transition.errors import UserError
from kv_transition.policies._scored import Scored


@dataclass(frozen=True)
class ExpectedAttention(Scored):
    """Keeps the entries with the largest product of expected attention and norm of the value. The future queries of a
    head are assumed to be normally distributed, with the mean and covariance of its queries so far (without the first 4
    tokens), rotated by the mean rotation R over the next ``n_future`` positions. The expected weight of a key k is
    exp(s m.k + s^2 k.C k / 2), with m = R mean, C = R cov R^T and s the scale of attention logits. It is normalised
    over the entries after the sinks and averaged over the group.

    Source: Devoto, Jeblick and Jegou, "Expected attention: KV cache compression by estimating attention from future
    queries distribution", arXiv 2510.00636.

    Cost: O(H N d^2) time, and the moments of the queries during the prefill, O(H N d^2) time and O(H d^2) memory a
    layer.

    Differences: kvpress scales by 1 / sqrt(d) whatever the model's own scale is, and keeps all 4 sinks however small K
    is; here the sinks take at most half of K.
    """

    statistics = frozenset({"query_mean", "query_cov"})

    n_sink: Annotated[int, (0, None)] = 4
    """first tokens of the text that are kept"""
    n_future: Annotated[int, (1, 65_536)] = 512
    """number of future positions that the rotation is averaged over"""

    def compress(self, state: CacheState, k: int, *, seed: int = 0, keep_last: bool = False) -> CacheState:
        """Return the compressed state, as `Policy.compress`. Raises UserError also if the model's
        rotation is unknown.
        """
        if any(part.rotary is None for layer in state.evictable for part in layer.parts):
            raise UserError(
                "the policy expected_attention rotates queries to later positions, but the rotary embedding of this "
                "model is not known; choose another policy for this model"
            )
        return super().compress(state, k, seed=seed, keep_last=keep_last)

    def importance(self, layer: LayerCache, index: int, k: int, length: int, seed: int) -> Tensor:
        keys = layer.keys.float()
        kv_heads = keys.shape[0]
        ahead = length + torch.arange(self.n_future, device=keys.device)
        mean = layer.rotary.mean_turn(layer.query_mean, ahead).unflatten(0, (kv_heads, -1))  # [Hkv, G, d]
        # rows, then columns: cov R^T, then R cov R^T
        half = layer.rotary.mean_turn(layer.query_cov, ahead)
        cov = layer.rotary.mean_turn(half.mT, ahead).unflatten(0, (kv_heads, -1))  # [Hkv, G, d, d]
        logits = mean @ keys.mT * layer.scale  # [Hkv, G, n]
        for g in range(logits.shape[1]):
            logits[:, g] += ((keys @ cov[:, g]) * keys).sum(-1) * (layer.scale**2 / 2)
        sinks = layer.positions < self.sinks(k)
        expected = logits.masked_fill(sinks.unsqueeze(1), -torch.inf).softmax(-1).mean(1)
        return expected * layer.values.float().norm(dim=-1)
