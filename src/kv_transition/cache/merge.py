"""Merging: each run of neighbouring entries becomes one entry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kv_transition.cache.state import LayerCache

Span = tuple[int, int]
"""(start, stop): the entries from start to stop - 1"""


def outcome(n: int, spans: Sequence[Span]) -> Tensor:
    """Return the first entry of each group that remains when spans of n entries are merged: [K] int64, rising."""
    first = torch.ones(n, dtype=torch.bool)
    for start, stop in spans:
        first[start + 1 : stop] = False
    return first.nonzero().squeeze(-1)


def members(spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
    """Return the entries of each span, padded with its last entry: [S, m] int64, and a mask of real ones, [S, m]."""
    start, stop = torch.tensor(spans).unbind(-1)
    index = start[:, None] + torch.arange(int((stop - start).max()))
    return torch.minimum(index, stop[:, None] - 1), index < stop[:, None]


def merge(
    layer: LayerCache, spans: Sequence[Span], *, count_bias: bool, keys: bool = True, values: bool = True
) -> LayerCache:
    """Return the layer with each span merged into one entry; all other entries are unchanged.

    Spans are in rising order and do not overlap. The weights of a head within a span are its ``attn_sum``, or equal
    weights if all are zero. The merged entry has the weighted mean of the values, of the un-rotated keys (rotated again
    to the mean position, a fraction), of the positions (rounded) and of query_entropy, and the sum of attn_sum.

    count_bias: add the log of the number of merged tokens to the attention logit of the entry. keys, values: false: use
    the key or value of the entry with the most attention in the head (the first among equals) instead of the mean; the
    position is that of the key.
    """
    if not spans:
        return layer
    kept = outcome(layer.n, spans)
    slots = torch.searchsorted(kept, torch.tensor([start for start, _ in spans])).to(layer.keys.device)
    index, real = (tensor.to(layer.keys.device) for tensor in members(spans))
    merged = layer.select(kept.to(layer.keys.device).expand(*layer.positions.shape[:-1], -1))

    weights = layer.attn_sum[..., index].masked_fill(~real, 0)
    total = weights.sum(-1, keepdim=True)
    even = (real / real.sum(-1, keepdim=True)).expand_as(weights)
    weights = torch.where(total > 0, weights / total, even)

    # padding repeats the last entry of a span, so the first of the largest weights is never padding
    most_attended = torch.zeros_like(weights).scatter_(-1, weights.argmax(-1, keepdim=True), 1.0)
    of_keys, of_values = (weights if averaged else most_attended for averaged in (keys, values))

    def mean(entries: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted mean of each span: [..., Hkv, n] -> [..., Hkv, S]."""
        return (weights * entries[..., index]).sum(-1)

    def mean_vector(vectors: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted mean vector of each span: [..., Hkv, S, m, d] -> [..., Hkv, S, d]."""
        return (weights.unsqueeze(-1) * vectors.float()).sum(-2)

    old = layer.positions.to(torch.float32) if layer.angles is None else layer.angles
    at = mean(old, of_keys)
    # R(at) sum_i w_i R(-a_i) k_i = sum_i w_i R(at - a_i) k_i: one rotation, by a few positions only
    turned = layer.rotary.turn(layer.keys[..., index, :].float(), at.unsqueeze(-1) - old[..., index])
    positions = mean(layer.positions.to(torch.float32), of_keys).round().to(torch.int64)
    first, last = layer.positions[..., index[:, 0]], layer.positions[..., index[:, -1]]
    angles = merged.positions.to(torch.float32) if merged.angles is None else merged.angles

    changed = {
        "keys": merged.keys.index_copy(-2, slots, mean_vector(turned, of_keys).to(merged.keys.dtype)),
        "values": merged.values.index_copy(
            -2, slots, mean_vector(layer.values[..., index, :], of_values).to(merged.values.dtype)
        ),
        "positions": merged.positions.index_copy(-1, slots, positions.clamp(first, last)),
        "angles": angles.index_copy(-1, slots, at),
        "attn_sum": merged.attn_sum.index_copy(-1, slots, total.squeeze(-1)),
    }
    if layer.query_entropy is not None:
        changed["query_entropy"] = merged.query_entropy.index_copy(-1, slots, mean(layer.query_entropy, weights))
    if count_bias:
        counts = torch.zeros_like(layer.attn_sum) if layer.bias is None else layer.bias
        biases = torch.zeros_like(merged.attn_sum) if merged.bias is None else merged.bias
        log_count = counts[..., index].masked_fill(~real, -torch.inf).logsumexp(-1)
        changed["bias"] = biases.index_copy(-1, slots, log_count)
    return replace(merged, **changed)
