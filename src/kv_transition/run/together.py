"""Answers that are decoded together although each has its own setting; they join and leave at any step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kv_transition.cache.state import CacheState
from kv_transition.engines.local import LocalEngine
from kv_transition.engines.reading import BeforeAttention, InterruptedReadingError
from kv_transition.run.decode import Answer, Setting


class Going:
    """An answer that is being decoded: `choose` and `read_all` alternate until `choose` returns False."""

    def __init__(self, engine: LocalEngine, state: CacheState, setting: Setting, answer: Answer):
        """Start an answer. state: result of `decode.begin`, from which the first token is drawn."""
        self.answer, self.setting = answer, setting
        self._engine, self._state = engine, state
        self._generator = torch.Generator().manual_seed(answer.seed)
        self._watcher = setting.watch(answer)
        self._room = setting.room(answer.max_new_tokens)
        self._token = 0
        self._before: BeforeAttention | None = None

    def choose(self) -> bool:
        """Draw the next token; return whether another one follows. At the end the answer is complete."""
        engine, answer, state = self._engine, self.answer, self._state
        started = engine.clock()
        (self._token,) = engine.next_tokens(state.logits[None], self.setting.temperature, [self._generator])
        goes_on = answer.takes(self._token, state.entries, engine.eos)
        if goes_on:
            self._before = self._watcher.before_attention(state.logits) if self._watcher else None
        answer.decode_s += engine.clock() - started
        if not goes_on:
            if self._watcher:
                answer.record |= self._watcher.record(state)
            answer.ends(state)
        return goes_on

    def _take(self, grown: CacheState, seconds: float, shared_by: int) -> None:
        """Set the state after the chosen token, which the policy may compress again."""
        started = self._engine.clock()
        self._state = self.setting.hold(grown, self.answer.budget_entries, given_up=True)
        self.answer.decode_s += seconds + self._engine.clock() - started
        self.answer.batch_size = max(self.answer.batch_size, shared_by)


def read_all(engine: LocalEngine, goings: Sequence[Going]) -> list[Exception | None]:
    """Read the chosen token of each answer in one pass through the model; return the exception of each, or None.

    If the pass fails, each answer is read separately, so that a failing answer does not end the others. The seconds of
    a pass count for each answer that shares it. Raises InterruptedReadingError as the engine does.
    """
    started = engine.clock()
    try:
        grown = engine.extend_each(
            [going._state for going in goings],
            [going._token for going in goings],
            [going.setting.while_decoding for going in goings],
            [going._room for going in goings],
            [going._before for going in goings],
        )
    except InterruptedReadingError:
        raise
    except Exception as error:
        if len(goings) == 1:
            return [error]
        # the memory that the exception refers to is free only after it is deleted
        grown = None
    if grown is None:
        return [failure for going in goings for failure in read_all(engine, [going])]
    seconds = engine.clock() - started
    failures: list[Exception | None] = []
    for going, state in zip(goings, grown, strict=True):
        try:
            going._take(state, seconds, len(goings))
            failures.append(None)
        except Exception as error:
            failures.append(error)
    return failures
