"""The size of a model from its config.json, without loading it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from kv_transition.data import model_files
from kv_transition.errors import UserError
from kv_transition.sections import Model

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
RECENT = 64
"""number of queries that a prefill keeps: WINDOW of cache.state, repeated here to avoid importing torch"""


@dataclass(frozen=True)
class ModelSize:
    """The size of a decoder with gated feed-forward layers, as in all current families."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    experts: int = 1

    @property
    def parameters(self) -> int:
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        feed_forward = 3 * self.hidden * self.intermediate * self.experts
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * (attention + feed_forward) + embeddings

    def weight_bytes(self, model: Model) -> int:
        if model.quantization is None:
            return self.parameters * BYTES[model.dtype]
        # 4 bits, and half a bit for quantization constants
        return int(self.parameters * 4.5 / 8)

    def cache_bytes(self, tokens: int, dtype: str) -> int:
        """Return the bytes of keys and values of ``tokens`` tokens in all layers; exact without sliding windows."""
        return 2 * self.layers * self.kv_heads * self.head_dim * tokens * BYTES[dtype]

    def stored_bytes(self, tokens: int, dtype: str, statistics: Collection[str]) -> int:
        """Return the bytes of a stored prefill: keys, values, positions (int64) and statistics.

        Most statistics of `cache.state.LayerCache` are stored twice, for the end of the context and the end of the
        prompt.
        """
        each = {
            "attn_sum": 2 * self.kv_heads * tokens * 4,
            "query_entropy": self.kv_heads * tokens * 4,
            "output_norm": self.kv_heads * tokens * 4,
            "reconstruction": self.kv_heads * tokens * 4,
            "recent_queries": 2 * self.heads * min(RECENT, tokens) * self.head_dim * BYTES[dtype],
            "query_mean": 2 * self.heads * self.head_dim * 4,
            "query_cov": 2 * self.heads * self.head_dim**2 * 4,
        }
        layer = self.kv_heads * tokens * 8 + sum(each[name] for name in statistics)
        return self.cache_bytes(tokens, dtype) + self.layers * layer


def model_size(model: Model) -> ModelSize | None:
    """Return the size of a model; None if its config is damaged or not found in its folder, file or the hub's cache."""
    try:
        config = model_files.read_config(model.name, model.revision)
    except UserError:
        return None
    return None if config is None else read_size(config)


def read_size(config: dict[str, Any]) -> ModelSize | None:
    """Return the size from the content of a config; None if it lacks the usual keys."""
    config = model_files.text_of(config)
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return ModelSize(
            layers=config["num_hidden_layers"],
            hidden=hidden,
            intermediate=config.get("moe_intermediate_size") or config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            vocabulary=config["vocab_size"],
            tied=config.get("tie_word_embeddings", False),
            experts=config.get("num_local_experts") or config.get("num_experts") or 1,
        )
    except (KeyError, TypeError, ZeroDivisionError):
        return None
