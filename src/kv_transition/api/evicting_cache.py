"""A transformers `Cache` that evicts entries: plain models decode from it with their own ``generate()``."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from kv_transition.api.chosen import BudgetLike, PolicyLike, name_of, setting_of
from kv_transition.cache.batch import stack
from kv_transition.cache.state import CacheState
from kv_transition.engines.guest import GuestEngine, our_attention
from kv_transition.engines.reading import Reading
from kv_transition.errors import UserError

_ROOM = 256
"""number of free entries behind a prompt, so that a growing cache is rarely copied"""


class EvictingCache(Cache):
    """The cache of one prompt, compressed before the first token is drawn.

    Give a new one as ``past_key_values`` to each ``generate()``, pipeline or forward call; the model itself is not
    changed. The prompt is read with the full cache and compressed to the budget, and its last token is read again on
    top of the compressed cache. A policy that acts while decoding acts at every token. The outputs are those of the
    last tokens that were read: one token, or the question if ``context_tokens`` is given.

    A batch is padded on the left. Raises UserError if the policy lacks a budget, if the model's cache cannot be
    evicted, or if the sequences of a batch cannot be held together.
    """

    def __init__(
        self,
        model: Any,
        policy: PolicyLike,
        budget: BudgetLike | None = None,
        *,
        context_tokens: int | None = None,
        chunk_tokens: int | None = None,
        tokenizer: Any = None,
        seed: int = 0,
    ):
        """Set up the cache of one prompt.

        context_tokens: compress after this number of tokens, before the rest of the prompt (the question) is read;
        None: after the whole prompt. chunk_tokens: longest piece of the prompt read at a time. tokenizer: that of the
        model, for kvzip, which asks the model to repeat the prompt. seed: for policies that draw random numbers.
        """
        super().__init__(layers=[])
        mode = "after_prompt" if context_tokens is None else "before_question"
        self._setting = setting_of(policy, budget, mode)
        if tokenizer is None and "reconstruction" in self._setting.policy.statistics:
            name = name_of(self._setting.policy)
            raise UserError(f"the policy {name} asks the model to repeat the prompt; give tokenizer=...")
        self._engine = GuestEngine(model, tokenizer, chunk_tokens=chunk_tokens)
        self._context_tokens, self._seed = context_tokens, seed
        self.reset()
        _hook(model)

    def reset(self) -> None:
        """Discard the prompt, so that another one can be read."""
        self._state: CacheState | None = None
        self._watcher = self._setting.policy.watch(self._seed) if self._setting.evicts else None
        self._k = self._seen = 0
        self._first = True
        self._reading: Reading | None = None
        self._leave = contextlib.ExitStack()

    @property
    def state(self) -> CacheState | None:
        """Return the current state, as a batch even for a single prompt; None before a prompt is read.

        The next token may change it in place.
        """
        return self._state

    @property
    def entries(self) -> float:
        """Return the number of entries per KV head, mean over the evictable layers; 0 before a prompt is read."""
        return 0.0 if self._state is None else self._state.entries

    @property
    def nbytes(self) -> int:
        """Return the bytes of keys and values in the evictable layers."""
        return 0 if self._state is None else self._state.nbytes

    # transformers calls the following methods.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens read, which evictions do not change."""
        return self._seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._seen + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def update(self, keys: Tensor, values: Tensor, *arguments: Any, **more: Any) -> tuple[Tensor, Tensor]:
        if self._reading is None:
            raise UserError("this EvictingCache belongs to another model; create one with EvictingCache(model, ...)")
        return self._reading.update(keys, values)

    @property
    def batch_size(self) -> int:
        return -1 if self._state is None else len(self._state.logits)

    @property
    def is_initialized(self) -> bool:
        return self._state is not None

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise UserError(
            "an EvictingCache holds one answer for each prompt, so num_beams must be 1; use greedy decoding or sampling"
        )

    batch_repeat_interleave = batch_select_indices = reorder_cache

    def crop(self, tokens_to_remove: int) -> None:
        raise UserError(
            "an EvictingCache cannot remove tokens, which assisted decoding does; do not use assistant_model or "
            "prompt_lookup_num_tokens"
        )

    def activate_past_recording(self) -> None:
        self.crop(0)

    # The following run before and after each forward pass.

    def enter(self, model: torch.nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of the forward call that reads the next tokens; read all but the last tokens of a prompt
        first.
        """
        if model is not self._engine.model:
            self.update(*(torch.empty(0),) * 2)
        ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
        if ids is None:
            raise UserError("an EvictingCache needs input_ids; inputs_embeds are not supported")
        first = self._state is None
        tokens = self._begin(ids, mask) if first else self._next(ids, mask)
        watched = self._watcher is not None and not (first and self._context_tokens is not None)
        state, statistics = self._state, self._setting.while_decoding
        before = self._watcher.before_attention(state.logits) if watched else None
        room = self._setting.room(_ROOM)
        self._reading = self._engine.reading(state, tokens.shape[1], statistics, room, before)
        self._first = first
        self._seen = ids.shape[1] if first else self._seen + 1
        with contextlib.ExitStack() as entered:
            entered.enter_context(our_attention(model))
            entered.enter_context(torch.inference_mode())
            self._leave = entered.pop_all()
        dropped = ("attention_mask", "position_ids", "token_type_ids", "cache_position")
        return {name: value for name, value in arguments.items() if name not in dropped} | {
            "input_ids": tokens,
            "position_ids": self._reading.position_ids,
            "past_key_values": self,
            "use_cache": True,
            "return_dict": True,
            "reading": self._reading,
        }

    def leave(self, output: Any) -> None:
        """Store the state after a forward call, held at the budget if the policy acts while decoding. None: the call
        failed.
        """
        self._leave.close()
        reading, self._reading = self._reading, None
        if reading is None or output is None:
            return
        # generate() writes to the logits in place, so they must not be an inference tensor
        output.logits = output.logits.clone()
        grown = CacheState(
            layers=tuple(reading.read),
            length=reading.state.length + reading.positions.shape[-1],
            logits=output.logits[:, -1].float(),
            shift=reading.state.shift,
        )
        with torch.inference_mode():
            # after the question the policy compresses to K, even if it acts in place at later tokens
            self._state = self._setting.hold(grown, self._k, given_up=not self._first)

    def _begin(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Read and compress a prompt [B, n]; return the tokens [B, q] that remain to be read."""
        rows = _rows(ids, mask)
        if not all(rows):
            raise UserError("the prompt is empty; give at least one token")
        question = 1
        if self._context_tokens is not None:
            question = len(rows[0]) - self._context_tokens
            if not 0 < self._context_tokens < len(rows[0]) or len({len(row) for row in rows}) > 1:
                raise UserError(
                    f"context_tokens: {self._context_tokens} must be smaller than the prompt, and prompts of a batch "
                    "must have one length; give prompts of one length, or one prompt at a time"
                )
        policy, several = self._setting.policy, len(rows) > 1
        if several and self._setting.evicts and policy.one_at_a_time:
            raise UserError(f"the policy {name_of(policy)} decodes one answer at a time; give it one prompt")
        begun = {tuple(row): self._compressed(row, question) for row in rows}
        states = [begun[tuple(row)] for row in rows]
        if several and self._setting.evicts and policy.acts_each_step and len({s.entries for s in states}) > 1:
            raise UserError(
                f"the policy {name_of(policy)} acts at each token, so all sequences of a batch must hold the same "
                'number of entries; give prompts of one length, a budget such as {"tokens": 128}, or single prompts'
            )
        self._state = stack(states, self._setting.while_decoding)
        return torch.tensor([row[-question:] for row in rows], device=ids.device)

    def _compressed(self, row: Sequence[int], question: int) -> CacheState:
        """Return a prompt's state without its last ``question`` tokens, with the logits before the next token."""
        setting, whole = self._setting, self._context_tokens is None
        read = row if whole else row[:-question]
        statistics = setting.policy.statistics if setting.evicts else frozenset()
        state = self._engine.extend(None, read, statistics)
        self._k = setting.entries(state.length)
        kept = setting.compress(state, self._k, self._seed, keep_last=whole)
        # no answer token may come from the full cache, so the last prompt token is read again
        return replace(kept.without_last(), logits=state.logits) if whole else kept

    def _next(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Return the one new token [B, 1] of each sequence."""
        expected = self._seen + 1
        if ids.shape[1] != 1 or (mask is not None and mask.dim() == 2 and mask.shape[1] != expected):
            raise UserError(
                "this EvictingCache already contains a prompt; create a new one for each prompt, and use chunk_tokens "
                "instead of prefill_chunk_size to read a long prompt in pieces"
            )
        if ids.shape[0] != self.batch_size:
            raise UserError(f"this EvictingCache has {self.batch_size} sequences, not {ids.shape[0]}; create a new one")
        return ids


def _rows(ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """Return the tokens of each prompt of a batch [B, n] without the padding in front."""
    if mask is None:
        return ids.tolist()
    if mask.shape != ids.shape:
        raise UserError(
            f"attention_mask has the shape {list(mask.shape)} and input_ids {list(ids.shape)}; an EvictingCache needs "
            "a mask with one number per token"
        )
    seen = mask.bool()
    if ids.shape[1] and not bool((seen[:, 1:] >= seen[:, :-1]).all() and seen[:, -1].all()):
        raise UserError(
            "attention_mask masks tokens that are not in front; pad batches on the left (padding_side='left' of "
            "the tokenizer), and give generate() the tokenizer's attention_mask"
        )
    return [row[kept].tolist() for row, kept in zip(ids, seen, strict=True)]


def _hook(model: torch.nn.Module) -> None:
    """Register hooks, once, that call an `EvictingCache` before and after a model's forward calls; other calls are
    unchanged.
    """
    if _before not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_before, with_kwargs=True)
        model.register_forward_hook(_after, with_kwargs=True, always_call=True)


def _before(
    model: torch.nn.Module, unnamed: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    arguments = dict(zip(inspect.signature(model.forward).parameters, unnamed, strict=False)) | named
    cache = arguments.get("past_key_values")
    return ((), cache.enter(model, arguments)) if isinstance(cache, EvictingCache) else None


def _after(model: torch.nn.Module, _: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
    if isinstance(cache := named.get("past_key_values"), EvictingCache):
        cache.leave(output)
