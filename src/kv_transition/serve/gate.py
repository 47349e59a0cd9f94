"""Refuse requests before they are read: without a key, too many at once, not JSON, or too large."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kv_transition.serve.refusal import RefusalError
from kv_transition.serve.refusals import response_of

_OPEN = ("/health",)

_DRAIN_S = 5.0
"""Maximum time in seconds for reading and dropping the rest of a refused body"""


class Gate:
    """ASGI middleware that refuses requests before they are read.

    max_body: maximum bytes of a request. api_key: the bearer token that every route except /health needs; None: none is
    needed. max_requests: maximum number of requests at once, waiting ones included; None: no maximum.
    """

    def __init__(self, app: ASGIApp, max_body: int, api_key: str | None = None, max_requests: int | None = None):
        self._app, self._max_body, self._max_requests = app, max_body, max_requests
        self._api_key = None if api_key is None else api_key.encode()
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        body = _Body(receive, send, self._max_body, expected="expect" in headers)
        self._under_way += 1
        try:
            refusal = None if scope["path"] in _OPEN else self._refusal(headers)
            if refusal is None and _says_too_much(headers, self._max_body):
                refusal = too_large(self._max_body)
            app = self._app if refusal is None else response_of(refusal)
            await app(scope, body.receive, body.send)
        finally:
            self._under_way -= 1

    def _refusal(self, headers: Headers) -> RefusalError | None:
        if not self._knows(headers):
            return RefusalError(HTTPStatus.UNAUTHORIZED, "the API key is missing or wrong", code="invalid_api_key")
        if self._max_requests is not None and self._under_way > self._max_requests:
            return RefusalError(
                HTTPStatus.TOO_MANY_REQUESTS,
                f"{self._under_way - 1} requests are being processed; retry later",
                code="overloaded",
                retry_after=1,
            )
        return None

    def _knows(self, headers: Headers) -> bool:
        if self._api_key is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), self._api_key)


class _Body:
    """The body of one request; it is counted while it arrives, and read to its end before the response ends.

    If a connection is closed while the client still sends, it is reset, and the client loses the response that it has
    not read yet. Therefore the response is sent at once, and ends when the rest of the body has arrived, or after
    `_DRAIN_S` seconds.
    """

    def __init__(self, receive: Receive, send: Send, limit: int, *, expected: bool):
        """expected: the client waits for permission to send its body (Expect: 100-continue)."""
        self._receive, self._send, self._limit, self._expected = receive, send, limit, expected
        self._read, self._ended = 0, False

    async def receive(self) -> Message:
        """Return the next message, as ASGI's receive. Raises HTTPException when the body is too long, whatever length
        it declared.
        """
        message = await self._next()
        if self._read > self._limit:
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, str(too_large(self._limit)))
        return message

    async def send(self, message: Message) -> None:
        last = message["type"] == "http.response.body" and not message.get("more_body", False)
        unsent = self._expected and not self._read
        if last and not self._ended and not unsent:
            await self._send(message | {"more_body": True})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DRAIN_S):
                    while not self._ended:
                        await self._next()
            message = {"type": "http.response.body"}
        await self._send(message)

    async def _next(self) -> Message:
        message = await self._receive()
        self._read += len(message.get("body", b""))
        self._ended = not message.get("more_body", False)
        return message


def _says_too_much(headers: Headers, limit: int) -> bool:
    length = headers.get("content-length", "")
    return length.isdigit() and int(length) > limit


def too_large(limit: int) -> RefusalError:
    return RefusalError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body has more than {limit} bytes")
