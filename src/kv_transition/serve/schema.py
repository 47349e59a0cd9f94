"""Requests and responses of the API as typed models, which define /openapi.json."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


def _either(words: str, *types: type) -> BeforeValidator:
    """Return a validator: the value must have one of these JSON types, which ``words`` describe.

    Without it pydantic would only report why the value is not the first member of the union.
    """

    def check(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, types):
            raise PydanticCustomError("types", "give {words}", {"words": words})
        return value

    return BeforeValidator(check)


Seed = Annotated[int, Field(ge=0, lt=2**48)]
Count = Annotated[int, Field(ge=1)]
Stop = Annotated[str, Field(min_length=1)]
Place = Annotated[int, Field(ge=0)]
# Validation of a list ends at the first wrong item, because a body may contain a million of them.
Stops = Annotated[list[Stop], Field(max_length=16, fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Ids = Annotated[list[int], Field(fail_fast=True)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Tokens(_Strict):
    tokens: Count


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class InMessage(_Strict):
    message: Place
    """index of the message, from 0"""
    characters: Place
    """number of characters of its text"""


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: str


Parts = Annotated[list[TextPart], Field(fail_fast=True)]


class Message(BaseModel):
    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        str | Annotated[list[TextPart], Field(fail_fast=True)],
        _either("a text, or a list of parts of type text", str, list),
    ]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Request(BaseModel):
    """The fields of both kinds of request.

    Fields that are not listed are ignored, unless they would change the answer.
    """

    model_config = ConfigDict(strict=True, extra="allow", json_schema_extra={"additionalProperties": True})

    model: str
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    stop: (
        Annotated[
            Stop | Annotated[list[Stop], Field(max_length=16, fail_fast=True)],
            _either("a text or a list of texts", str, list),
        ]
        | None
    ) = None
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    kv_policy: Annotated[str | dict[str, Any], _either("a name or an object", str, dict)] = "full"
    """kind of the policy, or ``{"kind": ..., hyper-parameters}``"""
    kv_budget: (
        Annotated[
            Annotated[float, Field(gt=0, le=1)] | Tokens,
            _either('a fraction, or an object {"tokens": n}', float, int, dict),
        ]
        | None
    ) = None
    """fraction of the entries that is kept, or ``{"tokens": n}``"""
    kv_mode: Literal["before_question", "after_prompt"] = "after_prompt"
    """what is compressed: the context before the question is read, or the whole prompt"""
    kv_first_token: Literal["compressed", "full"] = "compressed"
    """after_prompt: the cache from which the first token is decoded"""
    kv_seed: Seed | None = None
    """used instead of ``seed``, for clients that set ``seed`` themselves"""
    kv_pace: Annotated[list[Annotated[int, Field(ge=0, le=65_536)]], Field(min_length=2, max_length=2)] | None = None
    """for the controls of entropy_recall: moments and decode steps of the answer that is controlled for"""

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, body: Any) -> Any:
        """Return the body. Raises ValueError if a text has a lone surrogate, which JSON allows but no tokenizer
        accepts.
        """
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text in it contains half of a character (a lone surrogate)") from None
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        return body

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(Request):
    prompt: Annotated[
        str | Ids | Texts | Annotated[list[Ids], Field(fail_fast=True)],
        _either("a text or a list of token ids", str, list),
    ]
    kv_context: Place | None = None
    """length of the context: in characters for a text, in tokens for token ids"""


class ChatRequest(Request):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Count | None = None
    kv_context: (
        Annotated[
            Place | InMessage,
            _either('a number of messages, or an object {"message": i, "characters": n}', int, dict),
        ]
        | None
    ) = None
    """number of messages that form the context, which ends with the text of the last; or a position in a message"""

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class PromptTokens(BaseModel):
    cached_tokens: int
    """number of prompt tokens that were read for an earlier request"""


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


class KV(BaseModel):
    """Facts about the cache: entries per KV head (mean over evictable layers), bytes, seconds."""

    policy: str
    hyper_parameters: dict[str, Any]
    budget: str
    mode: str
    seed: int
    budget_entries: int
    protected: int
    kept_final: float
    kept_mean: float
    cache_bytes: int
    total_bytes: int
    full_bytes: int
    reused: bool
    """whether the prefill was in memory; ``prefill_s`` is then the time that it took when it was computed"""
    prefill_s: float
    compress_s: float
    ttft_s: float
    decode_s: float
    batch_size: int
    """maximum number of answers in one forward pass with this one, this one included"""
    peak_mem_mb: float | None
    token_ids: list[int]
    record: dict[str, Any]
    """facts that the policy records"""


FinishReason = Literal["stop", "length"]


class CompletionChoice(BaseModel):
    index: int = 0
    text: str
    logprobs: None = None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    kv: KV | None = None


class Said(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int = 0
    message: Said
    logprobs: None = None
    finish_reason: FinishReason


class Chat(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    kv: KV


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "kv_transition"


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    model: str
    running: int
    """number of answers that are being computed"""
    waiting: int
    prefills: int
    prefill_bytes: int
