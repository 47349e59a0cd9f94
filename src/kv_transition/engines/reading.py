"""One forward pass of a transformers model over new tokens on top of a cache."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kv_transition.attention.statistics import attention_statistics
from kv_transition.cache.quantize import Packed
from kv_transition.cache.rotary import Rotary
from kv_transition.cache.state import EVERY, WINDOW, CacheState, Layer, LayerCache
from kv_transition.engines.attend import attend
from kv_transition.engines.projection import output_norm
from kv_transition.errors import UserError

BeforeAttention = Callable[[LayerCache, Tensor, Tensor], LayerCache]
"""The change of an evictable layer when the rotated queries and keys of the new tokens are known"""

ATTENTION = "kv_transition"
"""name of this project's attention function in transformers"""

_SINKS = 4
"""number of first tokens that are omitted from the queries' moments, because their queries differ from all others"""


INTERRUPTED: ContextVar[Callable[[], bool] | None] = ContextVar("INTERRUPTED", default=None)
"""For each thread: function that is called at each layer and returns whether to interrupt the pass; None: never"""


class InterruptedReadingError(Exception):
    """A pass through the model was interrupted, because its result is no longer needed."""


class Reading:
    """New tokens on top of a state, in the form of a transformers cache.

    Each layer calls `update` with its new keys and values; the attention function then calls `attend`. The masks of
    transformers cannot describe evicted states, whose layers hold different numbers of entries. No entry of these is
    masked: a new token sees every remaining entry and the new tokens up to itself.
    """

    is_compileable = False
    last_only = False
    """whether of the last layer's output only the last token's is needed"""

    def __init__(
        self,
        state: CacheState,
        q: int,
        *,
        statistics: frozenset[str],
        room: int,
        rotaries: list[Rotary | None],
        windows: list[int | None],
        implementations: tuple[str, str],
        device: torch.device,
        seen: list[Tensor] | None = None,
        before_attention: BeforeAttention | None = None,
        projections: list[Tensor] | None = None,
    ):
        """Set up the reading of ``q`` tokens.

        room: number of entries to leave space for. rotaries, windows: of each layer. implementations: of output and
        statistics. seen: receives each evictable layer's column sums, if ``attn_sum`` is maintained. projections:
        output projection of each layer by query head, if ``output_norm`` is maintained.
        """
        self.state = state
        self.statistics = statistics
        self.room = room
        self.rotaries, self.windows = rotaries, windows
        self.output_by, self.statistics_by = implementations
        self.seen = seen
        self.before_attention = before_attention
        self.projections = projections
        self.interrupted = INTERRUPTED.get()
        self.read: list[Layer] = []
        steps = torch.arange(q, device=device)
        # [q], or [B, 1, q] of a batch
        self.positions = state.length + steps
        self.turned = self.positions - state.shift
        self.shifted = isinstance(state.shift, Tensor) or state.shift != 0

    @property
    def position_ids(self) -> Tensor:
        """Return positions [B, q]; after an eviction they differ from the numbers of entries before each token."""
        return self.turned.reshape(-1, self.turned.shape[-1])

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return the new tokens' own keys and values, because transformers does not need those before them."""
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Return the output [B, H, q, d] for queries [B, H, q, d] and the new tokens' keys, values [B, Hkv, q, d].

        Raises InterruptedReadingError if the function in `INTERRUPTED` returns true.
        """
        if self.interrupted is not None and self.interrupted():
            raise InterruptedReadingError
        batched = isinstance(self.state.length, Tensor)
        if not batched:
            queries, keys, values = queries[0], keys[0], values[0]
        old = self.state.layers[layer] if self.state.layers else self._empty(layer, queries, keys, scale)
        group = queries.shape[-3] // keys.shape[-3]
        # the last layer's output is the same for every token if only the last token's is needed
        asked = slice(-1, None) if self.last_only and layer == len(self.windows) - 1 else slice(None)
        outputs, parts, first = [], [], 0
        for part in old.parts:
            heads = part.positions.shape[-2]
            kv, own = slice(first, first + heads), slice(first * group, (first + heads) * group)
            projection = None if self.projections is None else self.projections[layer][own]
            output, grown = self._attend_part(
                part, queries[..., own, :, :], keys[..., kv, :, :], values[..., kv, :, :], asked, batched, projection
            )
            outputs.append(output)
            parts.append(grown)
            first += heads
        self.read.append(old.with_parts(parts))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _attend_part(
        self,
        old: LayerCache,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        asked: slice,
        batched: bool,
        projection: Tensor | None,
    ) -> tuple[Tensor, LayerCache]:
        if self.before_attention is not None and old.window is None:
            old = self.before_attention(old, queries, keys)
        device = keys.device
        at = keys.shape[:-1]
        positions = self.positions.to(device).expand(at)
        angles = self.turned.to(device, torch.float32).expand(at) if self.shifted else None
        new = old.append(keys, values, positions, angles, self.room)
        k, v = (t.dense() if isinstance(t, Packed) else t for t in (new.keys, new.values))
        needed = queries[..., asked, :]
        output = attend(
            needed if batched else needed[None],
            k if batched else k[None],
            v if batched else v[None],
            new.scale,
            window=new.window,
            bias=None if new.bias is None else new.bias if batched else new.bias[None],
            implementation=self.output_by,
        ).expand(-1, -1, queries.shape[-2], -1)
        if new.window is not None:
            # keep one entry more than the next token sees, so that the last token can be removed again
            return output, replace(new.cut(max(0, new.n - new.window), new.n), room=None)
        return output, self._with_statistics(new, queries, k, projection)

    def _with_statistics(self, new: LayerCache, queries: Tensor, keys: Tensor, projection: Tensor | None) -> LayerCache:
        kept = self.statistics
        changed: dict[str, Tensor | None] = {name: None for name in EVERY - kept if getattr(new, name) is not None}
        if not kept:
            return replace(new, **changed) if changed else new
        if kept & {"attn_sum", "query_entropy"}:
            found = attention_statistics(
                queries,
                keys,
                new.scale,
                column_sums="attn_sum" in kept,
                entropy="query_entropy" in kept,
                bias=new.bias,
                implementation=self.statistics_by,
            )
            if "attn_sum" in kept:
                changed["attn_sum"] = new.attn_sum + found.column_sums
                if self.seen is not None:
                    self.seen.append(found.column_sums)
            if "query_entropy" in kept:
                q = queries.shape[-2]
                own = found.entropy.unsqueeze(-2).expand(*new.positions.shape[:-1], q)
                changed["query_entropy"] = torch.cat([new.query_entropy[..., :-q], own], -1)
        if "recent_queries" in kept:
            # a copy, because a view of 64 queries would keep those of the whole prompt alive
            changed["recent_queries"] = torch.cat([new.recent_queries, queries], -2)[..., -WINDOW:, :].clone()
        if "output_norm" in kept:
            q = queries.shape[-2]
            own = output_norm(new.values[..., -q:, :], projection)
            changed["output_norm"] = torch.cat([new.output_norm[..., :-q], own], -1)
        if kept & {"query_mean", "query_cov"} and new.rotary is not None:
            changed["query_mean"], changed["query_cov"] = self._moments(new, queries)
        return replace(new, **changed)

    def _moments(self, old: LayerCache, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and covariance of all un-rotated queries after the first ones, including the new ones."""
        if isinstance(self.state.length, Tensor):
            raise UserError("query_mean and query_cov are computed for one sequence at a time, not for a batch")
        seen = max(self.state.length - _SINKS, 0)
        skipped = max(_SINKS - self.state.length, 0)
        queries, turned = queries[:, skipped:], self.turned[skipped:].to(queries.device)
        m = queries.shape[1]
        if m == 0:
            return old.query_mean, old.query_cov
        plain = old.rotary.turn(queries.float(), -turned)
        mean = plain.mean(1)
        centred = plain - mean.unsqueeze(1)
        scatter = centred.transpose(1, 2) @ centred
        # combine the moments of two samples (Chan, Golub and LeVeque 1979)
        between = mean - old.query_mean
        total = seen + m
        outer = between.unsqueeze(2) * between.unsqueeze(1)
        cov = (old.query_cov * seen + scatter + outer * (seen * m / total)) / total
        return old.query_mean + between * (m / total), cov

    def _empty(self, layer: int, queries: Tensor, keys: Tensor, scale: float) -> LayerCache:
        heads, d = queries.shape[-3], queries.shape[-1]
        at = (*keys.shape[:-2], 0)
        window, rotary = self.windows[layer], self.rotaries[layer]
        kept = self.statistics if window is None else frozenset()
        fp32 = {"dtype": torch.float32, "device": keys.device}
        statistics = {
            "attn_sum": lambda: torch.zeros(at, **fp32),
            "query_entropy": lambda: torch.zeros(at, **fp32),
            "output_norm": lambda: torch.zeros(at, **fp32),
            "reconstruction": lambda: torch.zeros(at, **fp32),
            "recent_queries": lambda: queries[..., :0, :],
            "query_mean": lambda: torch.zeros(heads, d, **fp32) if rotary else None,
            "query_cov": lambda: torch.zeros(heads, d, d, **fp32) if rotary else None,
        }
        return LayerCache(
            keys=keys[..., :0, :],
            values=keys.new_empty(*keys.shape[:-2], 0, keys.shape[-1]),
            positions=torch.zeros(at, dtype=torch.int64, device=keys.device),
            scale=scale,
            rotary=rotary,
            window=window,
            **{name: make() for name, make in statistics.items() if name in kept},
        )


def attention_function(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    reading: Reading | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return [B, q, H, d] for each layer's query [B, H, q, d], key and value [B, Hkv, q, d]; transformers calls it.

    Raises UserError for a model with another kind of attention, because ignoring a part of it would give wrong answers.
    """
    extra = {
        "learned attention sinks": s_aux is not None,
        "a bias of positions": position_bias is not None,
        "an attention mask of its own": attention_mask is not None,
        "keys and values of different sizes": key.shape[-1] != value.shape[-1],
    }
    if found := [name for name, there in extra.items() if there]:
        raise UserError(
            f"model.name: {type(module).__name__} has {found[0]}, which is not supported; choose another model"
        )
    if softcap is not None:
        raise UserError(
            f"model.name: {type(module).__name__} caps its attention logits, which the attention statistics do not "
            "support; choose a model without a soft cap"
        )
    if reading is None:
        raise UserError(
            f"model.name: {type(module).__name__} does not pass on what transformers' attention interface needs; "
            "choose another model"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return reading.attend(module.layer_idx, query, key, value, scale).transpose(1, 2), None
