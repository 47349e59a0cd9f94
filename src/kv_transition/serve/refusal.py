"""The refusal of a request, in the form of OpenAI's API, without the libraries that the server needs."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any


class RefusalError(Exception):
    """A refused request. param: the field that is wrong. code: an identifier for programs."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = {"Retry-After": str(retry_after)} if retry_after else {}
        if status == HTTPStatus.UNAUTHORIZED:
            self.headers["WWW-Authenticate"] = "Bearer"

    @property
    def body(self) -> dict[str, Any]:
        """The response's body: a `refusals.ErrorBody` as plain values."""
        kind = "server_error" if self.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
