"""What is turned away before anything of it is read: no key, or too large."""

from __future__ import annotations

import hmac
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kv_transition.serve.refusals import RefusalError

_OPEN = ("/health",)


class Gate:
    """ASGI middleware. api_key: the bearer token that everything but /health needs; None: nothing does."""

    def __init__(self, app: ASGIApp, max_body: int, api_key: str | None = None):
        self._app, self._max_body = app, max_body
        self._api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        if not self._knows(headers) and scope["path"] not in _OPEN:
            refusal = RefusalError(HTTPStatus.UNAUTHORIZED, "the API key is missing or wrong", code="invalid_api_key")
        elif length.isdigit() and int(length) > self._max_body:
            refusal = self._too_large()
        else:
            await self._app(scope, self._counted(receive), send)
            return
        await refusal.response(scope, receive, send)

    def _knows(self, headers: Headers) -> bool:
        if self._api_key is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), self._api_key)

    def _counted(self, receive: Receive) -> Receive:
        """Bodies without a declared length are counted while they come."""
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_body:
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, str(self._too_large()))
            return message

        return counted

    def _too_large(self) -> RefusalError:
        return RefusalError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body has more than {self._max_body} bytes")
