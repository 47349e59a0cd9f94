"""KVzip: entries that the model needs to repeat the context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor

from kv_transition.cache.state import LayerCache
from kv_transition.policies._scored import Scored


@dataclass(frozen=True)
class KVzip(Scored):
    """After the text is read, the model is asked to repeat it and reads it again, 2000 tokens at a time; an entry's
    importance is the greatest attention that any query of its group pays to it while its own piece is repeated, among
    the sinks, that piece and the repeated tokens. No question is known: what is kept serves any. All heads of all
    layers share the budget, each with at least one entry. Entries that were not repeated, such as the tokens of an
    answer, are kept. In a conversation each turn is repeated when it is over, with its answer.

    Source: Kim et al., "KVzip: query-agnostic KV cache compression with context reconstruction", arXiv 2505.23416.

    Cost: the text is read twice more, once to repeat it and once in attention to itself, and the cache is copied while
    that lasts; O(N d) per token of a piece. Decoding attends head by head.

    Differences: the authors never evict what stands before the context in the prompt's template; here it is repeated
    with the rest, and the first ``n_sink`` tokens are kept. kvpress masks what it evicts rather than freeing it.
    """

    statistics = frozenset({"reconstruction"})

    n_sink: Annotated[int, (0, None)] = 4
    """first tokens of the text that are kept"""
    allocation: Literal["uniform", "pyramid", "cake", "adaptive", "global"] = "global"
    """how layers and heads share the budget"""

    def importance(self, layer: LayerCache, index: int, k: int, length: int, seed: int) -> Tensor:
        return layer.reconstruction
