"""The configuration keys of the study that runs tasks of lm-evaluation-harness."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from kv_transition import paths
from kv_transition.sections import Mode, Name, Section

Task = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]+$", max_length=200)]
Budget = Annotated[str, Field(pattern=rf"^({paths.BUDGET})$", max_length=100)]


class Harness(Section):
    """Tasks of lm-evaluation-harness, run on the compressed cache."""

    tasks: list[Task] = Field(min_length=1, description="names of tasks or groups of lm-evaluation-harness")
    include_path: str | None = Field(None, min_length=1, description="folder with task files of your own")
    policies: list[Name] | None = Field(
        None, min_length=1, description="names from kv.policies; null: all. full is always included"
    )
    budgets: list[Budget] | None = Field(
        None, min_length=1, description="budgets from kv.budgets, as r0.2 or t128; null: all"
    )
    modes: list[Mode] | None = Field(
        None, min_length=1, description="modes, also ones that kv.modes does not list; null: kv.modes"
    )
    separator: str = Field("\n\n", min_length=1, description="before_question: text between context and question")
    limit: int | None = Field(
        None, ge=1, description="number of documents of each task, taken from the front; null: all"
    )
    num_fewshot: int | None = Field(
        None, ge=0, description="number of examples before each document; null: as the task defines"
    )
    batch_size: int = Field(1, ge=1, le=10_000, description="number of requests answered together")

    @model_validator(mode="after")
    def _each_once(self) -> Harness:
        for key in ("tasks", "policies", "budgets", "modes"):
            names = getattr(self, key) or []
            if len(set(names)) < len(names):
                raise ValueError(f"{key}: a name is listed twice in {', '.join(names)}; give each once")
        return self


class Fields(Section):
    """The keys that this study adds to an experiment."""

    harness: Harness | None = None
