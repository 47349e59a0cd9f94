"""Error responses in the form of OpenAI's API."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from kv_transition.errors import UserError
from kv_transition.serve.refusal import RefusalError

_log = logging.getLogger("uvicorn.error")


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: Error


def refusal_of(error: Exception) -> RefusalError:
    """Return the error response for an exception; the traceback of a bug goes to the log, not to the client."""
    if isinstance(error, RefusalError):
        return error
    if isinstance(error, UserError):
        return RefusalError(HTTPStatus.BAD_REQUEST, str(error))
    _log.error("a request failed", exc_info=error)
    return RefusalError(
        HTTPStatus.INTERNAL_SERVER_ERROR, "the server failed on this request; its log contains the reason"
    )


def response_of(refusal: RefusalError) -> JSONResponse:
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


def install(app: FastAPI) -> None:
    """Make an app return every error as an ErrorBody."""

    @app.exception_handler(RefusalError)
    @app.exception_handler(UserError)
    @app.exception_handler(Exception)
    def _(request: Request, error: Exception) -> JSONResponse:
        return response_of(refusal_of(error))

    @app.exception_handler(RequestValidationError)
    def _(request: Request, error: RequestValidationError) -> JSONResponse:
        return response_of(_first(error))

    @app.exception_handler(HTTPException)
    def _(request: Request, error: HTTPException) -> JSONResponse:
        refusal = RefusalError(error.status_code, str(error.detail))
        return JSONResponse(refusal.body, error.status_code, error.headers)


def _first(error: RequestValidationError) -> RefusalError:
    """Return the refusal for the first error in a body, with its position."""
    errors = error.errors()
    if errors[0]["type"] == "json_invalid":
        return RefusalError(HTTPStatus.BAD_REQUEST, f"the body is not JSON: {errors[0]['ctx']['error']}")
    # pydantic reports one error for each member of a union; the deepest error belongs to the closest member
    places = [_place(each["loc"][1:], error.body, missing=each["type"] == "missing") for each in errors]
    first, place = max(zip(errors, places, strict=True), key=lambda pair: len(pair[1]))
    where = ".".join(place)
    if where:
        return RefusalError(HTTPStatus.BAD_REQUEST, f"{where}: {first['msg']}", param=where)
    why = str(first["ctx"]["error"]) if first["type"] == "value_error" else "send a JSON object"
    return RefusalError(HTTPStatus.BAD_REQUEST, f"the body: {why}")


def _place(parts: Sequence[str | int], body: Any, *, missing: bool) -> list[str]:
    """Return the keys and indices that lead to a value in the body.

    Between them pydantic inserts the names of union members, which do not occur in the body. missing: the last part
    names a field that the body lacks.
    """
    place = []
    for number, part in enumerate(parts, 1):
        inside = part in body if isinstance(body, dict) else isinstance(body, list) and isinstance(part, int)
        if inside:
            body = body[part]
        if inside or (missing and number == len(parts)):
            place.append(str(part))
    return place
