"""ChunkKV: chunks of neighbouring tokens stay or go as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from kv_transition.cache.state import LayerCache
from kv_transition.policies.snapkv import SnapKV


@dataclass(frozen=True)
class ChunkKV(SnapKV):
    """The entries of a layer are cut, from the front, into chunks of ``chunk``; a chunk scores the mean of SnapKV's
    scores of its entries that are not protected, over all KV heads. The best chunks stay, in all heads the same ones;
    of the last chunk that has a place only as many entries as K leaves, from its front. Equal chunks go to the lower
    position.

    Source: Liu et al., "ChunkKV: semantic-preserving KV cache compression for efficient long-context LLM inference",
    arXiv 2502.00299.

    Cost: as snapkv.

    Differences: as snapkv; the paper lets neighbouring layers share their chunks to save time, here each layer chooses.
    kvpress keeps whole chunks only, int(chunks (1 - compression_ratio)) of them, and counts the window's entries as the
    best ones into the mean of their chunks.
    """

    chunk: Annotated[int, (1, 65_536)] = 20
    """entries of a chunk"""

    def plain_score(self, layer: LayerCache, index: int, k: int, length: int, seed: int) -> Tensor:
        score = super().plain_score(layer, index, k, length, seed)
        shielded = score.isinf()
        chunks = -(-layer.n // self.chunk)
        of_chunk = torch.arange(layer.n, device=score.device) // self.chunk
        free = (~shielded).sum(0).to(torch.float64)
        sums = score.masked_fill(shielded, 0).sum(0, dtype=torch.float64)
        total, count = (torch.zeros(chunks, dtype=torch.float64, device=score.device) for _ in range(2))
        means = total.index_add(0, of_chunk, sums) / count.index_add(0, of_chunk, free).clamp_min(1)
        # the best chunk scores as many as there are chunks, the last one 1
        order = means.sort(descending=True, stable=True).indices
        places = torch.empty_like(means, dtype=torch.float32)
        places[order] = torch.arange(chunks, 0, -1, dtype=torch.float32, device=score.device)
        return places[of_chunk].expand(score.shape).masked_fill(shielded, torch.inf)
