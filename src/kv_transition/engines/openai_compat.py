"""Answers from an OpenAI-compatible endpoint: the official client, with tenacity for retries.

The client's own retries end with the response headers. A broken stream, a stream without a finish reason, an error
inside a stream and an error under status 200 come later, and the client takes some of them for answers. Therefore its
retries are off, and tenacity repeats the whole exchange, headers and body. An answer counts only if it is complete;
parts of an incomplete answer are discarded. The time limit ``timeout_s`` covers the whole exchange; the client's own
limits only the pause between two pieces.

The API key is read from the environment when a request is sent. It is not stored in any attribute, and it is removed
from everything that the endpoint returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import openai
import tenacity
from pydantic import ValidationError

from kv_transition.engines.openai_forms import AgainError, FailureError, Piece, Reply, Request
from kv_transition.errors import UserError

CONNECT_S = 10.0
"""longest wait for a connection, in seconds"""
LONGEST_WAIT_S = 120.0
"""longest pause in seconds that an endpoint may request; a longer one ends the attempts"""
BACKOFF = tenacity.wait_exponential_jitter(multiplier=0.5, max=30, jitter=0.5)

_AGAIN = (408, 409, 429)
_REFUSED = (401, 403)
_OOM = {"out_of_memory": "OOM: "}
"""prefix of a failure by the error code of kv_transition's own server"""
_SAID = 300
"""largest number of characters of an endpoint's message that is quoted"""


@dataclass(eq=False)
class _Flight:
    shared: bool = False


@dataclass(frozen=True)
class Client:
    """An endpoint with its time limit and retries.

    base_url: up to and including ``/v1``. api_key_env: name of the environment variable with the key; None: no key is
    sent. timeout_s: of one exchange, from the request to the last piece of the answer. retries: further attempts after
    the first, for 408, 409, 429, 5xx, broken connections and broken answers; a pause that the endpoint requests
    (Retry-After) is respected, other pauses grow from half a second. stream: false: the answer comes in one piece,
    without a time to first token.
    """

    base_url: str
    api_key_env: str | None = None
    timeout_s: float = 60.0
    retries: int = 5
    stream: bool = True

    def complete(
        self,
        model: str,
        max_tokens: int,
        *,
        prompt: str | Sequence[int] | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> Reply:
        """Return one answer. Raises UserError as `complete_all` does."""
        request = Request(model, max_tokens, prompt, messages, temperature, seed, extra_body or {})
        return self.complete_all([request])[0]

    def complete_all(
        self, requests: Sequence[Request], concurrency: int = 1, done: Callable[[int, Reply], None] | None = None
    ) -> list[Reply]:
        """Return the answer to each request, with at most ``concurrency`` in progress.

        done: called with a request's number and its reply when it has arrived, from the calling thread.

        Raises UserError if no request could succeed: the endpoint cannot be reached, refuses the key, does not know the
        model, or allows no more requests. Replies that ``done`` received before remain valid.
        """
        return asyncio.run(self._complete_all(requests, concurrency, done))

    def check(self, request: Request) -> Reply:
        """Return the answer to a request of one token. Raises UserError, one sentence, if there is none."""
        (reply,) = self.complete_all([replace(request, max_tokens=1)])
        if reply.error:
            raise UserError(f"{self.base_url} does not answer a request of one token: {reply.error}")
        return reply

    async def _complete_all(
        self, requests: Sequence[Request], concurrency: int, done: Callable[[int, Reply], None] | None
    ) -> list[Reply]:
        replies: dict[int, Reply] = {}
        queue: Iterator[tuple[int, Request]] = iter(enumerate(requests))
        live: set[_Flight] = set()

        async def work(client: openai.AsyncOpenAI) -> None:
            for number, request in queue:
                replies[number] = await self._reply(client, request, live)
                if done:
                    done(number, replies[number])

        try:
            async with self._opened() as client, asyncio.TaskGroup() as group:
                for _ in range(max(1, min(concurrency, len(requests)))):
                    group.create_task(work(client))
        except ExceptionGroup as errors:
            # all workers get the same refusal; a bug is reported rather than a refusal
            raise sorted(errors.exceptions, key=lambda e: isinstance(e, UserError))[0] from None
        return [replies[number] for number in range(len(requests))]

    @contextlib.asynccontextmanager
    async def _opened(self) -> AsyncIterator[openai.AsyncOpenAI]:
        # Requests to this machine must not use a proxy from the environment.
        http = openai.DefaultAsyncHttpxClient(trust_env=not is_loopback(self.base_url))
        async with openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key=self._key() or "none",
            max_retries=0,
            timeout=openai.Timeout(None, connect=min(CONNECT_S, self.timeout_s)),
            http_client=http,
        ) as client:
            yield client

    def _key(self) -> str:
        key = os.environ.get(self.api_key_env or "", "").strip()
        if not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(f"the environment variable {self.api_key_env} contains characters that no API key has")
        return key

    async def _reply(self, client: openai.AsyncOpenAI, request: Request, live: set[_Flight]) -> Reply:
        trying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(_worth_another),
            stop=tenacity.stop_after_attempt(self.retries + 1),
            wait=_pause,
            reraise=True,
        )
        try:
            reply = await trying(self._exchange, client, request, live)
        except FailureError as failure:
            attempts = trying.statistics["attempt_number"]
            tried = f" ({attempts} attempts)" if attempts > 1 else ""
            if isinstance(failure, AgainError):
                if failure.status == 429:
                    raise UserError(f"{self.base_url} allows no more requests for now: {failure}{tried}") from None
                if not failure.connected:
                    await self._demand_reachable(client, f"{failure}{tried}")
                    # A server that was restarted meanwhile is asked once more, so that its absence costs no answer.
                    with contextlib.suppress(FailureError):
                        return replace(await self._exchange(client, request, live), attempts=attempts + 1)
            kind = "" if str(failure).startswith(("TIMEOUT: ", "OOM: ")) else "ENGINE_ERROR: "
            return Reply(error=f"{kind}{failure}{tried}", attempts=attempts)
        return replace(reply, attempts=trying.statistics["attempt_number"])

    async def _demand_reachable(self, client: openai.AsyncOpenAI, reason: str) -> None:
        """Raise UserError if the endpoint cannot be reached at all; a single lost connection may be specific to one
        request.
        """
        try:
            await client.get("/models", cast_to=object, options={"timeout": CONNECT_S})
        except openai.APIConnectionError:
            raise UserError(f"{self.base_url} cannot be reached: {reason}; is the server running there?") from None
        except (openai.OpenAIError, ValueError):
            return  # it has answered, so it can be reached

    async def _exchange(self, client: openai.AsyncOpenAI, request: Request, live: set[_Flight]) -> Reply:
        """Make one attempt. Raises FailureError, or UserError if no attempt of any request can succeed."""
        flight = _Flight(shared=bool(live))
        for other in live:
            other.shared = True
        live.add(flight)
        try:
            async with asyncio.timeout(self.timeout_s):
                reply = await self._answer(client, request)
        except TimeoutError:
            raise FailureError(f"TIMEOUT: no complete answer within {self.timeout_s:g} s") from None
        except openai.APIStatusError as error:
            raise self._status(error, request) from None
        except openai.APITimeoutError:
            raise AgainError("no connection in time", connected=False) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            reason = self._clean(f"{type(cause).__name__}: {cause}")
            raise AgainError(f"the connection broke: {reason}", connected=False) from None
        except openai.APIError as error:
            raise self._told(error.body if isinstance(error.body, Mapping) else {"message": str(error)}) from None
        except (json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
            reason = self._clean(str(error).splitlines()[0])
            raise AgainError(f"the answer does not match the protocol: {reason}") from None
        finally:
            live.discard(flight)
        if self._key() and self._key() in (reply.text or ""):
            raise FailureError("the answer contains the API key, so it is discarded")
        return replace(reply, co_running=flight.shared)

    async def _answer(self, client: openai.AsyncOpenAI, request: Request) -> Reply:
        started = time.perf_counter()
        texts: list[str] = []
        times: list[float] = []
        finish_reason, usage, model, kv = None, None, None, None
        async with contextlib.aclosing(self._pieces(client, request)) as pieces:
            async for piece in pieces:
                usage, model, kv = piece.usage or usage, piece.model or model, piece.kv or kv
                for choice in piece.choices or []:
                    if choice.index == 0:
                        if choice.said:
                            texts.append(choice.said)
                            times.append(time.perf_counter())
                        finish_reason = choice.finish_reason or finish_reason
        if finish_reason is None:
            what = "it ended before it was finished" if texts else "it contains no choice"
            raise AgainError(f"the answer is incomplete: {what}")
        ended = time.perf_counter()
        streamed = self.stream and len(times) > 1
        return Reply(
            text="".join(texts),
            finish_reason=finish_reason,
            usage=usage,
            model=model,
            kv=kv,
            ttft_s=times[0] - started if self.stream and times else None,
            decode_s=times[-1] - times[0] if streamed else None,
            latency_s=ended - started,
            window=(started, ended),
            pieces=len(times),
        )

    async def _pieces(self, client: openai.AsyncOpenAI, request: Request) -> AsyncIterator[Piece]:
        body = request.body(self.stream)
        if not self.stream:
            yield self._piece(await client.post(request.path, cast_to=object, body=body))
            return
        stream = await client.post(
            request.path, cast_to=object, body=body, stream=True, stream_cls=openai.AsyncStream[object]
        )
        async with stream:
            if "json" in stream.response.headers.get("content-type", ""):
                # the client would read an error or an answer in one piece as a stream without events
                yield self._piece(json.loads(await stream.response.aread()))
                return
            async for event in stream:
                yield self._piece(event)

    def _piece(self, value: object) -> Piece:
        if isinstance(value, Mapping) and value.get("error"):
            raise self._told(value["error"])
        return Piece.model_validate(value)

    def _told(self, error: Any) -> FailureError:
        """Return the error that came under status 200; an HTTP code in it decides whether to retry."""
        said = error if isinstance(error, Mapping) else {"message": error}
        reason = self._clean(f"the endpoint says: {said.get('message') or said}")
        code = str(said.get("code") or "")
        status = int(code) if code.isdecimal() else None
        if status is not None and 400 <= status < 500 and status not in _AGAIN:
            return FailureError(reason)
        return AgainError(reason, status=status)

    def _status(self, error: openai.APIStatusError, request: Request) -> Exception:
        status = error.status_code
        body = error.body if isinstance(error.body, Mapping) else {}
        said = body.get("message") or error.response.text or error.response.reason_phrase
        reason = self._clean(f"{_OOM.get(body.get('code'), '')}status {status}: {said}")
        if status in _REFUSED:
            if not self.api_key_env:
                held = "but api_key_env names none"
            elif self._key():
                held = f"and does not accept the one in the environment variable {self.api_key_env}"
            else:
                held = f"but the environment variable {self.api_key_env} is not set"
            return UserError(f"{self.base_url} requires an API key, {held} ({reason})")
        if status == 404:
            return UserError(f"{self.base_url} has no model {request.model!r}, or no {request.path[1:]} ({reason})")
        if status in _AGAIN or status >= 500:
            wait = _retry_after(error.response.headers)
            return AgainError(reason, wait=wait, status=status)
        return FailureError(reason)

    def _clean(self, text: str) -> str:
        """Return the text as one line of limited length without the key."""
        if key := self._key():
            text = text.replace(key, "***")
        line = " ".join(text.split())
        return line if len(line) <= _SAID else line[:_SAID] + " ..."


def _worth_another(error: BaseException) -> bool:
    return isinstance(error, AgainError) and (error.wait or 0) <= LONGEST_WAIT_S


def _pause(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = getattr(error, "wait", None)
    return BACKOFF(state) if asked is None else asked


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds until the time of ``Retry-After``, a number or a date (RFC 9110, 10.2.3)."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        then = parsedate_to_datetime(value)
    except ValueError:
        return None
    if then.tzinfo is None:
        then = then.replace(tzinfo=UTC)
    return max(0.0, (then - datetime.now(UTC)).total_seconds())


def is_loopback(url: str) -> bool:
    """Return whether a URL names this machine."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
