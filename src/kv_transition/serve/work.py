"""What a checked request asks of the model: a prompt, and how it is answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kv_transition.policies import catalog
from kv_transition.run.decode import Setting


@dataclass(frozen=True)
class Prompt:
    """Context and question, each tokenized separately. If the request gives no end of the context, the question is the
    last token.
    """

    context: list[int]
    question: list[int]

    def __len__(self) -> int:
        return len(self.context) + len(self.question)


@dataclass(frozen=True)
class Asked:
    """The checked options of a request: how the cache is compressed and how the answer is decoded."""

    kind: str
    hyper_parameters: dict[str, Any]
    setting: Setting
    seed: int
    pace: tuple[int, int] | None
    stops: tuple[str, ...]
    wanted_tokens: int | None

    @property
    def is_press(self) -> bool:
        return catalog.is_press(self.kind)
