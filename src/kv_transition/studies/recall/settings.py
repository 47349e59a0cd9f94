"""The configuration keys of the recall study."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kv_transition.budget import Budget
from kv_transition.sections import Name, Section


class Observe(Section):
    """The observation of the entries that policies would hold beside a full cache, step by step."""

    enabled: bool = Field(False, description="true: observe each task and bin")
    policies: list[Name] | None = Field(
        None,
        min_length=1,
        description="names of kv.policies, and oracle; null: all policies that can be observed, and oracle",
    )
    budgets: list[float] = Field(
        [0.1, 0.2, 0.3, 0.5], min_length=1, description="fractions of the entries that are held, in (0, 1)"
    )
    granularities: list[Literal["global", "per_head"]] = Field(
        ["global", "per_head"],
        min_length=1,
        description="global: one set for the model; per_head: one set for each KV head",
    )
    memories: list[Literal["ideal", "irreversible"]] = Field(
        ["ideal", "irreversible"],
        min_length=1,
        description="ideal: an evicted entry may be held again later; irreversible: it may not",
    )
    max_tokens: Literal["task"] | Annotated[int, Field(ge=1)] = Field(
        "task", description="maximum length of an answer in tokens"
    )
    entropy_gap_every: int = Field(
        0, ge=0, description="interval in steps at which the entropy gaps are measured; 0: never"
    )
    reasoning: bool = Field(
        False, description="true: begin each answer with a text that makes the model reason step by step"
    )
    continuations: bool = Field(False, description="true: also continue each context without a question")

    @model_validator(mode="after")
    def _each_once(self) -> Observe:
        for key in ("policies", "budgets", "granularities", "memories"):
            values = getattr(self, key) or []
            if len(set(values)) < len(values):
                raise ValueError(f"{key}: a value is listed twice in {', '.join(map(str, values))}; give each once")
        for fraction in self.budgets:
            if not 0 < fraction < 1:
                raise ValueError(f"budgets: {fraction} is not in (0, 1); give the fraction that is held, such as 0.2")
        return self

    def all_budgets(self) -> list[Budget]:
        return [Budget.of_fraction(fraction, "observe.budgets") for fraction in self.budgets]


class Fields(Section):
    """The keys that observation adds to an experiment."""

    observe: Observe = Observe()
