"""Exact attention statistics in O(N) memory: blocks of queries against all keys, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}
"""Largest block of attention probabilities held at a time: what a CPU's cache holds, what fills a GPU"""


def attention_sums(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Attention that each entry receives from the newest queries, mean over the group: [Hkv, n] fp32.

    queries: [H, q, d] rotated, of the newest q tokens. keys: [Hkv, n, d] rotated, n >= q, those tokens' entries last,
    so that query i sees the entries up to n - q + i. This is the column sum of the softmax matrix, the score of H2O's
    heavy hitters (arXiv 2306.14048, section 4).
    """
    heads, q, d = queries.shape
    kv_heads, n, _ = keys.shape
    grouped = queries.reshape(kv_heads, heads // kv_heads, q, d)
    sums = torch.zeros(kv_heads, n, dtype=torch.float32, device=keys.device)
    block = max(1, min(q, _BLOCK_BYTES.get(keys.device.type, 64 << 20) // (4 * heads * n)))
    for start in range(0, q, block):
        stop = min(start + block, q)
        visible = n - q + stop
        logits = _logits(grouped[:, :, start:stop], keys[:, :visible], scale)
        # entry j lies in the future of row i when j > n - q + start + i
        future = torch.ones(stop - start, visible, dtype=torch.bool, device=keys.device).triu_(n - q + start + 1)
        probabilities = logits.masked_fill_(future, -torch.inf).softmax(-1)
        sums[:, :visible] += probabilities.sum(2).mean(1)
    return sums


def window_sums(queries: Tensor, query_positions: Tensor, keys: Tensor, key_positions: Tensor, scale: float) -> Tensor:
    """Attention that each entry receives from a few given queries, mean over the group: [Hkv, n] fp32.

    queries: [H, w, d] rotated, at ``query_positions`` [w]. keys: [Hkv, n, d] rotated, at ``key_positions`` [Hkv, n]:
    any entries, some of the queries' own perhaps evicted. Memory is O(w n).
    """
    heads, w, d = queries.shape
    kv_heads = keys.shape[0]
    logits = _logits(queries.reshape(kv_heads, heads // kv_heads, w, d), keys, scale)
    future = key_positions[:, None, None, :] > query_positions[None, None, :, None]
    return logits.masked_fill_(future, -torch.inf).softmax(-1).sum(2).mean(1)


def _logits(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """[Hkv, G, b, d] x [Hkv, n, d] -> [Hkv, G, b, n] fp32; the products in fp32 whatever the cache's dtype."""
    kv_heads, group, b, d = queries.shape
    flat = queries.reshape(kv_heads, group * b, d).float()
    return torch.bmm(flat, keys.float().transpose(1, 2)).mul_(scale).view(kv_heads, group, b, -1)
