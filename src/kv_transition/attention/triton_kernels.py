"""Exact attention statistics as two Triton kernels, one over rows of attention and one over columns.

The row kernel computes each query's log-sum-exp and entropy in one pass over the entries that it sees. The column
kernel computes each entry's sum over the queries that see it. Each program writes its own output, so the order of
summation never changes.
"""

from __future__ import annotations

import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_NEVER = tl.constexpr(-1e30)
"""Logit of an entry that a query does not see. It is finite, because the difference of two infinities is NaN."""


@triton.jit
def _tile(base, stride, first, limit, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr):
    """Load rows ``first`` to ``first + ROWS`` of a [limit, D] matrix as [ROWS, DP], with zeros outside."""
    r = first + tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    inside = r[:, None] < limit
    if D < DP:
        inside = inside & (d[None, :] < D)
    return tl.load(base + r[:, None].to(tl.int64) * stride + d[None, :], mask=inside, other=0.0)


@triton.jit
def _hide(logits, position, entry, window, WINDOW: tl.constexpr):
    """Return ``logits`` where a query at ``position`` sees ``entry``, and `_NEVER` elsewhere."""
    seen = entry <= position
    if WINDOW:
        seen = seen & (position - entry < window)
    return tl.where(seen, logits, _NEVER)


@triton.jit
def _row_step(
    query, K, Bias, stride_k, position, first, n, scale, window, top, total, moment,
    BIAS: tl.constexpr, WINDOW: tl.constexpr, HIDE: tl.constexpr, ENTROPY: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Add BK entries to the running maximum, to the sum of exp2(s - top) and to that of exp2(s - top) * (s - top)."""
    entry = first + tl.arange(0, BK)
    logits = tl.dot(query, tl.trans(_tile(K, stride_k, first, n, D, DP, BK)), input_precision="ieee") * scale
    if BIAS:
        logits += tl.load(Bias + entry, mask=entry < n, other=0.0)[None, :]
    if HIDE:
        logits = _hide(logits, position[:, None], entry[None, :], window, WINDOW)
    new_top = tl.maximum(top, tl.max(logits, 1))
    below = logits - new_top[:, None]
    weights = tl.exp2(below)
    if BIAS or WINDOW:
        # a row that has seen no entry yet has its maximum at `_NEVER`
        weights = tl.where(logits > 0.5 * _NEVER, weights, 0.0)
    shrink = tl.exp2(top - new_top)
    if ENTROPY:
        moment = shrink * (moment + total * (top - new_top)) + tl.sum(weights * below, 1)
    total = shrink * total + tl.sum(weights, 1)
    return new_top, total, moment


@triton.jit(do_not_specialize=["q", "n", "window"])
def _rows(
    Q, K, Bias, LSE, Entropy, scale, q, n, window,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    GROUP: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr, ENTROPY: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute log-sum-exp and entropy, both to base 2, of BQ rows of one head."""
    # the last rows see the most entries, so they start first
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BQ
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    kv_head = head // GROUP
    K += batch * stride_kb + kv_head * stride_kh
    Bias += (batch * (heads // GROUP) + kv_head) * n
    query = _tile(Q + batch * stride_qb + head * stride_qh, stride_qn, start, q, D, DP, BQ)
    row = start + tl.arange(0, BQ)
    position = n - q + row

    top = tl.full([BQ], _NEVER, tl.float32)
    total = tl.zeros([BQ], tl.float32)
    moment = tl.zeros([BQ], tl.float32)
    begin = 0
    middle = 0
    if WINDOW:
        begin = tl.maximum(n - q + start - window + 1, 0) // BK * BK
        middle = begin
    else:
        # up to here every row sees every entry
        middle = (n - q + start + 1) // BK * BK
        for first in range(0, middle, BK):
            top, total, moment = _row_step(
                query, K, Bias, stride_kn, position, first, n, scale, window, top, total, moment,
                BIAS, WINDOW, False, ENTROPY, D, DP, BK,
            )  # fmt: skip
    for first in range(middle, tl.minimum(n, n - q + start + BQ), BK):
        top, total, moment = _row_step(
            query, K, Bias, stride_kn, position, first, n, scale, window, top, total, moment,
            BIAS, WINDOW, True, ENTROPY, D, DP, BK,
        )  # fmt: skip

    out = (batch * heads + head) * q + row
    sees = total > 0
    total = tl.where(sees, total, 1.0)
    # a row that sees no entry must have no weight in the columns
    tl.store(LSE + out, tl.where(sees, top + tl.log2(total), -_NEVER), mask=row < q)
    if ENTROPY:
        tl.store(Entropy + out, tl.where(sees, tl.log2(total) - moment / total, 0.0), mask=row < q)


@triton.jit
def _column_step(
    key, Q, LSE, bias, stride_q, entry, first, q, n, scale, window, sums,
    BIAS: tl.constexpr, WINDOW: tl.constexpr, HIDE: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """Add the attention of BQ queries to the entries' sums."""
    row = first + tl.arange(0, BQ)
    logits = tl.dot(key, tl.trans(_tile(Q, stride_q, first, q, D, DP, BQ)), input_precision="ieee") * scale
    if BIAS:
        logits += bias[:, None]
    if HIDE:
        logits = _hide(logits, n - q + row[None, :], entry[:, None], window, WINDOW)
    lse = tl.load(LSE + row, mask=row < q, other=-_NEVER)
    return sums + tl.sum(tl.exp2(logits - lse[None, :]), 1)


@triton.jit(do_not_specialize=["q", "n", "window"])
def _columns(
    Q, K, Bias, LSE, Sums, scale, q, n, window,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    GROUP: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute the attention that BK entries of one KV head receive, mean over the heads of the group."""
    start = tl.program_id(0) * BK
    kv_head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    kv_heads = tl.num_programs(1)
    key = _tile(K + batch * stride_kb + kv_head * stride_kh, stride_kn, start, n, D, DP, BK)
    entry = start + tl.arange(0, BK)
    bias = tl.zeros([BK], tl.float32)
    if BIAS:
        bias = tl.load(Bias + (batch * kv_heads + kv_head) * n + entry, mask=entry < n, other=0.0)

    # Queries see these entries from `begin` on, all of them from `middle` on.
    begin = tl.maximum(start - (n - q), 0) // BQ * BQ
    middle = q
    end = q
    if WINDOW:
        end = tl.minimum(q, start + BK - 1 + window - (n - q))
    else:
        middle = tl.minimum(q, tl.cdiv(tl.maximum(start + BK - 1 - (n - q), 0), BQ) * BQ)
    sums = tl.zeros([BK], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        queries = Q + batch * stride_qb + head * stride_qh
        lse = LSE + (batch * kv_heads * GROUP + head) * q
        for first in range(begin, tl.minimum(middle, end), BQ):
            sums = _column_step(
                key, queries, lse, bias, stride_qn, entry, first, q, n, scale, window, sums,
                BIAS, WINDOW, True, D, DP, BQ,
            )  # fmt: skip
        if not WINDOW:
            for first in range(middle, end, BQ):
                sums = _column_step(
                    key, queries, lse, bias, stride_qn, entry, first, q, n, scale, window, sums,
                    BIAS, WINDOW, False, D, DP, BQ,
                )  # fmt: skip
    tl.store(Sums + (batch * kv_heads + kv_head) * n + entry, sums / GROUP, mask=entry < n)


def triton_statistics(
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

    Arguments as in `statistics.attention_statistics`. fp16 and bf16 are multiplied in their own precision and summed in
    fp32. Head dimensions go up to 256 and are padded with zeros to a power of two.
    """
    batched = queries.ndim == 4
    if not batched:
        queries, keys = queries[None], keys[None]
        bias = None if bias is None else bias[None]
    queries, keys = (x if x.stride(-1) == 1 else x.contiguous() for x in (queries, keys))
    batch, heads, q, d = queries.shape
    kv_heads, n = keys.shape[1:3]
    new = {"dtype": torch.float32, "device": keys.device}
    lse = torch.empty(batch, heads, q, **new)
    entropies = torch.empty(batch, heads, q, **new) if entropy else None
    sums = torch.empty(batch, kv_heads, n, **new) if column_sums else None
    if bias is not None:
        bias = bias.expand(batch, kv_heads, n).float().mul(math.log2(math.e)).clamp(min=_NEVER.value).contiguous()

    # A kernel needs a pointer even for an argument that it does not read.
    shared = (scale * math.log2(math.e), q, n, window or 0, *queries.stride()[:3], *keys.stride()[:3])
    options = {"GROUP": heads // kv_heads, "BIAS": bias is not None, "WINDOW": window is not None, **tiles(d)}
    bias = lse if bias is None else bias
    # Triton launches on the current device.
    with torch.cuda.device(keys.device) if keys.is_cuda else contextlib.nullcontext():
        _rows[(triton.cdiv(q, options["BQ"]), heads, batch)](
            queries, keys, bias, lse, lse if entropies is None else entropies, *shared, ENTROPY=entropy, **options
        )
        if sums is not None:
            # The larger tile is the one that stays in registers.
            options |= {"BQ": options["BK"], "BK": options["BQ"]}
            _columns[(triton.cdiv(n, options["BK"]), kv_heads, batch)](
                queries, keys, bias, lse, sums, *shared, **options
            )
    if entropies is not None:
        entropies = entropies.sum(1).mul_(math.log(2) / heads)
    if not batched:
        sums, entropies = (None if x is None else x[0] for x in (sums, entropies))
    return sums, entropies


def tiles(d: int) -> dict[str, int]:
    """Return the padded head dimension and the tiles of the row kernel for head dimension ``d``."""
    padded = max(16, triton.next_power_of_2(d))
    return {
        "D": d,
        "DP": padded,
        "BQ": 128 if padded <= 128 else 64,
        "BK": 64,
        "num_warps": 4 if padded <= 64 else 8,
        "num_stages": 2,
    }
