"""The routes of the OpenAI-compatible API."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.background import BackgroundTask

from kv_transition import __version__
from kv_transition.serve.asked import asked
from kv_transition.serve.bodies import JsonRoute
from kv_transition.serve.forms import ChatForm, CompletionForm, Form, Result, event
from kv_transition.serve.gate import Gate
from kv_transition.serve.model import Reply, Served
from kv_transition.serve.prompts import prompt_of
from kv_transition.serve.refusal import RefusalError
from kv_transition.serve.refusals import ErrorBody, install, refusal_of
from kv_transition.serve.schema import KV, Chat, ChatRequest, Completion, CompletionRequest, Health, Model, Models
from kv_transition.serve.transcript import Transcript
from kv_transition.serve.work import Asked, Prompt
from kv_transition.serve.worker import Job, Worker

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "the request was refused; the error names the reason"},
    503: {"model": ErrorBody, "description": "out of memory: retry after Retry-After; or the server is stopping"},
}
_STREAM = {"text/event-stream": {"schema": {"type": "string"}}}


def create_app(
    served: Served,
    *,
    queue: int = 256,
    batch: int = 8,
    max_body: int = 8_000_000,
    api_key: str | None = None,
    files: Sequence[str] = (),
) -> FastAPI:
    """Return the server as an ASGI application.

    queue: maximum number of requests that wait for the model. batch: maximum number of answers decoded together.
    max_body: maximum size of a request in bytes. api_key: the bearer token that requests need; None: no token is
    needed. files: policy files that requests may name, in addition to the built-in kinds.
    """
    if batch > 1:
        served.engine.share_passes()
    worker = Worker(served.step, limit=queue, batch=batch)
    # One thread tokenizes prompts: a long prompt delays other prompts, but neither answers nor the event loop.
    reader = ThreadPoolExecutor(1, thread_name_prefix="prompts")

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        worker.stop()
        reader.shutdown(wait=False, cancel_futures=True)

    # FastAPI's documentation pages load scripts from other hosts, so they are turned off.
    app = FastAPI(title="kv-transition", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.worker = worker
    app.router.route_class = JsonRoute
    app.add_middleware(Gate, max_body=max_body, api_key=api_key, max_requests=most_under_way(queue))
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

    async def respond(body: ChatRequest | CompletionRequest, request: Request, form: Form) -> Response:
        _require_model(served, body.model)
        wish = asked(body, files)
        read = partial(prompt_of, served.engine, body, served.max_length)
        prompt = await asyncio.get_running_loop().run_in_executor(reader, read)
        return await _respond(served, worker, body, wish, prompt, request, form)

    @app.post("/v1/chat/completions", response_model=Chat, responses={200: {"content": _STREAM}} | _ERRORS)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await respond(body, request, ChatForm(served.name))

    @app.post("/v1/completions", response_model=Completion, responses={200: {"content": _STREAM}} | _ERRORS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await respond(body, request, CompletionForm(served.name))

    return app


def most_under_way(queue: int) -> int:
    """Return the maximum number of requests that are processed at once: those that wait for the model, and some whose
    bodies or answers are being transferred.
    """
    return 4 * queue + 64


def _require_model(served: Served, name: str) -> None:
    if name != served.name:
        raise RefusalError(
            HTTPStatus.NOT_FOUND,
            f"model: there is no {name!r} here; this server has {served.name!r}",
            param="model",
            code="model_not_found",
        )


async def _respond(
    served: Served,
    worker: Worker[Reply],
    body: ChatRequest | CompletionRequest,
    wish: Asked,
    prompt: Prompt,
    request: Request,
    form: Form,
) -> Response:
    stream = bool(body.stream)
    transcript = Transcript(served.engine.tokenizer, wish.stops)

    def begin(job: Job[Reply]) -> Reply:
        def listen(tokens: Sequence[int]) -> bool:
            if stream or wish.stops:
                piece = transcript.hear(tokens)
                if stream and piece:
                    job.tell(piece)
            return transcript.stopped or job.cancelled

        if job.cancelled:
            raise _gone()
        return served.begin(wish, prompt, form.default_tokens, listen)

    def end(job: Job[Reply], reply: Reply) -> Result:
        answer = reply.going.answer
        if not transcript.stopped:
            transcript.hear(answer.tokens)
        if stream and (piece := transcript.rest()):
            job.tell(piece)
        return Result(transcript.text, answer.finish_reason, len(prompt), reply.there, _kv(served, reply))

    job = Job(begin, end)
    worker.submit(job)
    handed_over = False
    try:
        # the status is known only when the first message of the job has arrived
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


def _kv(served: Served, reply: Reply) -> KV:
    """Return the facts about the cache of a finished answer."""
    asked, got = reply.asked, reply.going.answer
    return KV(
        policy=asked.kind,
        hyper_parameters=asked.hyper_parameters,
        budget=str(asked.setting.budget),
        mode=asked.setting.mode,
        seed=asked.seed,
        budget_entries=got.budget_entries,
        protected=asked.setting.policy.protected(got.budget_entries),
        kept_final=got.kept[-1],
        kept_mean=sum(got.kept) / len(got.kept),
        cache_bytes=got.cache_bytes,
        total_bytes=got.total_bytes,
        full_bytes=got.full_bytes,
        reused=reply.there > 0,
        prefill_s=got.prefill_s,
        compress_s=got.compress_s,
        ttft_s=got.prefill_s + got.compress_s + got.first_token_s,
        decode_s=got.decode_s,
        batch_size=got.batch_size,
        peak_mem_mb=served.engine.peak_memory_mb(),
        token_ids=got.tokens,
        record=got.record,
    )


async def _next(job: Job[Reply], request: Request) -> Any:
    """Return the next message of the job; raise RefusalError if the client disconnects first."""
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
    return RefusalError(HTTPStatus.BAD_REQUEST, "the client has disconnected")


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(job: Job[Reply], told: Any, form: Form, worker: Worker[Reply], *, usage: bool) -> AsyncIterator[str]:
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
