"""A transformers model on this machine, read into and out of `CacheState`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from kv_transition.attention.blocks import attention_sums
from kv_transition.cache.state import WINDOW, CacheState, LayerCache
from kv_transition.cache.store import Prefill
from kv_transition.errors import UserError

ATTENTION = "kv_transition"
"""name of our attention function in transformers; the kernel under it is torch's SDPA"""

STATISTICS = frozenset({"attn_sum"})
"""running statistics that this engine can keep up"""


class _Reading:
    """One forward pass over new tokens on top of a state; transformers takes it for its cache.

    `update` is called by each layer with its new keys and values, `attend` by our attention function afterwards.
    """

    def __init__(self, state: CacheState, statistics: frozenset[str]):
        self.state = state
        self.statistics = statistics
        self.layers: list[LayerCache] = []

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """keys, values: [1, Hkv, q, d] of the new tokens -> of all entries."""
        if layer_idx < len(self.state.layers):
            old = self.state.layers[layer_idx]
            keys = torch.cat([old.keys[None], keys], dim=2)
            values = torch.cat([old.values[None], values], dim=2)
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        return self.state.length

    def attend(self, layer_idx: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        """queries [H, q, d] of the new tokens; keys and values [Hkv, n, d] of all entries."""
        q = queries.shape[1]
        kv_heads = keys.shape[0]
        new = torch.arange(self.state.length, self.state.length + q, device=keys.device).expand(kv_heads, q)
        kept_up = "attn_sum" in self.statistics
        # What is not kept up is NaN rather than a number that looks like a statistic.
        fresh = torch.full((kv_heads, q), 0.0 if kept_up else torch.nan, dtype=torch.float32, device=keys.device)
        if self.state.layers:
            old = self.state.layers[layer_idx]
            positions = torch.cat([old.positions, new], dim=1)
            recent = torch.cat([old.recent_queries, queries], dim=1)
            attn_sum = torch.cat([old.attn_sum, fresh], dim=1)
        else:
            positions, recent, attn_sum = new, queries, fresh
        if kept_up:
            attn_sum = attn_sum + attention_sums(queries, keys, scale)
        # a copy, lest a view of 64 queries keeps those of the whole prompt alive
        recent = recent[:, -WINDOW:].clone()
        self.layers.append(LayerCache(keys, values, positions, attn_sum, recent, scale))


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    reading: _Reading,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [1, H, q, d] on key, value [1, Hkv, n, d], the new tokens' entries last -> [1, q, H, d].

    Evicted states have entries that no mask of transformers describes, different numbers in each layer even; so
    the mask is made here: a new token sees every entry that is left, and the new ones up to itself.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, n = query.shape[2], key.shape[2]
    mask = causal_lower_right(q, n) if 1 < q < n else None
    output = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=1 < q == n, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    reading.attend(module.layer_idx, query[0], key[0], value[0], scale)
    return output.transpose(1, 2), None


class LocalEngine:
    """Greedy or sampled decoding of one sequence at a time, with a cache that anyone may thin out between steps."""

    name = "local"

    def __init__(self, model: torch.nn.Module, tokenizer: Any = None):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.device = next(model.parameters()).device
        eos = model.generation_config.eos_token_id
        self.eos: frozenset[int] = frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos)

    @classmethod
    def from_pretrained(
        cls, name: str, *, revision: str | None = None, dtype: str = "float32", device: str = "auto"
    ) -> LocalEngine:
        """Load a model from a folder or the hub. Raises UserError where that fails or the model cannot be evicted."""
        from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

        # Only the attention function: transformers then makes no mask of its own (see `_attention`).
        AttentionInterface.register(ATTENTION, _attention)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("model.device: this machine has no cuda device; set model.device to cpu or auto")
        try:
            config = AutoConfig.from_pretrained(name, revision=revision)
            _refuse_unsupported(config, name)
            with _quiet():
                model = AutoModelForCausalLM.from_pretrained(
                    name, revision=revision, dtype=getattr(torch, dtype), attn_implementation=ATTENTION
                )
        except (OSError, ValueError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"model.name: {name!r} cannot be loaded ({reason}); give a model folder or a hub id"
            ) from error
        from kv_transition.data.tokens import load_tokenizer

        return cls(model.to(device), load_tokenizer(name, revision))

    @property
    def description(self) -> dict[str, str]:
        """How attention and its statistics were computed, for the results."""
        return {"attention": "sdpa", "attention_statistics": "blocks", "device": self.device_name}

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    @torch.inference_mode()
    def extend(
        self, state: CacheState | None, tokens: Sequence[int], statistics: frozenset[str] = STATISTICS
    ) -> CacheState:
        """Read ``tokens`` (at least one) on top of a state; None is the empty one. The state itself is unchanged.

        statistics: which running statistics to keep up; a policy names those it reads.
        """
        unknown = statistics - STATISTICS
        if unknown:
            raise UserError(f"the local engine cannot keep up the statistics {', '.join(sorted(unknown))}")
        state = state or CacheState(layers=(), length=0)
        reading = _Reading(state, statistics)
        length = state.length + len(tokens)
        output = self.model(
            input_ids=torch.tensor([list(tokens)], device=self.device),
            # After an eviction a position is no longer the number of entries before it.
            position_ids=torch.arange(state.length, length, device=self.device)[None],
            past_key_values=reading,
            use_cache=True,
            logits_to_keep=1,
            reading=reading,
        )
        return CacheState(layers=tuple(reading.layers), length=length, logits=output.logits[0, -1].float())

    def prefill(self, context: Sequence[int], question: Sequence[int]) -> Prefill:
        """Read a prompt with the full cache, once for both modes."""
        started = self.clock()
        after_context = self.extend(None, context)
        between = self.clock()
        after_prompt = self.extend(after_context, question) if len(question) else after_context
        return Prefill(after_context, after_prompt, between - started, self.clock() - between)

    def next_token(self, state: CacheState, temperature: float, generator: torch.Generator | None) -> int:
        """The next token: the most likely one at temperature 0, else a sample."""
        if temperature == 0:
            return int(state.logits.argmax())
        probabilities = (state.logits / temperature).softmax(-1).cpu()
        return int(torch.multinomial(probabilities, 1, generator=generator))

    def clock(self) -> float:
        """Seconds. On a GPU the wall's, once its queue is empty; on a CPU this process's own, which jobs on the other
        cores do not lengthen (cells run with one thread each)."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()

    def peak_memory_mb(self) -> float | None:
        """Peak device memory in MiB since the last call; None where it cannot be measured."""
        if self.device.type != "cuda":
            return None
        peak = torch.cuda.max_memory_allocated(self.device) / 2**20
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak


def _refuse_unsupported(config: Any, name: str) -> None:
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    if kinds != {"full_attention"} or (window and not getattr(text, "layer_types", None)):
        raise UserError(
            f"model.name: {name!r} has layers other than full attention ({', '.join(sorted(kinds))}); "
            "this version evicts full-attention models only"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar over the weights' shards."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
