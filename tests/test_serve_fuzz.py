"""Test that any HTTP request is answered or refused in the API's form, without a fault of the server.

The environment variable KVT_FUZZ is the number of mutated bodies, 300 if it is not set.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import socket

import httpx
import pytest
from fastapi.testclient import TestClient
from serving import NAME, listening, served

from kv_transition.serve.app import create_app

BODIES = int(os.environ.get("KVT_FUZZ", "300"))
BATCHES = 10

GREEDY = {"model": NAME, "temperature": 0, "max_tokens": 3}
GOOD = [
    ("completions", GREEDY | {"prompt": "w5 w6 w7 w8"}),
    ("completions", GREEDY | {"prompt": [5, 6, 7, 8], "kv_policy": "h2o", "kv_budget": 0.5, "kv_context": 2}),
    ("completions", GREEDY | {"prompt": "w5 w6 w7", "stream": True, "stream_options": {"include_usage": True}}),
    ("completions", GREEDY | {"prompt": "w5 w6", "kv_policy": {"kind": "snapkv", "window": 4, "pooling": "mean"},
                              "kv_budget": {"tokens": 4}, "kv_mode": "before_question", "kv_context": 2}),
    ("completions", GREEDY | {"prompt": ["w5 w6"], "stop": [" w1", "never"], "seed": 3, "kv_seed": 4,
                              "kv_first_token": "full", "temperature": 0.7, "n": 1, "logit_bias": {}}),
    ("completions", GREEDY | {"prompt": "w5 w6", "kv_policy": {"kind": "entropy_recall", "moments": "random"},
                              "kv_budget": 0.5, "kv_pace": [1, 3]}),
    ("chat/completions", GREEDY | {"messages": [{"role": "system", "content": "w5"}, {"role": "user", "content": "w6"}],
                                   "kv_context": 1, "kv_policy": "knorm", "kv_budget": 0.5}),
    ("chat/completions", GREEDY | {"messages": [{"role": "user", "content": [{"type": "text", "text": "w5 w6"}]}],
                                   "kv_context": {"message": 0, "characters": 2}, "max_completion_tokens": 2}),
]  # fmt: skip
HOSTILE = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**64), 10**300, 0.5, -0.0, 1e-300, 1e308, float("inf"), float("nan"),
    "", " ", "\x00", "w5", "\ud800", "\uffff", "\u202e", "{{ 7 * 7 }}", "{% raise %}", "../../etc/passwd", "w5 " * 200,
    "é" * 50, "[" * 50, [], {}, [[]], [None], [{}], {"": None}, {"kind": "full"}, {"tokens": 1}, [1] * 100, ["w5"] * 20,
    {"message": 10**9, "characters": -1}, [[[[[[]]]]]], "kvpress.KnormPress", "tests/models.py", "full", "quantized",
]  # fmt: skip


def places(node, path=()):
    """Yield the path of every value in a body."""
    yield path
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inside:
        yield from places(value, (*path, key))


def changed(draw, body):
    """Return a body with one to three of its values or keys replaced, dropped or copied elsewhere."""
    body = json.loads(json.dumps(body))
    for _ in range(draw.randint(1, 3)):
        path = draw.choice(list(places(body)))
        if not path:
            if draw.random() < 0.05:
                return draw.choice(HOSTILE)
            continue
        inside = body
        for key in path[:-1]:
            inside = inside[key]
        match draw.randrange(5):
            case 0:
                del inside[path[-1]]
            case 1 if isinstance(inside, dict):
                inside[draw.choice(["", "kv_policy", "prompt", "\ud800", "n", "top_p", "role"])] = inside.pop(path[-1])
            case 2:
                inside[path[-1]] = draw.choice([[inside[path[-1]]], {"text": inside[path[-1]]}])
            case _:
                inside[path[-1]] = copy.deepcopy(draw.choice(HOSTILE))
    return body


def damaged(draw, content):
    """Return bytes with one to four changes: bytes changed, dropped, doubled or cut off."""
    content = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(content) + 1)
        match draw.randrange(5):
            case 0:
                content[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                del content[at : at + draw.randint(1, 9)]
            case 2:
                content[at:at] = content[at : at + draw.randint(1, 30)] * draw.randint(1, 20)
            case 3:
                content[at:at] = draw.choice(
                    [b"\xff\xfe", b"\\ud800", b"1e999", b"[" * 2000, b"9" * 5000, b'"', b"NaN"]
                )
            case 4:
                del content[at:]
    return bytes(content)


@pytest.fixture(scope="module")
def model():
    return served(max_length=64)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_any_body_is_answered_or_refused(model, batch):
    draw = random.Random(f"bodies {batch}")
    seen = set()
    with TestClient(create_app(model, max_body=20_000), raise_server_exceptions=False) as client:
        for _ in range(BODIES // BATCHES):
            path, body = draw.choice(GOOD)
            content = json.dumps(changed(draw, body) if draw.random() < 0.7 else body).encode()
            if draw.random() < 0.4:
                content = damaged(draw, content)
            got = client.post(f"/v1/{path}", content=content, headers={"content-type": "application/json"})
            seen.add(got.status_code)
            assert got.status_code in (200, 400, 404, 413), (content, got.text)
            if got.status_code != 200:
                error = got.json()["error"]
                assert error["type"] == "invalid_request_error"
                assert error["message"]
                assert "Traceback" not in got.text
        assert client.get("/health").json()["running"] == 0
    assert {200, 400} <= seen


def test_any_request_line_and_header(model):
    """Check damaged HTTP: the connection may be closed, and the server keeps running."""
    draw = random.Random("requests")
    body = json.dumps(GOOD[0][1]).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        b"Authorization: Bearer key\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    statuses = set()
    with listening(model, api_key="key") as url:
        host, port = url.removeprefix("http://").split(":")
        for _ in range(max(60, BODIES // 20)):
            with socket.create_connection((host, int(port)), timeout=30) as connection:
                whole = draw.random() < 0.2
                connection.sendall((head if whole else damaged(draw, head)) + body)
                if not whole:  # the server would wait for a length that is too large
                    connection.shutdown(socket.SHUT_WR)
                got = b""
                with contextlib.suppress(ConnectionError):
                    while piece := connection.recv(65536):
                        got += piece
            if got:
                statuses.add(int(got.split(b" ", 2)[1]))
        assert httpx.get(f"{url}/health").json()["status"] == "ok"
    assert {200, 400, 401} <= statuses
    assert all(status < 500 for status in statuses), statuses
