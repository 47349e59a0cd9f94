"""Answer requests with the code that runs the cells of an experiment, several requests at once."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus

import torch

from kv_transition.cache.state import CacheState
from kv_transition.engines.local import LocalEngine
from kv_transition.run.decode import Answer, begin
from kv_transition.run.together import Going, read_all
from kv_transition.serve.prefills import Prefills
from kv_transition.serve.refusal import RefusalError
from kv_transition.serve.work import Asked, Prompt

Listener = Callable[[Sequence[int]], bool]


@dataclass(frozen=True)
class Reply:
    """An answer that is being decoded. there: number of prompt tokens whose prefill was in memory."""

    going: Going
    asked: Asked
    there: int

    def choose(self) -> bool:
        return self.going.choose()


@dataclass(frozen=True)
class Served:
    """A model and the prefills that it holds in memory."""

    name: str
    engine: LocalEngine
    prefills: Prefills
    max_length: int
    """maximum number of tokens of a prompt and its answer"""

    def begin(self, asked: Asked, prompt: Prompt, default_tokens: int, listener: Listener) -> Reply:
        """Read the prompt, compress its cache, and return an answer whose first token can be decoded.

        listener: it is called with all tokens after each token; the answer ends when it returns true. Raises
        RefusalError if prompt and answer are too long for the model or the memory, and UserError if the policy cannot
        be used.
        """
        left = self.max_length - len(prompt)
        wanted = min(default_tokens, left) if asked.wanted_tokens is None else asked.wanted_tokens
        if wanted > left or left < 1:
            raise RefusalError(
                HTTPStatus.BAD_REQUEST,
                f"a prompt of {len(prompt)} tokens and an answer of {max(wanted, 1)} are longer than {self.max_length}",
                param="max_tokens" if left > 0 else "prompt",
                code="context_length_exceeded",
            )
        answer = Answer(asked.seed, wanted, asked.pace, listener=listener)
        try:
            state, there = self._read(answer, asked, prompt)
            return Reply(Going(self.engine, state, asked.setting, answer), asked, there)
        except (torch.OutOfMemoryError, MemoryError):
            pass  # the memory that the exception holds is freed only after this block
        raise self._no_memory(f"a prompt of {len(prompt)} tokens")

    def step(self, replies: Sequence[Reply]) -> list[Exception | None]:
        """Read the next token of each answer with one forward pass; return the error of each answer, or None."""
        failures = read_all(self.engine, [reply.going for reply in replies])
        return [
            self._no_memory("the answer") if isinstance(error, torch.OutOfMemoryError | MemoryError) else error
            for error in failures
        ]

    def _read(self, answer: Answer, asked: Asked, prompt: Prompt) -> tuple[CacheState, int]:
        engine, setting = self.engine, asked.setting
        there = 0
        if asked.is_press:
            presses = importlib.import_module("kv_transition.run.press")
            state = presses.begin(engine, prompt.context, prompt.question, setting, answer)
        else:
            statistics = setting.policy.statistics
            if setting.mode == "before_question":
                prefill, there = self.prefills.after_context(prompt.context, statistics, len(prompt.question))
            else:
                prefill, there = self.prefills.after_prompt(prompt.context, prompt.question, statistics)
            state = begin(engine, prefill, prompt.question, setting, answer)
        return state, there

    def _no_memory(self, what: str) -> RefusalError:
        """Return the refusal for lack of memory, and drop the stored prefills.

        If prefills were stored, the request may fit the next time; if there were none, it never will.
        """
        if self.engine.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.prefills.clear():
            return RefusalError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "out of memory; some memory was freed, so retry",
                code="out_of_memory",
                retry_after=1,
            )
        return RefusalError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"{what} does not fit into the memory of this machine",
            code="out_of_memory",
        )
