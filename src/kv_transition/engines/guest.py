"""An engine for a transformers model that is also used elsewhere: it replaces the attention only while it reads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kv_transition.cache.state import CacheState
from kv_transition.engines.loading import refuse_unsupported
from kv_transition.engines.local import LocalEngine
from kv_transition.engines.reading import ATTENTION, Reading, attention_function
from kv_transition.errors import UserError
from kv_transition.policies.base import BeforeAttention


class GuestEngine(LocalEngine):
    """Reads as `LocalEngine` does and restores the model afterwards, so that `generate` works as before.

    While it reads, no other thread may run the model. Raises UserError for a model whose cache cannot be evicted.
    """

    def __init__(self, model: torch.nn.Module, tokenizer: Any = None, **options: Any):
        refuse_model(model)
        super().__init__(model, tokenizer, **options)

    def reading(
        self,
        state: CacheState,
        q: int,
        statistics: frozenset[str],
        room: int,
        before_attention: BeforeAttention | None,
    ) -> Reading:
        """Return the `Reading` of ``q`` tokens on top of a state, for a caller that runs the model; see `extend`."""
        return self._reading(state, q, statistics, room, None, before_attention)

    def _read(self, *arguments: Any) -> tuple[CacheState, Tensor]:
        with our_attention(self.model):
            return super()._read(*arguments)


def refuse_model(model: Any) -> None:
    """Raise UserError unless this is a transformers model whose cache can be evicted."""
    name = type(model).__name__
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config") or not hasattr(model, "generate"):
        raise UserError(f"{name} is not a language model of transformers; give one that AutoModelForCausalLM loads")
    if model.config.is_encoder_decoder or not getattr(model, "_supports_attention_backend", False):
        raise UserError(
            f"the attention of {name} cannot be replaced, so its cache cannot be evicted; choose a decoder "
            "such as Qwen2, Llama or Mistral"
        )
    refuse_unsupported(model.config, name)


@contextlib.contextmanager
def our_attention(model: torch.nn.Module) -> Iterator[None]:
    """Let the model attend to the entries of a `Reading` within the block, without a mask of transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attention_function)
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before
