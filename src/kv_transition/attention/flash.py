"""Exact attention statistics from torch's flash-attention kernels and the log-sum-exp (LSE) that they return.

Entropy: with the keys in place of the values, attention returns the mean key of each query, and H_i = LSE_i - scale *
q_i . (mean key of i).

Column sums: exp(s_ij - LSE_i) summed over i is the softmax denominator of entry j attending to the queries. Therefore
keys and queries are exchanged, and both are reversed in time, because the queries from j on see entry j. -LSE_i is
added to the logits by additional channels, which contain it for the queries and a constant for the keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CHANNELS = 8
"""Number of channels added for the log-sum-exp: three are needed, but on a GPU it must be a multiple of 8."""


def flash_statistics(
    queries: Tensor, keys: Tensor, scale: float, *, column_sums: bool, entropy: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return column sums [*B, Hkv, n] and entropy [*B, q], fp32; None for a statistic that is not requested.

    Arguments as in `statistics.attention_statistics`, without window and bias. The heads of a group are processed one
    after the other, so that copies are as large as the keys. The entropy is a difference of numbers as large as the
    logits: its absolute error is a few 1e-7 of the largest logit in fp32, and about 0.01 nats in bf16, where the mean
    key is rounded. The torch functions called below are private (tested with torch 2.13).
    """
    batched = queries.ndim == 4
    if not batched:
        queries, keys = queries[None], keys[None]
    batch, heads, q, d = queries.shape
    kv_heads, n = keys.shape[1:3]
    group = heads // kv_heads
    # Every query sees all old entries, and the new entries up to its own.
    old, new = keys.split([n - q, q], dim=2)
    if column_sums:
        # a power of two near 1 / scale: exact in every dtype, and it keeps the values in the range of fp16
        unit = 2.0 ** round(-math.log2(scale))
        extended = torch.cat([keys, keys.new_full((batch, kv_heads, n, _CHANNELS), unit)], -1)
        old_extended, new_extended = extended.split([n - q, q], dim=2)
        new_extended = new_extended.flip(2)
    sums = torch.zeros(batch, kv_heads, n, dtype=torch.float32, device=keys.device)
    entropies = torch.zeros(batch, q, dtype=torch.float32, device=keys.device)
    for member in queries.view(batch, kv_heads, group, q, d).unbind(2):
        mean_key, lse = _attention(member, new, causal=True, scale=scale)
        if n > q:
            mean_old, lse_old = _attention(member, old, causal=False, scale=scale)
            share_old = torch.sigmoid(lse_old - lse)
            mean_key = torch.lerp(mean_key.float(), mean_old.float(), share_old[..., None])
            lse = torch.logaddexp(lse, lse_old)
        if entropy:
            mean_logit = torch.linalg.vecdot(member.float(), mean_key.float()).mul_(scale)
            entropies += (lse - mean_logit).clamp_(min=0).sum(1)
        if column_sums:
            carrying = torch.cat([member, _parts(lse / (-scale * unit), member.dtype)], -1)
            _, received = _attention(new_extended, carrying.flip(2), causal=True, scale=scale)
            sums[:, :, n - q :] += received.flip(2).exp()
            if n > q:
                _, received = _attention(old_extended, carrying, causal=False, scale=scale)
                sums[:, :, : n - q] += received.exp()
    sums = sums.div_(group) if column_sums else None
    entropies = entropies.div_(heads) if entropy else None
    if not batched:
        sums, entropies = (None if x is None else x[0] for x in (sums, entropies))
    return sums, entropies


def _attention(queries: Tensor, keys: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Return the mean key [B, H, q, d] and the log-sum-exp [B, H, q] fp32 of each query."""
    if queries.is_cuda:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        mean_key, lse, *_ = flash(queries, keys, keys, 0.0, causal, False, scale=scale)
        return mean_key, lse
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(queries, keys, keys, 0.0, causal, scale=scale)


def _parts(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return numbers of ``dtype`` [..., q, `_CHANNELS`] whose sum is the fp32 value [..., q] to fp32 precision."""
    parts = values.new_zeros(*values.shape, _CHANNELS, dtype=dtype)
    rest = values
    for channel in range(3):
        parts[..., channel] = rest
        rest = rest - parts[..., channel]
    return parts
