"""The attention output, from FlashAttention 2 if it is installed, else from torch."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from kv_transition.errors import UserError

IMPLEMENTATIONS = ("auto", "sdpa", "flash_attention_2")


def choose(implementation: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the implementation that ``auto`` means. Raises UserError if the requested one cannot run here."""
    usable = (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and importlib.util.find_spec("flash_attn") is not None
    )
    if implementation == "auto":
        return "flash_attention_2" if usable else "sdpa"
    if implementation == "flash_attention_2" and not usable:
        raise UserError(
            "model.attn_implementation: flash_attention_2 needs flash-attn, a cuda device and a model.dtype "
            "of bfloat16 or float16; use auto or sdpa"
        )
    return implementation


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    *,
    window: int | None = None,
    bias: Tensor | None = None,
    implementation: str = "sdpa",
) -> Tensor:
    """Return the attention of the newest q tokens over all n entries, the last q of which are their own: [B, H, q, d].

    queries [B, H, q, d]; keys, values [B, Hkv, n, d]. A query sees every entry up to its own, or the last ``window`` of
    them. bias [B, Hkv, n] is added to the logits.
    """
    q, n = queries.shape[2], keys.shape[2]
    window = None if window is None or n <= window else window
    if implementation == "flash_attention_2" and bias is None:
        return _flash_attention_2(queries, keys, values, scale, window)
    if window is not None and q == 1:
        keys, values = keys[:, :, -window:], values[:, :, -window:]
        bias = None if bias is None else bias[..., -window:]
    elif window is not None:
        return _in_window(queries, keys, values, scale, window, bias)
    if q == 1:
        return _one_token(queries, keys, values, scale, bias)
    mask, causal = (causal_lower_right(q, n), False) if q < n else (None, True)
    if bias is not None:
        mask, causal = _biased(bias, queries, n), False
    gqa = queries.shape[1] != keys.shape[1]
    return functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=gqa
    )


def _one_token(queries: Tensor, keys: Tensor, values: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Return the attention of one query per head: the heads of a group are rows, so that keys are read once."""
    batch, heads, _, d = queries.shape
    kv_heads = keys.shape[1]
    rows = queries.reshape(batch, kv_heads, heads // kv_heads, d)
    mask = None if bias is None else bias.unsqueeze(2).to(queries.dtype)
    return functional.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale).reshape(
        batch, heads, 1, values.shape[-1]
    )


def _biased(bias: Tensor, queries: Tensor, n: int) -> Tensor:
    """Return the mask [B, H, q, n]: the bias of every visible entry, -inf for the others."""
    q, group = queries.shape[2], queries.shape[1] // bias.shape[1]
    future = torch.ones(q, n, dtype=torch.bool, device=bias.device).triu_(n - q + 1)
    per_head = bias.repeat_interleave(group, 1).unsqueeze(2)
    return per_head.masked_fill(future, -torch.inf).to(queries.dtype)


def _in_window(queries: Tensor, keys: Tensor, values: Tensor, scale: float, window: int, bias: Tensor | None) -> Tensor:
    """Return sliding-window attention in O(q window): blocks of queries over the keys that any of them sees."""
    q, n = queries.shape[2], keys.shape[2]
    gqa = queries.shape[1] != keys.shape[1]
    outputs = []
    for start in range(0, q, window):
        stop = min(start + window, q)
        low, high = max(0, n - q + start - window + 1), n - q + stop
        at = torch.arange(n - q + start, high, device=keys.device)[:, None]
        entry = torch.arange(low, high, device=keys.device)[None]
        mask = (entry <= at) & (entry > at - window)
        if bias is not None:
            per_head = bias[..., low:high].repeat_interleave(queries.shape[1] // bias.shape[1], 1).unsqueeze(2)
            mask = per_head.masked_fill(~mask, -torch.inf).to(queries.dtype)
        outputs.append(
            functional.scaled_dot_product_attention(
                queries[:, :, start:stop],
                keys[:, :, low:high],
                values[:, :, low:high],
                attn_mask=mask,
                scale=scale,
                enable_gqa=gqa,
            )
        )
    return torch.cat(outputs, dim=2)


@cache
def _flash_attn_func():
    from flash_attn import flash_attn_func

    return flash_attn_func


def _flash_attention_2(queries: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
    # its causal mask is aligned to the last query and key, as in this project
    output = _flash_attn_func()(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )
    return output.transpose(1, 2)
