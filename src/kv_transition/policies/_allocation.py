"""How a budget is shared by layers and heads: what policies that score entries choose from.

No policy by itself, as the leading underscore says. A budget K is that of a KV head of a layer
on average, whatever the shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from math import floor

import torch
from torch import Tensor

from kv_transition.attention.blocks import window_weights
from kv_transition.cache.state import PER_ENTRY, Layer, LayerCache
from kv_transition.policies.base import top

_TINY = 1e-10
"""added below the logarithm, as CAKE's authors do"""


def pyramid(k: int, layers: int, n: int, base: int, beta: float) -> list[int]:
    """Budgets that fall linearly from the lowest layer to the highest, and add up to ``k`` times ``layers``.

    n: entries that a layer may have at most. base: entries that every layer keeps, at least one. beta: the highest
    layer keeps (k - base) / beta entries beside these. Fractions are rounded by largest remainder, ties to the lower
    layer. Source: PyramidKV, arXiv 2406.02069.
    """
    if layers == 1:
        return [k]
    mean = Fraction(k - base)
    top_share = mean / Fraction(beta)
    bottom = min(2 * mean - top_share, Fraction(n - base))
    top_share = 2 * mean - bottom
    shares = [bottom - (bottom - top_share) * layer / (layers - 1) for layer in range(layers)]
    left = sum(shares) - sum(map(floor, shares))
    # ties go to the lower layer, since sorting is stable
    rounded_up = sorted(range(layers), key=lambda layer: floor(shares[layer]) - shares[layer])[: int(left)]
    return [base + floor(share) + (layer in rounded_up) for layer, share in enumerate(shares)]


def by_preference(k: int, preferences: Sequence[float], sizes: Sequence[int], base: int) -> list[int]:
    """Budgets of ``base`` entries each and shares of the rest in proportion to ``preferences``, ``k`` on average.

    sizes: entries that each layer has; what a layer cannot use is shared equally by those that can, as often as it
    takes. Rounded down; what that leaves goes to the first layers that have room, equally. Source: CAKE, arXiv
    2503.12491.
    """
    total, layers = sum(preferences), len(preferences)
    if total <= 0:
        preferences, total = [1.0] * layers, float(layers)
    all_shares = min((k - base) * layers, sum(max(n - base, 0) for n in sizes))
    limits = [max(n - base, 0) for n in sizes]
    shares = [min(int(p / total * ((k - base) * layers)), limit) for p, limit in zip(preferences, limits, strict=True)]
    while (left := all_shares - sum(shares)) > 0:
        able = [i for i in range(layers) if shares[i] < limits[i]]
        each, more = divmod(left, len(able))
        for rank, i in enumerate(able):
            shares[i] = min(shares[i] + each + (rank < more), limits[i])
    return [base + share for share in shares]


def preference(layer: LayerCache, length: int, observers: int, tau1: float, tau2: float) -> float:
    """How much a layer is worth by the attention of the last ``observers`` queries to the entries before them.

    H^(1 / tau1) V^(1 / tau2): H is the entropy of that attention, summed over queries and heads (how far it spreads), V
    the variance over the queries, summed over entries and heads (how much it shifts). Source: CAKE, arXiv 2503.12491,
    equations 3 to 5.
    """
    total_entropy = total_variance = 0.0
    for part in layer.parts:
        weights = observed(part, length, observers)
        weights = weights.masked_fill((part.positions >= length - observers)[:, None, None], 0)
        total_entropy += float(-(weights * (weights + _TINY).log()).sum())
        total_variance += float(weights.var(-2).sum()) if weights.shape[-2] > 1 else 0.0
    return max(total_entropy, 0.0) ** (1 / tau1) * total_variance ** (1 / tau2)


def observed(layer: LayerCache, length: int, observers: int) -> Tensor:
    """Attention [Hkv, G, w, n] of the last w queries, ``observers`` or as many as are kept, to all entries."""
    w = max(1, min(observers, layer.recent_queries.shape[-2]))
    at = length - w + torch.arange(w, device=layer.positions.device)
    queries = layer.recent_queries[..., -w:, :]
    return window_weights(queries, at, layer.keys, layer.positions, layer.scale, bias=layer.bias)


def shared(heads: Sequence[LayerCache], scores: Sequence[Tensor], k: int, safe: int) -> list[int]:
    """How many entries each head keeps if the ``k`` times as many as there are heads are the best of all of them.

    scores: [n] of each head. safe: a head's best ones that it keeps in any case. Equal scores go to the lower position,
    and among equal positions to the lower head.
    """
    device = scores[0].device
    raised = [score.index_fill(-1, top(score, min(safe, len(score))), torch.inf) for score in scores]
    pooled = torch.cat([score.to(device) for score in raised])
    # by position, then by head: so that ties go to the lower position
    order = torch.cat([head.positions[0].to(device) for head in heads]).sort(stable=True).indices
    chosen = torch.zeros_like(pooled, dtype=torch.bool)
    chosen[order[top(pooled[order], min(k * len(heads), len(pooled)))]] = True
    return [int(mine.sum()) for mine in chosen.split([head.n for head in heads])]


def by_head(layer: Layer) -> list[LayerCache]:
    """The KV heads of one sequence's layer, each a layer of its own with the query heads of its group."""
    return [head for part in layer.parts for head in _heads_of(part)]


def _heads_of(layer: LayerCache) -> list[LayerCache]:
    heads = layer.positions.shape[0]
    of_query_heads = ("recent_queries", "query_mean", "query_cov")
    pieces = {
        name: tensor.chunk(heads)
        for name in (*PER_ENTRY, *of_query_heads)
        if (tensor := getattr(layer, name)) is not None
    }
    return [replace(layer, room=None, **{name: own[i] for name, own in pieces.items()}) for i in range(heads)]
