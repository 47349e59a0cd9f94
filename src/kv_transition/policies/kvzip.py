"""KVzip: entries that the model attends to when it repeats the context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor

from kv_transition.cache.state import LayerCache
from kv_transition.policies._scored import Scored


@dataclass(frozen=True)
class KVzip(Scored):
    """After the text is read, the model is asked to repeat it and reads it again in pieces of 2000 tokens. The
    importance of an entry is the greatest attention that any query of its group pays to it while its own piece is
    repeated; the attention is computed over the sinks, that piece and the repeated tokens. The question is not used, so
    one compressed cache serves any question. All heads of all layers share the budget, and each keeps at least one
    entry. Entries that were not repeated, such as the tokens of an answer, are kept. In a conversation each turn is
    repeated when it is over, with its answer. With ``decoding.compress_every`` the model repeats
    what it has generated since the last compression before the next one.

    Source: Kim et al., "KVzip: query-agnostic KV cache compression with context reconstruction", arXiv 2505.23416.

    Cost: the text is read twice more, once to repeat it and once for its attention to itself, and the cache is copied
    meanwhile; O(N d) per token of a piece. Decoding computes attention head by head.

    Differences: the authors never evict the tokens before the context in the prompt template, and these are the sinks
    in their scores; here these tokens are repeated with the rest, and the first ``n_sink`` tokens are kept. A head of
    theirs may lose all of its entries. kvpress repeats 2048 tokens at a time, masks the entries that it evicts and does
    not free them. The authors compress before the question is known. In the mode ``after_prompt`` the entries of the
    question compete with those of the context, and most of them may be evicted; ``window`` keeps the last entries.
    """

    statistics = frozenset({"reconstruction"})

    n_sink: Annotated[int, (0, None)] = 4
    """first tokens of the text that are kept"""
    allocation: Literal["uniform", "pyramid", "cake", "adaptive", "global"] = "global"
    """how layers and heads share the budget"""

    def importance(self, layer: LayerCache, index: int, k: int, length: int, seed: int) -> Tensor:
        return layer.reconstruction
