"""The command `python -m kv_transition serve`: load a model, listen, answer until stopped."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence

import torch
import uvicorn
from fastapi import FastAPI

from kv_transition.cache.state import EVERY, STATISTICS
from kv_transition.engines.local import LocalEngine
from kv_transition.errors import UserError
from kv_transition.policies import catalog
from kv_transition.serve.app import create_app, most_under_way
from kv_transition.serve.model import Served
from kv_transition.serve.prefills import Prefills
from kv_transition.serve.worker import Worker

_INTERRUPTED = 130
"""exit status of a process that Ctrl+C ends"""

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    model: str,
    *,
    host: str,
    port: int,
    name: str | None,
    revision: str | None,
    dtype: str,
    device: str,
    threads: int | None,
    chunk_tokens: int | None,
    max_length: int | None,
    prefill_gb: float,
    statistics: str,
    policy_files: Sequence[str],
    api_key_env: str | None,
    max_body_mb: float,
    queue: int,
    batch: int,
) -> None:
    """Serve a model until the process is stopped; `cli.serve` explains the options.

    Raises UserError for what can be seen before the model is loaded, and where loading fails.
    """
    api_key = _api_key(api_key_env)
    held = _statistics(statistics)
    for file in policy_files:
        catalog.describe(file)  # raises where there is none
    listening = _listen(host, port)
    if api_key is None and host not in _LOOPBACK:
        print(f"anyone who reaches {host} can use this server; --api-key-env asks for a key", file=sys.stderr)
    if threads:
        torch.set_num_threads(threads)
    engine = LocalEngine.from_pretrained(
        model, revision=revision, dtype=dtype, device=device, chunk_tokens=chunk_tokens
    )
    longest = max_length or engine.model.config.get_text_config().max_position_embeddings
    served = Served(name or model, engine, Prefills(engine, round(prefill_gb * 1e9), held), longest)
    max_body = round(max_body_mb * 1e6)
    app = create_app(served, queue=queue, batch=batch, max_body=max_body, api_key=api_key, files=policy_files)
    address = f"http://{host}:{listening.getsockname()[1]}/v1"
    print(f"{served.name} at {address}, stop with Ctrl+C", file=sys.stderr, flush=True)
    _run(app, listening, queue)


class _Server(uvicorn.Server):
    """Tells every request that waits or is being answered that it gets no answer, before it waits for them to end."""

    def __init__(self, config: uvicorn.Config, worker: Worker):
        super().__init__(config)
        self._worker = worker

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._worker.refuse()
        await super().shutdown(sockets)


def _run(app: FastAPI, listening: socket.socket, queue: int) -> None:
    worker = app.state.worker
    # The gate refuses far fewer with a word; connections beyond these are only there to take memory.
    connections = 2 * most_under_way(queue)
    config = uvicorn.Config(app, log_level="warning", limit_concurrency=connections, timeout_graceful_shutdown=1)
    try:
        _Server(config, worker).run(sockets=[listening])
    finally:
        if not worker.ended:
            # A pass through the model that does not end: its thread would touch what the interpreter takes down.
            os._exit(_INTERRUPTED)


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "")
    if not key:
        raise UserError(f"--api-key-env: the environment variable {variable} is not set; put the key in it")
    return key


def _statistics(names: str) -> frozenset[str]:
    """Return the statistics that every prefill is read with."""
    if names in ("all", "none"):
        return STATISTICS if names == "all" else frozenset()
    given = frozenset(names.split(","))
    if unknown := sorted(given - EVERY):
        known = ", ".join(sorted(EVERY))
        raise UserError(f"--statistics: there is no {unknown[0]!r}; give all, none, or some of {known}")
    return given


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket, opened before the model is loaded."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host, --port: {host}:{port} cannot be listened at ({reason}); choose others") from None
