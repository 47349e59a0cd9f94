"""Caches of random tensors together with the attention that produced them, as an independent reference."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from kv_transition.cache.rotary import Rotary
from kv_transition.cache.state import WINDOW, CacheState, LayerCache

H, HKV, D = 4, 2, 8
GROUP = H // HKV
FREQUENCIES = (1.0, 0.31, 0.07, 0.011)


@dataclass
class Written:
    """The full attention of a layer: fp64, un-rotated queries [H, n, d], keys and values [Hkv, n, d], weights [H, n,
    n]."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    weights: torch.Tensor
    scale: float


def rotated(x: torch.Tensor, positions) -> torch.Tensor:
    """Return x [..., n, d] rotated to ``positions`` [n] in fp64; pairs of channels are treated as complex numbers."""
    places = torch.tensor([float(p) for p in positions], dtype=torch.float64)
    angle = places[:, None] * torch.tensor(FREQUENCIES, dtype=torch.float64)
    first, second = x.double().chunk(2, -1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


def softmax_rows(logits: torch.Tensor) -> torch.Tensor:
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -torch.inf).softmax(-1)


def written(n: int, seed: int, peaked: float = 3.0) -> Written:
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(heads, n, D, generator=generator, dtype=torch.float64)

    queries, keys, values = draw(H) * peaked, draw(HKV), draw(HKV)
    scale = 0.3
    q, k = rotated(queries, range(n)), rotated(keys, range(n)).repeat_interleave(GROUP, 0)
    return Written(queries, keys, values, softmax_rows(q @ k.mT * scale), scale)


def layer_of(truth: Written, dtype: torch.dtype = torch.float32) -> LayerCache:
    n = truth.keys.shape[1]
    weights = truth.weights
    entropy = -(weights * weights.clamp_min(1e-300).log()).sum(-1).mean(0)
    later = truth.queries[:, 4:]
    mean = later.mean(1) if n > 4 else truth.queries.new_zeros(H, D)
    centred = later - mean[:, None]
    return LayerCache(
        keys=rotated(truth.keys, range(n)).to(dtype),
        values=truth.values.to(dtype),
        positions=torch.arange(n).expand(HKV, n).clone(),
        scale=truth.scale,
        attn_sum=weights.sum(1).view(HKV, GROUP, n).mean(1).float(),
        query_entropy=entropy.expand(HKV, n).float().clone(),
        output_norm=truth.values.abs().sum(-1).float() + 0.1 * torch.arange(n),
        reconstruction=weights.amax(1).view(HKV, GROUP, n).amax(1).float(),
        recent_queries=rotated(truth.queries, range(n))[:, -WINDOW:].to(dtype),
        query_mean=mean.float(),
        query_cov=(centred.mT @ centred / max(n - 4, 1)).float(),
        rotary=Rotary(FREQUENCIES),
    )


def random_state(
    n: int, seed: int = 0, layers: int = 3, dtype: torch.dtype = torch.float32
) -> tuple[CacheState, list[Written]]:
    truths = [written(n, seed * 100 + number) for number in range(layers)]
    return CacheState(tuple(layer_of(t, dtype) for t in truths), length=n, logits=torch.zeros(5)), truths


def grown(state: CacheState, more: int, seed: int = 0) -> CacheState:
    """Return the state with random new entries, whose statistics are random as well."""
    generator = torch.Generator().manual_seed(seed)
    at = state.length + torch.arange(more)

    def part_grown(part: LayerCache) -> LayerCache:
        heads = part.positions.shape[0]
        keys, values = (torch.randn(heads, more, D, generator=generator).to(part.values.dtype) for _ in range(2))
        angles = None if not state.shift else (at - state.shift).float().expand(heads, more)
        new = part.append(keys, values, at.expand(heads, more), angles, 0)
        q = torch.randn(heads * GROUP, more, D, generator=generator).to(part.values.dtype)
        recent = torch.cat([part.recent_queries, q], 1)[:, -WINDOW:]
        drawn = torch.rand(heads, new.n, generator=generator)
        entropy = new.query_entropy.clone()
        entropy[:, -more:] = torch.rand(more, generator=generator) * math.log(state.length)
        return replace(new, recent_queries=recent, attn_sum=new.attn_sum + drawn, query_entropy=entropy)

    layers = []
    for layer in state.layers:
        parts = tuple(part_grown(part) for part in layer.parts)
        layers.append(parts[0] if isinstance(layer, LayerCache) else type(layer)(parts))
    return replace(state, layers=tuple(layers), length=state.length + more)


def best(scores: list[float], k: int) -> list[int]:
    """Return the indices of the k highest scores; of equal scores the lower index comes first."""
    return sorted(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:k])


def positions_of(state: CacheState) -> list[list[list[int]]]:
    """Return the positions that every head of every layer holds."""
    return [[row for part in layer.parts for row in part.positions.tolist()] for layer in state.layers]
