"""The routes of the API."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.background import BackgroundTask

from kv_transition import __version__
from kv_transition.serve.asked import Asked, asked
from kv_transition.serve.bodies import JsonRoute
from kv_transition.serve.forms import ChatForm, CompletionForm, Form, Result, event
from kv_transition.serve.gate import Gate
from kv_transition.serve.model import Served
from kv_transition.serve.prompts import prompt_of
from kv_transition.serve.refusals import ErrorBody, RefusalError, install, refusal_of
from kv_transition.serve.schema import Chat, ChatRequest, Completion, CompletionRequest, Health, Model, Models
from kv_transition.serve.transcript import Transcript
from kv_transition.serve.worker import Job, Worker

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "not answered, and why"},
    503: {"model": ErrorBody, "description": "no memory left, come again after Retry-After; or the server stops"},
}
_STREAM = {"text/event-stream": {"schema": {"type": "string"}}}


def create_app(
    served: Served,
    *,
    queue: int = 256,
    max_body: int = 8_000_000,
    api_key: str | None = None,
    files: Sequence[str] = (),
) -> FastAPI:
    """The server as an ASGI application.

    queue: requests that may wait for the model. max_body: bytes of a request. api_key: the bearer token that requests
    need; None: none. files: of policies that requests may name, beside the kinds that have a name.
    """
    worker = Worker(queue)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        worker.stop()

    # no pages that would load scripts from elsewhere
    app = FastAPI(title="kv-transition", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.worker = worker
    app.router.route_class = JsonRoute
    app.add_middleware(Gate, max_body=max_body, api_key=api_key, max_requests=4 * queue + 64)
    install(app)
    model = Model(id=served.name, created=int(time.time()))

    @app.get("/health")
    async def health() -> Health:
        prefills = served.prefills
        return Health(
            model=served.name,
            running=worker.running,
            waiting=worker.waiting,
            prefills=len(prefills),
            prefill_bytes=prefills.nbytes,
        )

    @app.get("/v1/models", responses=_ERRORS)
    async def models() -> Models:
        return Models(data=[model])

    @app.get("/v1/models/{name:path}", responses=_ERRORS)
    async def one_model(name: str) -> Model:
        _require_model(served, name)
        return model

    @app.post("/v1/chat/completions", response_model=Chat, responses={200: {"content": _STREAM}} | _ERRORS)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await _respond(served, worker, body, asked(body, files), request, ChatForm(served.name))

    @app.post("/v1/completions", response_model=Completion, responses={200: {"content": _STREAM}} | _ERRORS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await _respond(served, worker, body, asked(body, files), request, CompletionForm(served.name))

    return app


def _require_model(served: Served, name: str) -> None:
    if name != served.name:
        raise RefusalError(
            HTTPStatus.NOT_FOUND,
            f"model: there is no {name!r} here; this server has {served.name!r}",
            param="model",
            code="model_not_found",
        )


async def _respond(
    served: Served, worker: Worker, body: ChatRequest | CompletionRequest, wish: Asked, request: Request, form: Form
) -> Response:
    _require_model(served, body.model)
    _require_short(served, body)
    stream = bool(body.stream)
    job = Job(lambda job: _work(served, body, wish, form, job, stream=stream))
    worker.submit(job)
    handed_over = False
    try:
        # the status is known only once there is something to say
        first = await _next(job, request)
        if isinstance(first, Exception):
            raise refusal_of(first)
        if stream:
            handed_over = True
            usage = bool(body.stream_options and body.stream_options.include_usage)
            return StreamingResponse(
                _events(job, first, form, worker, usage=usage),
                media_type="text/event-stream",
                background=BackgroundTask(worker.withdraw, job),
            )
        return JSONResponse(form.whole(first))
    finally:
        if not handed_over:
            worker.withdraw(job)


def _require_short(served: Served, body: ChatRequest | CompletionRequest) -> None:
    """Token ids are counted before they wait, so that long ones take no memory."""
    if isinstance(body, CompletionRequest) and isinstance(body.prompt, list) and len(body.prompt) > served.max_length:
        raise RefusalError(
            HTTPStatus.BAD_REQUEST,
            f"a prompt of {len(body.prompt)} tokens is longer than {served.max_length}",
            param="prompt",
            code="context_length_exceeded",
        )


def _work(
    served: Served, body: ChatRequest | CompletionRequest, wish: Asked, form: Form, job: Job, *, stream: bool
) -> Result:
    """Answer a request, on the model's thread; a stream's text is told piece by piece."""
    if job.cancelled:
        raise _gone()
    prompt = prompt_of(served.engine, body)
    transcript = Transcript(served.engine.tokenizer, wish.stops)

    def listen(tokens: Sequence[int]) -> bool:
        if stream or wish.stops:
            piece = transcript.hear(tokens)
            if stream and piece:
                job.tell(piece)
        return transcript.stopped or job.cancelled

    answer, kv, there = served.answer(wish, prompt, form.default_tokens, listen)
    if not transcript.stopped:
        transcript.hear(answer.tokens)
    if stream and (piece := transcript.rest()):
        job.tell(piece)
    return Result(transcript.text, answer.finish_reason, len(prompt), there, kv)


async def _next(job: Job, request: Request) -> Any:
    """What the job tells next, unless the client goes away before; then RefusalError, which nobody reads."""
    gone = asyncio.ensure_future(_disconnected(request))
    told = asyncio.ensure_future(job.next())
    try:
        await asyncio.wait({gone, told}, return_when=asyncio.FIRST_COMPLETED)
        if told.done():
            return told.result()
        raise _gone()
    finally:
        gone.cancel()
        told.cancel()
        await asyncio.gather(gone, told, return_exceptions=True)


def _gone() -> RefusalError:
    return RefusalError(HTTPStatus.BAD_REQUEST, "the client has gone away")


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(job: Job, told: Any, form: Form, worker: Worker, *, usage: bool) -> AsyncIterator[str]:
    try:
        for chunk in form.first():
            yield event(chunk)
        while isinstance(told, str):
            yield event(form.piece(told))
            told = await job.next()
        if isinstance(told, Exception):
            yield event(refusal_of(told).body)
            return
        yield event(form.last(told))
        if usage:
            yield event(form.usage(told))
        yield event("[DONE]")
    finally:
        worker.withdraw(job)
