"""Exact attention statistics in O(N) memory, from blocks of queries and keys in plain torch.

This is the reference implementation, the only one with windows and biases, and the fastest one on a CPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

_BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}
"""Target size of a block of logits in bytes: it fits the cache of a CPU, or is large enough to occupy a GPU"""

_MIN_ROWS = 64
"""Smallest number of rows of a block, because a thinner matrix product is limited by memory"""

_NEVER = -1e30
"""Logit of an entry that a query does not see. It is finite, because 0 * -inf would be NaN in an entropy."""


def block_statistics(
    queries: Tensor,
    keys: Tensor,
    scale: float,
    *,
    column_sums: bool,
    entropy: bool,
    window: int | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return column sums [*B, Hkv, n] and entropy [*B, q], fp32; None for a statistic that is not requested.

    Arguments as in `statistics.attention_statistics`. Memory beside the results is O(n): the keys of one head in fp32
    and one block of logits (two with the entropy).
    """
    *batch, heads, q, d = queries.shape
    kv_heads, n = keys.shape[-3:-1]
    group = heads // kv_heads
    grouped = queries.reshape(-1, group, q, d)
    flat = keys.reshape(-1, n, d)
    # Logits to base 2: on a CPU exp2 takes a third of exp's time.
    scale *= math.log2(math.e)
    if bias is not None:
        bias = bias.expand(keys.shape[:-1]).reshape(-1, 1, n).float() * math.log2(math.e)
        bias.clamp_(min=_NEVER)
    sums = torch.zeros(len(flat), n, dtype=torch.float32, device=keys.device) if column_sums else None
    entropies = torch.empty(len(flat), q, dtype=torch.float32, device=keys.device) if entropy else None

    together, rows = _block(len(flat), group, q, n, window, keys.device.type)
    future = torch.ones(rows, rows, dtype=torch.bool, device=keys.device).triu_(1)
    for head in range(0, len(flat), together):
        some = slice(head, head + together)
        some_keys = flat[some].float()
        for start in range(0, q, rows):
            stop = min(start + rows, q)
            b = stop - start
            # the entries from the oldest that the first of these rows sees to the newest that the last row sees
            end = n - q + stop
            begin = 0 if window is None else max(0, end - b - window + 1)
            block = grouped[some, :, start:stop].float().mul(scale).flatten(1, 2)
            logits = torch.bmm(block, some_keys[:, begin:end].mT)
            if bias is not None:
                logits += bias[some, :, begin:end]
            by_row = logits.view(-1, group, b, end - begin)
            by_row[..., -b:].masked_fill_(future[:b, :b], _NEVER)
            if window is not None and end - begin > window:
                # Row i of the block sees columns from `end - begin - b - window + 1 + i` on.
                out = end - begin - window
                by_row[..., :out].masked_fill_(future[:b, :b].mT[:, b - 1 - out : b - 1], _NEVER)

            top = logits.amax(-1, keepdim=True)
            logits.sub_(top)
            weights = logits.exp2() if entropy else logits.exp2_()
            total = weights.sum(-1, keepdim=True)
            share = total.reciprocal()
            if bias is not None:
                # a row that sees no entry must add nothing
                share.mul_(top > _NEVER / 2)
            if sums is not None:
                sums[some, begin:end] += torch.bmm(share.mT, weights).squeeze(1)
            if entropies is not None:
                # -sum p log p = log(total) - sum(weights * logits) / total, without cancellation of large terms
                row = total.log2_().sub_(torch.linalg.vecdot(weights, logits)[..., None].mul_(share))
                if bias is not None:
                    row.mul_(share > 0)
                entropies[some, start:stop] = row.view(-1, group, b).sum(1)
    if sums is not None:
        sums = sums.div_(group).view(*batch, kv_heads, n)
    if entropies is not None:
        entropies = entropies.view(*batch, kv_heads, q).sum(-2).mul_(math.log(2) / heads)
    return sums, entropies


def _block(count: int, group: int, q: int, n: int, window: int | None, device_type: str) -> tuple[int, int]:
    """Return how many of ``count`` KV heads are processed together, and how many queries of each."""
    width = n if window is None else min(n, 2 * window)
    room = _BLOCK_BYTES.get(device_type, 64 << 20) // (4 * group * width)
    # Half of each square on the diagonal lies in the future and is not needed; small blocks keep this share small.
    most = max(_MIN_ROWS, min(-(-q // 8), n if window is None else window))
    rows = min(q, most, max(room, -(-_MIN_ROWS // group)))
    return min(count, max(1, room // rows)), rows


def one_query_statistics(
    queries: Tensor,
    keys: Tensor,
    scale: float,
    *,
    column_sums: bool,
    entropy: bool,
    window: int | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return `block_statistics` for q = 1 with little overhead, because decoding calls it for each layer and token."""
    n = keys.shape[-2]
    hidden = 0 if window is None else max(0, n - window)
    if hidden:
        keys = keys[..., hidden:, :]
        bias = None if bias is None else bias[..., hidden:]
    logits = logits_of(queries, keys, scale).squeeze(-2)  # [*B, Hkv, G, n]
    if bias is not None:
        logits += bias[..., None, :]
    weights = logits.softmax(-1)
    if bias is not None:
        # a row that contains only -inf
        weights.nan_to_num_(0)
    sums = weights.mean(-2) if column_sums else None
    if hidden and column_sums:
        sums = functional.pad(sums, (hidden, 0))
    entropies = torch.special.entr(weights).sum(-1).mean((-2, -1))[..., None] if entropy else None
    return sums, entropies


def window_sums(
    queries: Tensor,
    query_positions: Tensor,
    keys: Tensor,
    key_positions: Tensor,
    scale: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Return the attention that each entry receives from a few queries, mean over the group: [*B, Hkv, n] fp32.

    queries: [*B, H, w, d] rotated, at ``query_positions`` [w] or [*B, w]. keys: [*B, Hkv, n, d] rotated, at
    ``key_positions`` [*B, Hkv, n]; entries of the queries themselves may have been evicted. bias: [*B, Hkv, n], added
    to the logits. A query that sees no entry adds nothing. Memory is O(w n).
    """
    return window_weights(queries, query_positions, keys, key_positions, scale, bias).sum(-2).mean(-2)


def window_weights(
    queries: Tensor,
    query_positions: Tensor,
    keys: Tensor,
    key_positions: Tensor,
    scale: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Return the attention of each of a few queries to each entry: [*B, Hkv, G, w, n] fp32; arguments as of
    `window_sums`.

    A query that sees no entry has a row of zeros.
    """
    logits = logits_of(queries, keys, scale)
    if bias is not None:
        logits += bias[..., None, None, :]
    future = key_positions[..., None, None, :] > query_positions[..., None, None, :, None]
    return logits.masked_fill_(future, -torch.inf).softmax(-1).nan_to_num_(0)


def logits_of(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return logits [*B, H, q, d] x [*B, Hkv, n, d] -> [*B, Hkv, G, q, n], in fp32 for any dtype of the cache."""
    *batch, heads, q, d = queries.shape
    kv_heads, n = keys.shape[-3:-1]
    rows = queries.reshape(*batch, kv_heads, heads // kv_heads * q, d).float()
    return (rows * scale @ keys.float().mT).view(*batch, kv_heads, heads // kv_heads, q, n)
