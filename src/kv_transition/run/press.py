"""Answers with a press of kvpress, which prefills the prompt itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kv_transition.cache.state import CacheState
from kv_transition.engines.kvpress_press import installed_version, read
from kv_transition.engines.local import LocalEngine
from kv_transition.policies.base import Policy
from kv_transition.run.decode import Answer, Setting, let_in
from kv_transition.run.matched import Course


@dataclass(frozen=True)
class Press(Policy):
    """Stands for a policy in a `Setting`, because the press has already compressed the cache."""

    kind: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        installed_version()  # reports a missing package before a model is loaded, and keeps the import out of timings


def begin(
    engine: LocalEngine, context_ids: Sequence[int], question_ids: Sequence[int], setting: Setting, answer: Answer
) -> CacheState:
    """Prefill with the press and read the question; return the state that the first token is drawn from.

    The press acts during the prefill, so its time is part of ``prefill_s``.
    """
    before_question = setting.mode == "before_question"
    prompt = [*context_ids] if before_question else [*context_ids, *question_ids]
    answer.course = Course(len(prompt), len(question_ids) if before_question else 0, answer.steps)
    answer.budget_entries = k = setting.entries_over(answer.course)
    # after the prompt, the last token is read on top of the compressed cache of the others, and counts in K
    tokens, last = (prompt, question_ids) if before_question else (prompt[:-1], prompt[-1:])
    started = engine.clock()
    state = read(engine, tokens, setting.policy.kind, setting.policy.arguments, k - (not before_question), answer.seed)
    answer.prefill_s = engine.clock() - started
    answer.token_bytes = state.nbytes / state.entries
    return let_in(engine, state, last, setting, answer)
