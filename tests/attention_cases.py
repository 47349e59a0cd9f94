"""Reference attention from its definition in fp64, and random cases for comparing implementations with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def eager(
    queries: Tensor, keys: Tensor, scale: float, window: int | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return column sums [B, Hkv, n] and entropy [B, q] from a softmax over the whole matrix; queries are [B, H, q,
    d]."""
    batch, heads, q, _ = queries.shape
    kv_heads, n = keys.shape[1:3]
    group = heads // kv_heads
    logits = queries.double() @ keys.double().repeat_interleave(group, 1).mT * scale
    if bias is not None:
        logits = logits + bias.double().repeat_interleave(group, 1)[:, :, None]
    position = torch.arange(n - q, n, device=keys.device)[:, None]
    entry = torch.arange(n, device=keys.device)[None, :]
    seen = entry <= position
    if window is not None:
        seen = seen & (position - entry < window)
    p = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)
    sums = p.sum(2).view(batch, kv_heads, group, n).mean(2)
    return sums, -torch.xlogy(p, p).sum(-1).mean(1)


@dataclass(frozen=True)
class Case:
    """One random attention case. peak: factor on the logits; 0.01 gives flat attention, 8 puts nearly all of it on a
    few entries."""

    batch: int = 1
    kv_heads: int = 2
    group: int = 3
    q: int = 50
    n: int = 50
    d: int = 32
    window: int | None = None
    bias: str = "none"
    peak: float = 1.0
    seed: int = 0

    @property
    def scale(self) -> float:
        return self.peak * self.d**-0.5

    def tensors(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor | None]:
        generator = torch.Generator().manual_seed(self.seed)
        queries = torch.randn(self.batch, self.kv_heads * self.group, self.q, self.d, generator=generator)
        keys = torch.randn(self.batch, self.kv_heads, self.n, self.d, generator=generator)
        bias = None
        if self.bias != "none":
            bias = torch.randint(1, 9, keys.shape[:-1], generator=generator).float().log()
            if self.bias == "padded":
                # the first sequence is half left padding, so that its first queries may attend to nothing
                bias[0, :, : self.n // 2] = -torch.inf
            bias = bias.to(device)
        return queries.to(device, dtype), keys.to(device, dtype), bias
