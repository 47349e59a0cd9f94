"""Functions that share a budget among layers and heads, for the policies that score entries.

The leading underscore says that this module is not a policy. A budget K is the mean number of entries that a KV head of
a layer keeps.
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
"""added to the argument of the logarithm, as in the code of CAKE's authors"""


def pyramid(k: int, layers: int, n: int, base: int, beta: float) -> list[int]:
    """Return the budget of each layer: it falls linearly from the lowest to the highest, and the mean is ``k``.

    n: the largest number of entries that a layer may keep. base: entries that every layer keeps, at least one. beta:
    the highest layer keeps (k - base) / beta entries in addition to ``base``. Fractions are rounded by the method of
    the largest remainder; ties go to the lower layer. Source: PyramidKV, arXiv 2406.02069.
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
    """Return the budget of each layer: ``base`` entries and a share of the rest in proportion to ``preferences``.

    The mean is ``k``. sizes: the number of entries that each layer has. Entries that a layer cannot use are divided
    equally among the layers that can use them; this is repeated until none is left over. Shares are rounded down, and
    the remainder is divided equally among the first layers that have space. Source: CAKE, arXiv 2503.12491.
    """
    total, layers = sum(preferences), len(preferences)
    if total <= 0:
        preferences, total = [1.0] * layers, float(layers)
    all_shares = min((k - base) * layers, sum(max(n - base, 0) for n in sizes))
    limits = [max(n - base, 0) for n in sizes]
    wanted = [int(p / total * ((k - base) * layers)) for p in preferences]
    shares = [min(*pair) for pair in zip(wanted, limits, strict=True)]
    # first what layers cannot use, then what rounding down left, as the authors do
    unused = sum(wanted) - sum(shares)
    while (rest := all_shares - sum(shares)) > 0:
        left, unused = min(unused, rest) or rest, 0
        able = [i for i in range(layers) if shares[i] < limits[i]]
        each, more = divmod(left, len(able))
        for rank, i in enumerate(able):
            shares[i] = min(shares[i] + each + (rank < more), limits[i])
    return [base + share for share in shares]


def preference(layer: LayerCache, length: int, observers: int, tau1: float, tau2: float) -> float:
    """Return CAKE's preference for a layer, from the attention of the last ``observers`` queries to the entries before
    them.

    It is H^(1 / tau1) V^(1 / tau2). H is the entropy of that attention, summed over queries and heads: it measures how
    widely attention spreads. V is the variance over the queries, summed over entries and heads: it measures how much
    attention shifts. Source: CAKE, arXiv 2503.12491, equations 3 to 5.
    """
    total_entropy = total_variance = 0.0
    for part in layer.parts:
        weights = observed(part, length, observers)
        weights = weights.masked_fill((part.positions >= length - observers)[:, None, None], 0)
        total_entropy += float(-(weights * (weights + _TINY).log()).sum())
        total_variance += float(weights.var(-2).sum()) if weights.shape[-2] > 1 else 0.0
    return max(total_entropy, 0.0) ** (1 / tau1) * total_variance ** (1 / tau2)


def observed(layer: LayerCache, length: int, observers: int) -> Tensor:
    """Return the attention [Hkv, G, w, n] of the last w queries to all entries; w is ``observers``, or fewer if fewer
    are kept.
    """
    w = max(1, min(observers, layer.recent_queries.shape[-2]))
    at = length - w + torch.arange(w, device=layer.positions.device)
    queries = layer.recent_queries[..., -w:, :]
    return window_weights(queries, at, layer.keys, layer.positions, layer.scale, bias=layer.bias)


def shared(heads: Sequence[LayerCache], scores: Sequence[Tensor], k: int, safe: int) -> list[int]:
    """Return the number of entries that each head keeps if the best ``k`` x (number of heads) entries of all heads are
    kept.

    scores: [n] of each head. safe: the number of its best entries that each head keeps in any case. Equal scores go to
    the lower position, and at equal positions to the lower head.
    """
    device = scores[0].device
    raised = [score.index_fill(-1, top(score, min(safe, len(score))), torch.inf) for score in scores]
    pooled = torch.cat([score.to(device) for score in raised])
    # sorted by position, then by head, so that ties go to the lower position
    order = torch.cat([head.positions[0].to(device) for head in heads]).sort(stable=True).indices
    chosen = torch.zeros_like(pooled, dtype=torch.bool)
    chosen[order[top(pooled[order], min(k * len(heads), len(pooled)))]] = True
    return [int(mine.sum()) for mine in chosen.split([head.n for head in heads])]


def by_head(layer: Layer) -> list[LayerCache]:
    """Return the KV heads of one sequence's layer as separate layers, each with the query heads of its group."""
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
