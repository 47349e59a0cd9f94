"""ChunkKV: chunks of neighbouring tokens are kept or evicted as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from kv_transition.cache.state import LayerCache
from kv_transition.policies.snapkv import SnapKV


@dataclass(frozen=True)
class ChunkKV(SnapKV):
    """Cuts the entries of a layer, from the front, into chunks of ``chunk`` entries. The score of a chunk is the mean
    of SnapKV's scores over its entries that are not protected and over all KV heads. The chunks with the highest scores
    stay, the same ones in all heads. If the last of them does not fit as a whole, its first entries fill the budget.
    Equal scores go to the chunk at the lower position.

    Source: Liu et al., "ChunkKV: semantic-preserving KV cache compression for efficient long-context LLM inference",
    arXiv 2502.00299.

    Cost: as snapkv.

    Differences: as snapkv; in the paper neighbouring layers share their chunks to save time, here each layer chooses
    its own. kvpress keeps whole chunks only, int(chunks (1 - compression_ratio)) of them, and includes the window's
    entries, with the highest score, in the mean of their chunks.
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
        # each entry gets the rank of its chunk: from the number of chunks (best) to 1
        order = means.sort(descending=True, stable=True).indices
        places = torch.empty_like(means, dtype=torch.float32)
        places[order] = torch.arange(chunks, 0, -1, dtype=torch.float32, device=score.device)
        return places[of_chunk].expand(score.shape).masked_fill(shielded, torch.inf)
