"""Requests to an OpenAI-compatible endpoint and its replies, as typed values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel


@dataclass(frozen=True)
class Request:
    """A request for an answer to ``prompt`` (text or token ids; completions) or ``messages`` (chat)."""

    model: str
    max_tokens: int
    prompt: str | Sequence[int] | None = None
    messages: Sequence[Mapping[str, str]] | None = None
    temperature: float = 0.0
    seed: int | None = None
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """further fields of the body"""

    @property
    def path(self) -> str:
        return "/completions" if self.messages is None else "/chat/completions"

    def body(self, stream: bool) -> dict[str, Any]:
        asked = {"prompt": self.prompt} if self.messages is None else {"messages": self.messages}
        body = {"model": self.model, **asked, "max_tokens": self.max_tokens, "temperature": self.temperature}
        if self.seed is not None:
            body["seed"] = self.seed
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body | dict(self.extra_body)


@dataclass(frozen=True)
class Reply:
    """A complete answer, or ``error`` ("TIMEOUT: ...", "OOM: ...", "ENGINE_ERROR: ...") and no text.

    Times are those of the successful exchange, in seconds: ``ttft_s`` until the first piece of text, ``decode_s`` from
    there to the last piece; None if the answer came in one piece. ``usage`` is the endpoint's token count, unchecked;
    None if it sent none.
    """

    text: str | None = None
    finish_reason: str | None = None
    usage: Mapping[str, Any] | None = None
    model: str | None = None
    """name of the model at the endpoint"""
    kv: Mapping[str, Any] | None = None
    """facts about the cache, if the endpoint is a server of kv_transition"""
    ttft_s: float | None = None
    decode_s: float | None = None
    latency_s: float | None = None
    window: tuple[float, float] | None = None
    """begin and end, as times of time.perf_counter"""
    pieces: int = 0
    attempts: int = 1
    co_running: bool = False
    """whether another request of this client ran at the same time"""
    error: str | None = None


class FailureError(Exception):
    """An exchange gave no answer and must not be repeated."""


class AgainError(FailureError):
    """An exchange gave no answer and may be repeated."""

    def __init__(self, reason: str, *, wait: float | None = None, status: int | None = None, connected: bool = True):
        super().__init__(reason)
        self.wait, self.status, self.connected = wait, status, connected


class Choice(BaseModel):
    class Said(BaseModel):
        content: str | None = None

    index: int = 0
    text: str | None = None
    delta: Said | None = None
    message: Said | None = None
    finish_reason: str | None = None

    @property
    def said(self) -> str:
        inner = self.delta or self.message
        return (inner.content if inner else self.text) or ""


class Piece(BaseModel):
    """An event of a stream, or a whole answer."""

    choices: list[Choice] | None = None
    usage: dict[str, Any] | None = None
    model: str | None = None
    kv: dict[str, Any] | None = None
