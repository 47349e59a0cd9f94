"""KeyDiff: entries whose keys differ most from the mean key."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from kv_transition.cache.state import LayerCache
from kv_transition.policies._scored import Scored


@dataclass(frozen=True)
class KeyDiff(Scored):
    """Keeps the entries whose keys have the smallest cosine with the mean of the head's normalised keys.

    Source: Park et al., "KeyDiff: key similarity-based KV cache eviction for long-context LLM inference in
    resource-constrained environments", arXiv 2504.15364.

    Cost: O(N d) time, no statistic.

    Differences: acts once on the whole prompt; the paper evicts block by block while it reads. kvpress
    computes in the cache's dtype, where bf16 makes ties; here it is fp32.
    """

    def importance(self, layer: LayerCache, index: int, k: int, length: int, seed: int) -> Tensor:
        keys = functional.normalize(layer.keys.float(), dim=-1)
        return -functional.cosine_similarity(keys, keys.mean(-2, keepdim=True), dim=-1)
