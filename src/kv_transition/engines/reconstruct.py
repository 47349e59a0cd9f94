"""The attention that entries receive while the model repeats their text.

Source: Kim et al., "KVzip: query-agnostic KV cache compression with context reconstruction", arXiv 2505.23416.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kv_transition.attention.blocks import logits_of
from kv_transition.cache.state import CacheState, LayerCache

CHUNK = 2000
"""number of tokens that are repeated at a time"""
_SINKS = 4
"""number of first tokens of the text that are part of the softmax"""
_BEFORE = 8
"""number of last tokens of the previous piece that are quoted to show where to begin"""
_ROWS = 256
"""number of queries whose attention is held at once"""

_ALL = "\n\nRepeat the previous context exactly."
_PART = "\n\nRepeat the part of the previous context exactly, starting with"


def reconstructed(engine: Any, state: CacheState, tokens: Sequence[int]) -> CacheState:
    """Return the state with ``reconstruction`` of its last entries, those of ``tokens``, which were read last.

    On top of the state, the model reads the request to repeat the text and then the text itself, one chunk at a time.
    The value of an entry is the greatest attention that any query head of its group pays to it while its chunk is
    repeated; the softmax covers the sinks, the chunk and the repeated tokens. The cache of this reading is discarded.
    """
    count = len(tokens)
    behind = _behind(engine.tokenizer)
    found: list[list[Tensor]] = []
    for start in range(0, count, CHUNK):
        chunk = list(tokens[start : start + CHUNK])
        asked = _ids(engine.tokenizer, _PART if start else _ALL) + list(tokens[max(0, start - _BEFORE) : start])
        watch = _Watch(state, count - start, len(chunk))
        # separate storage, so that the reading does not use the free space behind the state
        engine.extend(state.settled(), [*asked, *behind, *chunk], frozenset(), before_attention=watch)
        found.append(watch.found)
    layers, number = [], 0
    for layer in state.layers:
        if layer.window is not None:
            layers.append(layer)
            continue
        parts = []
        for part in layer.parts:
            own = torch.cat([chunk[number] for chunk in found], -1)
            parts.append(replace(part, reconstruction=torch.cat([part.reconstruction[..., :-count], own], -1)))
            number += 1
        layers.append(layer.with_parts(parts))
    return replace(state, layers=tuple(layers))


class _Watch:
    """Records the greatest attention to one chunk's entries; called before the attention of each part of the evictable
    layers.

    The position of the chunk's entries is counted from the end of the part as it was in ``state``. An engine with
    ``chunk_tokens`` reads in several passes; the entries of earlier passes are behind those entries.
    """

    def __init__(self, state: CacheState, from_end: int, length: int):
        self.ends = [part.n for layer in state.evictable for part in layer.parts]
        self.from_end, self.length = from_end, length
        self.found: list[Tensor] = []
        """greatest attention [Hkv, length] of each part"""
        self.calls = 0

    def __call__(self, layer: LayerCache, queries: Tensor, keys: Tensor) -> LayerCache:
        number = self.calls % len(self.ends)
        self.calls += 1
        end = self.ends[number]
        start = end - self.from_end
        sinks = min(_SINKS, start)
        own = layer.keys[:, start : start + self.length]
        seen = torch.cat([layer.keys[:, :sinks], own, layer.keys[:, end:], keys.to(layer.keys.dtype)], 1)
        q = queries.shape[1]
        before = seen.shape[1] - q
        place = torch.arange(seen.shape[1], device=keys.device) - before
        best = torch.zeros(seen.shape[0], self.length, device=keys.device)
        for first in range(0, q, _ROWS):
            rows = queries[:, first : first + _ROWS]
            at = first + torch.arange(rows.shape[1], device=keys.device)
            logits = logits_of(rows, seen, layer.scale).masked_fill_(place > at[:, None], -torch.inf)
            paid = logits.softmax(-1)[..., sinks : sinks + self.length]
            best = torch.maximum(best, paid.amax((1, 2)))
        if number < len(self.found):
            self.found[number] = torch.maximum(self.found[number], best)
        else:
            self.found.append(best)
        return layer


def _ids(tokenizer: Any, text: str) -> list[int]:
    return [] if tokenizer is None else list(tokenizer.encode(text, add_special_tokens=False))


def _behind(tokenizer: Any) -> list[int]:
    """Return the tokens between the user's text and the answer by the chat template; without one, a line break."""
    if tokenizer is None:
        return []
    if not getattr(tokenizer, "chat_template", None):
        return _ids(tokenizer, "\n")
    mark = "kv-transition"
    filled = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], add_generation_prompt=True, tokenize=False
    )
    return _ids(tokenizer, filled.rpartition(mark)[2])
