"""Request bodies must be JSON: another content type is refused before the body is read."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from email.message import Message
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from kv_transition.serve.refusal import RefusalError

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class JsonRoute(APIRoute):
    """A route that requires a body, if there is one, to be declared as JSON."""

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def handle_json(request: Request) -> Response:
            given = request.headers.get("content-type", "")
            if not _is_json(given):
                raise RefusalError(
                    HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                    f"the body is of type {given[:80]!r}; send a JSON object as application/json",
                )
            return await handle(request)

        return handle_json


def _is_json(content_type: str) -> bool:
    """Return whether a Content-Type names JSON, by FastAPI's rule (suffixes of RFC 6839 included)."""
    message = Message()
    message["content-type"] = content_type
    subtype = message.get_content_subtype()
    return message.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))
