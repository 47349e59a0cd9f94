"""lm-evaluation-harness on a compressed cache: its `hf` model, whose prompts are compressed before the answer.

Prompts, truncation, stop sequences and batches are those of the harness; only the cache is this project's. With policy
``full``, responses equal those of `hf`, and log-likelihoods agree to 1e-5 (tests/test_harness.py).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from kv_transition.api.chosen import setting_of
from kv_transition.api.evicting_cache import EvictingCache
from kv_transition.api.model import load
from kv_transition.errors import UserError
from kv_transition.harness.likelihood import Likelihoods, Prompt

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""the texts of context and continuation (None for a text without context), and the tokens of both"""

_OPTION = "policy."


@register_model("kv_transition")
class CompressedLM(HFLM):
    """A model whose KV cache is compressed to a budget after the prompt, or before the question in it.

    policy, budget, seed: as in the library (docs/python.md); ``policy.window=16`` sets a hyper-parameter. mode:
    ``after_prompt``, or ``before_question``, which compresses up to the last ``separator`` of a prompt and then reads
    the rest. pretrained: folder, hub id, GGUF file, or a transformers model. Other arguments are those of `hf`.

    Log-likelihoods: under a policy that acts at each token, a continuation is read token by token, else in one piece; a
    context that several requests share is read and compressed once. A text without a context (rolling) is read from its
    first token, so its policy must act while reading. Raises UserError if policy and budget cannot be combined.
    """

    def __init__(
        self,
        pretrained: Any,
        policy: str = "full",
        budget: float | str | None = None,
        mode: str = "after_prompt",
        separator: str = "\n\n",
        seed: int = 0,
        revision: str | None = None,
        tokenizer: Any = None,
        dtype: str = "float32",
        device: str | None = None,
        **options: Any,
    ):
        own = {name.removeprefix(_OPTION): options.pop(name) for name in list(options) if name.startswith(_OPTION)}
        self._policy, self._budget = {"kind": policy} | own, budget
        self._setting = setting_of(self._policy, budget, mode)
        self._separator, self._seed = separator, seed
        # the harness's command line says cuda:0 unless it is told otherwise, and `hf` then takes what there is
        device = "auto" if device is None or ("cuda" in device and not torch.cuda.is_available()) else device
        loaded = load(pretrained, tokenizer, chat=False, revision=revision, dtype=dtype, device=device)
        self._likelihoods = Likelihoods(loaded.engine, self._setting, seed)
        super().__init__(loaded.engine.model, tokenizer=loaded.tokenizer, **options)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> CompressedLM:
        """Return the model of the harness's command line; arguments of the model have precedence over its own."""
        return super().create_from_arg_obj(
            arg_dict, {name: value for name, value in (additional_config or {}).items() if name not in arg_dict}
        )

    # -- answers

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], attention_mask: Tensor, **options: Any
    ) -> Tensor:
        """Return prompts [B, n] padded on the left, each followed by its answer."""
        rows = [row[seen.bool()].tolist() for row, seen in zip(context, attention_mask, strict=True)]
        new = max_length - context.shape[1]
        places = [self._place(row) for row in rows]
        if self._fit(rows, places):
            place = places[0] if self._setting.evicts else None
            told = {"context_tokens": place, "tokenizer": self.tokenizer, "seed": self._seed}
            cache = EvictingCache(self.model, self._policy, self._budget, **told)
            more = {"attention_mask": attention_mask, "past_key_values": cache} | options
            return super()._model_generate(context, max_length, stop, **more)
        answers = [
            self._model_generate(ids := torch.tensor([row], device=context.device), len(row) + new, stop,
                                 torch.ones_like(ids), **options)[0, len(row):]
            for row in rows
        ]  # fmt: skip
        padded = torch.nn.utils.rnn.pad_sequence(answers, True, self.tokenizer.pad_token_id or 0)
        return torch.cat([context, padded], 1)

    def _fit(self, rows: Sequence[list[int]], places: Sequence[int | None]) -> bool:
        """Return whether prompts can be answered as one batch with the same tokens as alone."""
        if len(rows) == 1 or not self._setting.evicts:
            return True
        policy, alike = self._setting.policy, len({len(row) for row in rows}) == 1
        if policy.one_at_a_time or len(set(places)) > 1 or (places[0] is not None and not alike):
            return False
        return alike or not policy.acts_each_step

    def _place(self, prompt: Sequence[int]) -> int | None:
        """Return how many tokens of a prompt are compressed before the rest is read; None: all of them."""
        if self._setting.mode == "after_prompt":
            return None

        def separators(n: int) -> int:
            return self.tokenizer.decode(prompt[:n]).count(self._separator)

        last = separators(len(prompt))
        place = bisect_left(range(len(prompt)), last, key=separators) if last else 0
        if not 0 < place < len(prompt):
            raise UserError(
                f"mode: before_question compresses up to the last {self._separator!r} of a prompt and reads the rest, "
                "but a prompt has none or ends with it; give another separator=..., or mode=after_prompt"
            )
        return place

    # -- log-likelihoods

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return log p of each continuation, and whether greedy decoding produces it."""
        prompts = [self._prompt(number, *request) for number, request in enumerate(requests)]
        continuations = [continuation for _, _, continuation in requests]
        size = self.batch_size
        if requests and not isinstance(size, int):  # auto: the harness measures it by the longest request
            longest = max(requests, key=lambda request: len(request[1]) + len(request[2]))
            size = override_bs or self._detect_batch_size([longest], 0)
        found: dict[int, tuple[float, bool]] = {}
        for number, result in self._likelihoods.of(prompts, continuations, size):
            found[number] = result
            if texts := requests[number][0]:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return [found[number] for number in range(len(requests))]

    def _prompt(
        self, number: int, texts: tuple[str, str] | None, context: list[int], continuation: list[int]
    ) -> Prompt:
        """Return the prompt of a continuation, cut from the left to the model's length.

        Raises UserError for a text without context under a policy that only compresses prompts.
        """
        setting = self._setting
        context = (context + continuation)[-(self.max_length + 1) : -len(continuation)]
        if texts is None and setting.evicts and not setting.policy.acts_each_step:
            raise UserError(
                f"policy: {self._policy['kind']} compresses a prompt, but loglikelihood_rolling has none; choose full, "
                "or a policy that acts at each token, such as streaming_llm, h2o or tova"
            )
        # an observer of steps belongs to one answer, so its context cannot be shared
        alone = number if setting.evicts and setting.policy.one_at_a_time else None
        if texts is None:
            over = len(context) + (len(continuation) if setting.evicts else 0)
            return Prompt(tuple(context), held_over=over, number=alone)
        return Prompt(tuple(context), self._place(context), number=alone)
