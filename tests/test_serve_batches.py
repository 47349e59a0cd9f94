"""Test that concurrent requests are decoded together and get the answers of separate requests, despite failures."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient
from models import tokens
from serving import NAME, ask, listening, served
from test_serve import SAME, as_row, example, request_of, row_of, spec

from kv_transition.policies import catalog
from kv_transition.serve.app import create_app


async def together(url, bodies):
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None)) as client:
        return await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))


# -- the same answers


def test_a_mixture_of_requests_gets_the_cells_answers():
    """Check every policy, both modes, greedy and sampled answers, unequal lengths of prompts and answers, early
    ends."""
    own = served()
    own.engine.eos = frozenset(range(0, 97, 10))
    asked = []
    for i, kind in enumerate([*catalog.kinds(), *catalog.kinds()]):
        options = {"kind": kind} | ({"tau": 2.0} if kind == "entropy_recall" else {})
        alone = kind == "full" or catalog.ignores_budget(*catalog.resolve(kind, options))
        made = spec(options, "r1" if alone else "r0.3", ["before_question", "after_prompt"][i % 2], (i % 3) * 0.4)
        asked.append((example(i, n=20 + 7 * i, question=1 + i % 5) | {"max_new_tokens": 3 + i % 9}, made))
    with listening(own, batch=6) as url:
        got = asyncio.run(together(url, [{"model": NAME} | request_of(*each) for each in asked]))
    assert {response.status_code for response in got} == {200}
    answers = [response.json() for response in got]
    for answer, each in zip(answers, asked, strict=True):
        expected = row_of(own.engine, *each)
        assert as_row(answer) == {name: expected[name] for name in SAME}
    assert len({answer["choices"][0]["finish_reason"] for answer in answers}) == 2
    assert max(answer["kv"]["batch_size"] for answer in answers) > 2
    assert max(answer["kv"]["batch_size"] for answer in answers) <= 6


def test_no_more_than_asked_for_are_decoded_together():
    with listening(served(), batch=1) as url:
        bodies = [{"model": NAME, "prompt": tokens(10, seed=i), "temperature": 0, "max_tokens": 8} for i in range(6)]
        got = asyncio.run(together(url, bodies))
    assert [response.json()["kv"]["batch_size"] for response in got] == [1] * 6


async def stream(client, body):
    """Return the pieces of text, the last piece, and whether the stream ended properly."""
    said, last, ends = [], None, False
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                ends = True
            elif line:
                piece = json.loads(line.removeprefix("data: "))
                said.append(piece["choices"][0]["text"])
                last = piece
    return said, last, ends


def test_streams_go_on_side_by_side():
    own = served()
    bodies = [
        {"model": NAME, "prompt": tokens(12 + i, seed=i), "temperature": 0, "max_tokens": 4 + 3 * i} for i in range(6)
    ]

    async def all_of_them(url):
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            return await asyncio.gather(*(stream(client, body) for body in bodies))

    with listening(own) as url:
        alone = [httpx.post(f"{url}/v1/completions", json=body).json() for body in bodies]
        streams = asyncio.run(all_of_them(url))
    for (said, last, ends), whole in zip(streams, alone, strict=True):
        assert ends
        assert "".join(said) == whole["choices"][0]["text"]
        assert len(said) > 2
        assert last["kv"]["token_ids"] == whole["kv"]["token_ids"]
    assert max(last["kv"]["batch_size"] for _, last, _ in streams) > 1


def test_stop_sequences_end_one_answer_and_not_its_neighbours():
    own = served()
    bodies = [{"model": NAME, "prompt": f"w{5 + i} w6 w7", "temperature": 0, "max_tokens": 12} for i in range(4)]
    with listening(own) as url:
        free = [response.json() for response in asyncio.run(together(url, bodies))]
        words = free[1]["choices"][0]["text"].split()
        at = words.index(words[3])
        bodies[1]["stop"] = f" {words[3]}"
        got = [response.json() for response in asyncio.run(together(url, bodies))]
    assert got[1]["choices"][0]["text"].split() == words[:at]
    assert got[1]["choices"][0]["finish_reason"] == "stop"
    for i in (0, 2, 3):
        assert got[i]["kv"]["token_ids"] == free[i]["kv"]["token_ids"]


# -- disconnects and failures


def slowed(own, seconds):
    """Delay every choice of a token by this many seconds; return the original function."""
    choose = own.engine.next_tokens

    def slowly(*arguments):
        time.sleep(seconds)
        return choose(*arguments)

    own.engine.next_tokens = slowly
    return choose


def connect(url):
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def send(connection, body):
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    connection.sendall(head.encode() + b"\r\n\r\n" + content)


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_leaves_gives_its_place_to_the_next(streamed):
    """Check that a waiting request is answered when one of two clients with endless answers disconnects."""
    own = served(max_length=200_000)
    slowed(own, 0.01)
    endless = {"model": NAME, "temperature": 0, "max_tokens": 100_000, "stream": streamed}
    short = {"model": NAME, "prompt": tokens(9, seed=7), "temperature": 0, "max_tokens": 5}
    with listening(own, batch=2) as url, ThreadPoolExecutor(1) as pool:

        def health():
            return httpx.get(f"{url}/health").json()

        with connect(url) as stays, connect(url) as leaves:
            for number, connection in enumerate((stays, leaves)):
                send(connection, endless | {"prompt": tokens(8, seed=number)})
            wait_until(lambda: health()["running"] == 2)
            waits = pool.submit(httpx.post, f"{url}/v1/completions", json=short, timeout=60)
            wait_until(lambda: health()["waiting"] == 1)
            leaves.close()
            answer = waits.result(60).json()
            assert health()["running"] == 1  # the other client's answer continues
        assert answer["kv"]["batch_size"] == 2
        wait_until(lambda: health()["running"] == 0)
        expected = httpx.post(f"{url}/v1/completions", json=short, timeout=60).json()
        assert answer["kv"]["token_ids"] == expected["kv"]["token_ids"]


def test_a_policy_that_fails_while_decoding_ends_its_own_answer_alone(monkeypatch):
    from kv_transition.policies.tova import TOVA

    own = served()
    slowed(own, 0.02)
    bodies = [
        {"model": NAME, "prompt": tokens(20, seed=i), "temperature": 0, "max_tokens": 20, "kv_policy": kind,
         "kv_budget": 0.5}
        for i, kind in enumerate(["h2o", "tova", "snapkv"])
    ]  # fmt: skip
    with listening(own) as url:
        alone = [httpx.post(f"{url}/v1/completions", json=body).json()["kv"]["token_ids"] for body in bodies]
        hold, held = TOVA.hold, []

        def fails_later(self, *arguments):
            held.append(1)
            if len(held) > 5:
                raise RuntimeError("secret")
            return hold(self, *arguments)

        monkeypatch.setattr(TOVA, "hold", fails_later)
        got = asyncio.run(together(url, bodies))
        assert [response.status_code for response in got] == [200, 500, 200]
        assert "secret" not in got[1].text
        assert [got[i].json()["kv"]["token_ids"] for i in (0, 2)] == [alone[0], alone[2]]
        monkeypatch.undo()
        assert httpx.post(f"{url}/v1/completions", json=bodies[1]).json()["kv"]["token_ids"] == alone[1]


def test_an_answer_for_which_no_memory_is_left_is_told_to_come_again(monkeypatch):
    """Check that the server frees stored prompts, and that the other answers continue."""
    own = served()
    slowed(own, 0.02)
    bodies = [{"model": NAME, "prompt": tokens(20, seed=i), "temperature": 0, "max_tokens": 20} for i in range(3)]
    with listening(own) as url:
        alone = [httpx.post(f"{url}/v1/completions", json=body).json()["kv"]["token_ids"] for body in bodies]
        extend_each = own.engine.extend_each
        # the first prompt is longer, so that only it reaches the limit
        bodies[0] = bodies[0] | {"prompt": tokens(25)}

        def runs_out(states, *arguments):
            if any(state.length >= 42 for state in states):
                raise MemoryError
            return extend_each(states, *arguments)

        own.engine.extend_each = runs_out
        got = asyncio.run(together(url, bodies))
        assert [response.status_code for response in got] == [503, 200, 200]
        assert got[0].json()["error"]["code"] == "out_of_memory"
        assert [response.json()["kv"]["token_ids"] for response in got[1:]] == alone[1:]


# -- stopping the server


class Endless:
    """A reading that takes ten minutes in each layer unless it is cancelled."""

    def __init__(self, own):
        self.started = threading.Event()
        self.own, self.extend = own, own.engine.extend

    def __call__(self, state, ids, *arguments, **options):
        self.started.set()
        layers = self.own.engine.model.model.layers

        def slowly(*_):
            time.sleep(0.2)

        hooks = [layer.register_forward_pre_hook(slowly) for layer in layers]
        try:
            for _ in range(3000):
                self.extend(None, ids, *arguments, **options)
        finally:
            for hook in hooks:
                hook.remove()


def test_a_reading_that_nobody_waits_for_is_broken_off():
    own = served()
    endless = Endless(own)
    with listening(own) as url:
        own.engine.extend = endless
        with connect(url) as connection:
            send(connection, {"model": NAME, "prompt": tokens(30), "temperature": 0, "max_tokens": 3})
            assert endless.started.wait(60)
        own.engine.extend = endless.extend
        wait_until(lambda: httpx.get(f"{url}/health").json()["running"] == 0)
        body = {"model": NAME, "prompt": tokens(30), "temperature": 0, "max_tokens": 3}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200


def test_a_stop_is_told_to_all_that_wait_and_all_that_run():
    """Check one prompt that is being read, and one request that waits for it."""
    own = served()
    endless = Endless(own)
    own.engine.extend = endless
    app = create_app(own)
    with TestClient(app) as client, ThreadPoolExecutor(2) as pool:
        body = {"model": NAME, "prompt": tokens(30), "temperature": 0, "max_tokens": 3}
        both = [pool.submit(client.post, "/v1/completions", json=body) for _ in range(2)]
        assert endless.started.wait(60)
        wait_until(lambda: client.get("/health").json()["waiting"] == 1)
        app.state.worker.refuse()
        for each in both:
            got = each.result(60)
            assert (got.status_code, got.headers["retry-after"]) == (503, "5")
            assert got.json()["error"]["code"] == "stopping"
        assert ask(client, status=503, prompt="w5")["error"]["code"] == "stopping"
    assert app.state.worker.ended


def test_a_stop_ends_a_stream_with_the_reason():
    own = served(max_length=200_000)
    slowed(own, 0.02)
    app = create_app(own)
    with TestClient(app) as client, ThreadPoolExecutor(1) as pool:
        body = {"model": NAME, "prompt": tokens(9), "temperature": 0, "max_tokens": 100_000, "stream": True}
        answer = pool.submit(client.post, "/v1/completions", json=body)
        wait_until(lambda: client.get("/health").json()["running"] == 1)
        time.sleep(0.2)
        app.state.worker.refuse()
        last = answer.result(60).text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"


@pytest.mark.slow
def test_sigterm_ends_the_program_while_it_reads_a_long_prompt():
    """Check that the client gets an error, and that the process ends by the signal without finishing the prompt."""
    reader = Path(__file__).parents[1] / "resources" / "tiny-reader"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "kv_transition", "serve", "--model", reader, "--name", NAME, "--port", str(port)]
    process = subprocess.Popen([*command, "--device", "cpu", "--threads", "1"], stderr=subprocess.PIPE)
    url = f"http://127.0.0.1:{port}"
    try:
        assert b"stop with Ctrl+C" in process.stderr.readline()
        body = {"model": NAME, "prompt": [5 + i % 50 for i in range(4000)], "temperature": 0, "max_tokens": 5}
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=120)
            wait_until(lambda: httpx.get(f"{url}/health").json()["running"] == 1)
            process.send_signal(signal.SIGTERM)
            got = answer.result(120)
        assert (got.status_code, got.json()["error"]["code"]) == (503, "stopping")
        assert process.wait(60) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()
