"""A table of all policies at all budgets over one context."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

import polars as pl

from kv_transition.api.chosen import BudgetLike, PolicyLike, name_of, needs_budget, policy_of, setting_of
from kv_transition.api.context import Context
from kv_transition.api.model import Text
from kv_transition.errors import UserError
from kv_transition.eval.metrics import METRICS, score_answer

_SCHEMA = {
    "policy": pl.String,
    "budget": pl.String,
    "share": pl.Float64,
    "mode": pl.String,
    "question": pl.Int64,
    "text": pl.String,
    "score": pl.Float64,
    "mean_entropy": pl.Float64,
    "finish_reason": pl.String,
    "kept_mean": pl.Float64,
    "cache_bytes": pl.Int64,
    "full_bytes": pl.Int64,
}


def grid(
    context: Context,
    questions: Sequence[Text],
    policies: Sequence[PolicyLike] | Mapping[str, PolicyLike],
    budgets: Sequence[BudgetLike],
    *,
    answers: Sequence[Sequence[str]] | None = None,
    metric: str = "qa_f1",
    mode: str = "before_question",
    max_new_tokens: int = 64,
    seed: int = 0,
) -> pl.DataFrame:
    """Return one row for each question under each policy and budget, and with the full cache.

    The context is not read again; it is compressed once per policy and budget. policies: a list, or a mapping with
    names of your own. answers: the right answers to each question; ``score`` is the best value of ``metric`` over them
    (as in the pipeline), null without answers. ``share``: the part of the context's entries that the budget keeps.
    ``question``: number of the question from 0. Raises UserError for other input.
    """
    if isinstance(questions, str) or not questions:
        raise UserError("questions: give a list of one question or more")
    if answers is not None and len(answers) != len(questions):
        raise UserError(
            f"answers: there are {len(answers)} for {len(questions)} questions; give one list for each question"
        )
    if answers is not None and any(isinstance(own, str) for own in answers):
        raise UserError("answers: give a list of texts for each question, as several answers may be right")
    if metric not in METRICS:
        raise UserError(f"metric: there is no {metric!r}; choose one of {', '.join(METRICS)}")
    rows = []
    for name, policy, budget in _cells(policies, budgets):
        setting = setting_of(policy, budget, mode)
        if mode == "before_question":
            compressed = context.compress(policy, budget, seed=seed)
            replies = [compressed.ask(question, max_new_tokens=max_new_tokens) for question in questions]
        else:
            asked = {"mode": mode, "max_new_tokens": max_new_tokens, "seed": seed}
            replies = [context.ask(question, policy, budget, **asked) for question in questions]
        for number, reply in enumerate(replies):
            right = None if answers is None else score_answer(metric, reply.text, answers[number])
            rows.append(
                {
                    "policy": name,
                    "budget": str(setting.budget),
                    "share": setting.entries(len(context)) / len(context),
                    "mode": mode,
                    "question": number,
                    "score": right,
                    "mean_entropy": fmean(reply.entropies) if reply.entropies else None,
                    "kept_mean": fmean(reply.kept),
                    **{
                        field: getattr(reply, field) for field in ("text", "finish_reason", "cache_bytes", "full_bytes")
                    },
                }
            )
    return pl.DataFrame(rows, schema=_SCHEMA)


def _cells(
    policies: Sequence[PolicyLike] | Mapping[str, PolicyLike], budgets: Sequence[BudgetLike]
) -> Iterator[tuple[str, PolicyLike, BudgetLike | None]]:
    """Yield name, policy and budget of each cell, the full cache first; a policy that determines its footprint occurs
    once.
    """
    named = policies.items() if isinstance(policies, Mapping) else [(name_of(policy_of(p)), p) for p in policies]
    names = [name for name, _ in named]
    if len(set(names)) < len(names):
        raise UserError(f"policies: {max(names, key=names.count)} occurs twice; name each, as in {{'mine': policy}}")
    yield "full", "full", None
    for name, policy in named:
        own = policy_of(policy)
        if needs_budget(own):
            for budget in budgets:
                yield name, own, budget
        elif name != "full":
            yield name, own, None
