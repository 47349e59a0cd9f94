"""The command `python -m kv_transition serve`: load a model and answer requests until the process is stopped."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence

import torch
import uvicorn
from fastapi import FastAPI

from kv_transition.cache.state import EVERY, STATISTICS
from kv_transition.data import model_files
from kv_transition.engines.local import LocalEngine
from kv_transition.errors import UserError
from kv_transition.policies import catalog
from kv_transition.serve.app import create_app, most_under_way
from kv_transition.serve.model import Served
from kv_transition.serve.prefills import Prefills
from kv_transition.serve.worker import Worker

_INTERRUPTED = 130
"""exit status of a process that was ended by Ctrl+C"""

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

    Raises UserError for invalid options, before the model is loaded, and if loading fails.
    """
    api_key = _api_key(api_key_env)
    held = _statistics(statistics)
    for file in policy_files:
        catalog.describe(file)  # raises if there is no policy in it
    listening = _listen(host, port)
    if api_key is None and host not in _LOOPBACK:
        print(
            f"everybody who can reach {host} can use this server; --api-key-env makes it require a key", file=sys.stderr
        )
    if threads:
        torch.set_num_threads(threads)
    model_files.check(model, revision)
    engine = LocalEngine.from_pretrained(
        model, revision=revision, dtype=dtype, device=device, chunk_tokens=chunk_tokens
    )
    longest = max_length or engine.model.config.get_text_config().max_position_embeddings
    served = Served(name or model, engine, Prefills(engine, round(prefill_gb * 1e9), held), longest)
    max_body = round(max_body_mb * 1e6)
    app = create_app(served, queue=queue, batch=batch, max_body=max_body, api_key=api_key, files=policy_files)
    address = f"http://{host}:{listening.getsockname()[1]}/v1"
    print(f"{served.name} is served at {address}; stop with Ctrl+C", file=sys.stderr, flush=True)
    _run(app, listening, queue)


class _Server(uvicorn.Server):
    """A uvicorn server that refuses every waiting and running request at shutdown, before it waits for them to end."""

    def __init__(self, config: uvicorn.Config, worker: Worker):
        super().__init__(config)
        self._worker = worker

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._worker.refuse()
        await super().shutdown(sockets)


def _run(app: FastAPI, listening: socket.socket, queue: int) -> None:
    worker = app.state.worker
    # The gate refuses requests with a message at half this number; more connections would only use memory.
    connections = 2 * most_under_way(queue)
    config = uvicorn.Config(app, log_level="warning", limit_concurrency=connections, timeout_graceful_shutdown=1)
    try:
        _Server(config, worker).run(sockets=[listening])
    finally:
        if not worker.ended:
            # A forward pass has not ended: its thread would use objects that the interpreter deletes at its exit.
            os._exit(_INTERRUPTED)


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "")
    if not key:
        raise UserError(f"--api-key-env: the environment variable {variable} is not set; set it to the key")
    return key


def _statistics(names: str) -> frozenset[str]:
    """Return the statistics that every prefill computes."""
    if names in ("all", "none"):
        return STATISTICS if names == "all" else frozenset()
    given = frozenset(names.split(","))
    if unknown := sorted(given - EVERY):
        known = ", ".join(sorted(EVERY))
        raise UserError(f"--statistics: there is no {unknown[0]!r}; give all, none, or some of {known}")
    return given


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; it is opened before the model is loaded."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--host, --port: the server cannot listen at {host}:{port} ({reason}); choose another address or port"
        ) from None
