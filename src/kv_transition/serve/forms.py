"""The two forms of a response: chat completions and completions."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from kv_transition.serve.schema import KV, Chat, ChatChoice, Completion, CompletionChoice, PromptTokens, Said, Usage

Json = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """A finished answer and its facts."""

    text: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    kv: KV

    @property
    def usage(self) -> Usage:
        completion = len(self.kv.token_ids)
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=completion,
            total_tokens=self.prompt_tokens + completion,
            prompt_tokens_details=PromptTokens(cached_tokens=self.cached_tokens),
        )


@dataclass(frozen=True)
class Form(ABC):
    """The form of one answer: its chunks, and their common fields."""

    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    default_tokens: ClassVar[int]
    """maximum length of the answer if the request gives none"""

    @abstractmethod
    def whole(self, result: Result) -> Json:
        """Return the answer as one object."""

    def first(self) -> list[Json]:
        """Return the chunks before the text."""
        return []

    @abstractmethod
    def piece(self, text: str) -> Json:
        """Return a chunk of text."""

    @abstractmethod
    def last(self, result: Result) -> Json:
        """Return the chunk with the finish reason and the facts about the cache."""

    def usage(self, result: Result) -> Json:
        return self._chunk([]) | {"usage": result.usage.model_dump()}

    @abstractmethod
    def _chunk(self, choices: list[Json]) -> Json: ...


class ChatForm(Form):
    default_tokens = 1024

    def whole(self, result: Result) -> Json:
        choice = ChatChoice(message=Said(content=result.text), finish_reason=result.finish_reason)
        whole = Chat(
            id=self._id, created=self.created, model=self.model, choices=[choice], usage=result.usage, kv=result.kv
        )
        return whole.model_dump()

    def first(self) -> list[Json]:
        return [self._chunk([self._choice({"role": "assistant", "content": ""})])]

    def piece(self, text: str) -> Json:
        return self._chunk([self._choice({"content": text})])

    def last(self, result: Result) -> Json:
        return self._chunk([self._choice({}, result.finish_reason)]) | {"kv": result.kv.model_dump()}

    @property
    def _id(self) -> str:
        return f"chatcmpl-{self.id}"

    def _choice(self, delta: Json, finish_reason: str | None = None) -> Json:
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}

    def _chunk(self, choices: list[Json]) -> Json:
        kind = "chat.completion.chunk"
        return {"id": self._id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


class CompletionForm(Form):
    default_tokens = 16

    def whole(self, result: Result) -> Json:
        choice = CompletionChoice(text=result.text, finish_reason=result.finish_reason)
        whole = Completion(
            id=self._id, created=self.created, model=self.model, choices=[choice], usage=result.usage, kv=result.kv
        )
        return whole.model_dump()

    def piece(self, text: str) -> Json:
        return self._chunk([self._choice(text)])

    def last(self, result: Result) -> Json:
        return self._chunk([self._choice("", result.finish_reason)]) | {"kv": result.kv.model_dump()}

    @property
    def _id(self) -> str:
        return f"cmpl-{self.id}"

    def _choice(self, text: str, finish_reason: str | None = None) -> Json:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}

    def _chunk(self, choices: list[Json]) -> Json:
        kind = "text_completion"
        return {"id": self._id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def event(data: Json | str) -> str:
    """Return the data as a server-sent event."""
    return f"data: {data if isinstance(data, str) else json.dumps(data, separators=(',', ':'))}\n\n"
