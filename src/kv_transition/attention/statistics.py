"""The attention statistics, and the choice of the implementation that computes them."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kv_transition.attention.blocks import block_statistics, one_query_statistics
from kv_transition.errors import UserError

IMPLEMENTATIONS = ("blocks", "flash", "triton")
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Statistics:
    """Statistics of the attention of new queries; None for a statistic that is not requested.

    column_sums: [*B, Hkv, n] fp32, attention that each entry receives from the new queries, mean over the G query heads
    of its group: H2O's score (arXiv 2306.14048, section 4). entropy: [*B, q] fp32, nats, of each new query's row of
    attention, mean over all H heads.
    """

    column_sums: Tensor | None
    entropy: Tensor | None


def attention_statistics(
    queries: Tensor,
    keys: Tensor,
    scale: float,
    *,
    column_sums: bool,
    entropy: bool,
    window: int | None = None,
    bias: Tensor | None = None,
    implementation: str = "auto",
) -> Statistics:
    """Return exact statistics of softmax attention, in memory that grows with n and not with q times n.

    queries: [*B, H, q, d] rotated, of the newest q tokens. keys: [*B, Hkv, n, d] rotated, n >= q; the entries of these
    tokens come last, so that query i sees the entries up to n - q + i, and with ``window`` only the last ``window`` of
    them. *B is empty or one dimension; fp32, bf16 or fp16.

    bias: [*B, Hkv, n], added to the logits: the log of its count for a merged entry, -inf for padding. A query that
    sees only -inf adds nothing and has entropy 0. Queries of right padding see entries: leave them out.

    implementation: one of `IMPLEMENTATIONS`, or auto (see `choose`). A single query needs one row of attention, which
    torch computes whatever the implementation.

    Raises UserError if the requested implementation cannot serve the call (q > 1).
    """
    wanted = {"column_sums": column_sums, "entropy": entropy}
    # checked first, because decoding calls this for each layer and token
    if queries.shape[-2] == 1:
        return Statistics(*one_query_statistics(queries, keys, scale, **wanted, window=window, bias=bias))
    chosen = choose(
        queries.device.type,
        queries.dtype,
        window=window,
        bias=bias is not None,
        head_dim=queries.shape[-1],
        implementation=implementation,
    )
    if chosen == "flash":
        from kv_transition.attention.flash import flash_statistics

        return Statistics(*flash_statistics(queries, keys, scale, **wanted))
    if chosen == "triton":
        from kv_transition.attention.triton_kernels import triton_statistics

        return Statistics(*triton_statistics(queries, keys, scale, **wanted, window=window, bias=bias))
    return Statistics(*block_statistics(queries, keys, scale, **wanted, window=window, bias=bias))


def choose(
    device_type: str,
    dtype: torch.dtype,
    *,
    window: int | None = None,
    bias: bool = False,
    head_dim: int | None = None,
    implementation: str = "auto",
) -> str:
    """Return the implementation for such calls: ``blocks``, ``flash`` or ``triton``. Results record the name.

    auto is ``triton`` on a GPU (compute capability 8.0 or newer, fp16 or bf16, Triton installed), else ``blocks``.
    ``flash`` supports neither windows nor biases; the other two support both. auto never chooses it: on a CPU it is the
    slowest. Column sums of one layer (28/4 heads, d = 128, bf16, one thread of an AMD EPYC with AVX-512) took blocks
    0.018, 0.23 and 4.7 s at 512, 2048 and 8192 tokens, flash 0.10, 0.94 and 12.7 s, attention itself 0.047, 0.44 and
    6.0 s (benchmarks/attention_statistics.py). Nothing has been measured on a GPU yet.

    Raises UserError if ``implementation`` cannot serve such calls.
    """
    if implementation == "auto":
        return "triton" if _why_not_triton(device_type, dtype, head_dim) is None else "blocks"
    if implementation not in IMPLEMENTATIONS:
        raise UserError(
            f"model.attention_statistics: {implementation!r} is not one of auto, {', '.join(IMPLEMENTATIONS)}; use auto"
        )
    reason = None
    if implementation == "flash":
        reason = _why_not_flash(device_type, dtype, head_dim, window, bias)
    elif implementation == "triton":
        reason = _why_not_triton(device_type, dtype, head_dim)
    if reason:
        raise UserError(f"model.attention_statistics: {implementation} {reason}; use auto or blocks")
    return implementation


def _why_not_flash(
    device_type: str, dtype: torch.dtype, head_dim: int | None, window: int | None, bias: bool
) -> str | None:
    if window is not None:
        return "does not support a sliding window"
    if bias:
        return "does not support a bias of the logits, which merged entries and padding need"
    if device_type == "cpu":
        return None
    if device_type != "cuda" or not _ampere():
        return "needs a CPU, or a GPU of compute capability 8.0 or newer"
    if dtype not in _HALF:
        return "needs float16 or bfloat16 on a GPU"
    # Eight more channels hold the log-sum-exp; the kernel supports up to 256.
    if head_dim is not None and (head_dim % 8 or head_dim > 248):
        return f"needs a head dimension that is a multiple of 8 and at most 248 on a GPU, not {head_dim}"
    return None


def _why_not_triton(device_type: str, dtype: torch.dtype, head_dim: int | None) -> str | None:
    if not _triton_installed():
        return "needs the package triton, which is not installed"
    if head_dim is not None and head_dim > 256:
        return f"needs a head dimension of at most 256, not {head_dim}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        served = device_type == "cpu" and dtype == torch.float32
        return None if served else "needs a CPU and float32 while TRITON_INTERPRET is 1"
    if device_type != "cuda" or not _ampere():
        return "needs a GPU of compute capability 8.0 or newer"
    if dtype not in _HALF:
        return "needs float16 or bfloat16"
    return None


@cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _ampere() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
