"""Test that clients cannot stop the server: wrong requests, too many requests, and disconnects."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import json
import socket
import time
import tracemalloc

import httpx
import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from models import VOCABULARY, tokens
from serving import NAME, ask, chat_body, listening, served
from typer.testing import CliRunner

from kv_transition import cli
from kv_transition.cache.state import CacheState
from kv_transition.serve.app import create_app
from kv_transition.serve.prompts import prompt_of
from kv_transition.serve.refusals import RefusalError
from kv_transition.serve.schema import CompletionRequest


@pytest.fixture(scope="module")
def model():
    return served()


@pytest.fixture(scope="module")
def client(model):
    with TestClient(create_app(model)) as client:
        yield client


@pytest.fixture(scope="module")
def url(model):
    with listening(model) as url:
        yield url


HALF = {"prompt": "w5", "kv_budget": 0.5}
WRONG = [
    ({"prompt": "w5", "kv_policy": "best"}, "kv_policy", "choose one of"),
    ({"prompt": "w5", "kv_policy": {"window": 3}}, "kv_policy", "there is no policy None"),
    ({"prompt": "w5", "kv_policy": {"kind": "snapkv", "window": "x"}, "kv_budget": 0.5}, "kv_policy", "wrong type"),
    ({"prompt": "w5", "kv_policy": {"kind": "snapkv", "windows": 3}, "kv_budget": 0.5}, "kv_policy", "it has: window"),
    ({"prompt": "w5", "kv_policy": "tests/models.py"}, "kv_policy", "there is no policy 'tests/models.py'"),
    ({"prompt": "w5", "kv_policy": "h2o"}, "kv_budget", "h2o needs a budget"),
    ({"prompt": "w5", "kv_policy": "full", "kv_budget": 0.5}, "kv_budget", "leave it out"),
    ({"prompt": "w5", "kv_policy": "quantized", "kv_budget": 0.5}, "kv_budget", "leave it out"),
    ({"prompt": "w5", "kv_policy": "h2o", "kv_budget": 1.5}, "kv_budget", "less than or equal to 1"),
    ({"prompt": "w5", "kv_policy": "h2o", "kv_budget": 0.123456789012}, "kv_budget", "decimals"),
    ({"prompt": "w5", "kv_policy": "h2o", "kv_budget": {"tokens": 0}}, "kv_budget.tokens", "greater than"),
    ({"prompt": "w5", "kv_mode": "later"}, "kv_mode", "before_question"),
    (HALF | {"prompt": "w5 w6", "kv_policy": "h2o", "kv_mode": "before_question"}, "kv_context", "give the end"),
    ({"prompt": "w5 w6", "kv_context": 5}, "kv_context", "inside"),
    ({"prompt": "w5 w6 ", "kv_context": 5}, "kv_context", "at least one token"),
    (HALF | {"kv_policy": {"kind": "entropy_recall", "tau_quantile": 0.5}}, "kv_policy", "no tau"),
    (HALF | {"kv_policy": {"kind": "entropy_recall", "moments": "random"}}, "kv_policy", "another cell"),
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": ["w5", "w6"]}, "prompt", "2 prompts"),
    ({"prompt": [[1, 2], [3]]}, "prompt", "2 prompts"),
    ({"prompt": [1, VOCABULARY]}, "prompt", f"{VOCABULARY} is not a token"),
    ({"prompt": [1, -1]}, "prompt", "-1 is not a token"),
    ({"prompt": [1] * 1025}, "prompt", "longer than 1024"),
    ({"prompt": [1] * 1000, "max_tokens": 25}, "max_tokens", "longer than 1024"),
    ({"prompt": "w5", "max_tokens": 0}, "max_tokens", "greater than"),
    ({"prompt": "w5", "max_tokens": "6"}, "max_tokens", "integer"),
    ({"prompt": "w5", "temperature": -1}, "temperature", "greater than"),
    ({"prompt": "w5", "seed": 2**70}, "seed", "less than"),
    ({"prompt": "w5", "stop": ""}, "stop", "at least 1"),
    ({"prompt": "w5", "n": 2}, "n", "leave it out"),
    ({"prompt": "w5", "logprobs": 3}, "logprobs", "leave it out"),
    ({"prompt": "w5", "logprobs": 0}, "logprobs", "leave it out"),
    ({"prompt": "w5", "top_p": 0.9}, "top_p", "leave it out"),
    ({"prompt": "w5", "echo": True}, "echo", "leave it out"),
    ({}, "prompt", "required"),
    ({"prompt": "w5", "kv_policy": 5}, "kv_policy", "kv_policy: give a name or an object"),
    ({"prompt": "w5", "kv_policy": True}, "kv_policy", "a name or an object"),
    ({"prompt": "w5", "kv_policy": ["h2o"]}, "kv_policy", "a name or an object"),
    ({"prompt": "w5", "kv_policy": None}, "kv_policy", "a name or an object"),
    ({"prompt": "w5", "kv_policy": "h2o", "kv_budget": "half"}, "kv_budget", 'a fraction, or an object {"tokens": n}'),
    ({"prompt": "w5", "kv_policy": "h2o", "kv_budget": {"str": 1}}, "kv_budget.tokens", "required"),
    ({"prompt": "w5", "stop": 5}, "stop", "a text or a list of texts"),
    ({"prompt": "w5", "stop": ["a", 5]}, "stop.1", "string"),
    ({"prompt": 5}, "prompt", "a text or a list of token ids"),
    ({"prompt": {"text": "w5"}}, "prompt", "a text or a list of token ids"),
    ({"prompt": [1, True]}, "prompt.1", "integer"),
    ({"prompt": "w5", "kv_pace": [2, 1]}, "kv_pace", "1 steps has no 2 moments"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param", "said"), WRONG, ids=lambda value: str(value)[:60])
def test_a_wrong_request_is_told_what_is_wrong(client, body, param, said):
    error = ask(client, status=400, **body)["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert said in error["message"]


def test_fields_that_change_nothing_are_ignored(client):
    """Check that request fields that do not change the answer are ignored."""
    harmless = {
        "user": "me",
        "n": 1,
        "top_p": 1,
        "logprobs": None,
        "presence_penalty": 0,
        "metadata": {},
        "echo": False,
    }
    assert ask(client, prompt="w5", **harmless)["kv"]["token_ids"] == ask(client, prompt="w5")["kv"]["token_ids"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not JSON"),
        (b"", "body"),
        (b"[]", "body"),
        (b'"text"', "body"),
        (b"null", "body"),
        (b"\xff\xfe", "body"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', "half of a character"),
        (b'{"model": "tiny\\ud800", "prompt": "w5"}', "half of a character"),
        (b'{"model": "tiny", "prompt": "w5", "temperature": NaN}', "temperature"),
        (b"[" * 100_000, "body"),
        (b'{"model": "tiny", "prompt": [1' + b"0" * 5000 + b"]}", "body"),
    ],
    ids=range(11),
)
def test_what_is_no_request_is_refused(client, content, said):
    got = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert got.status_code == 400
    assert said in got.json()["error"]["message"]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize(
    "given", [None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
              "application/octet-stream", "text/json", "json", "application/jsonp", "*/*", "application/json2; a=json"],
)  # fmt: skip
def test_a_body_that_is_not_declared_as_json_is_refused(client, path, given):
    """Check that the content is not parsed: the body of a form or a text is never read as a request."""
    content = json.dumps({"model": NAME, "prompt": "w5", "messages": []}).encode()
    headers = {} if given is None else {"content-type": given}
    got = client.post(f"/v1/{path}", content=content, headers=headers)
    assert got.status_code == 415
    assert "application/json" in got.json()["error"]["message"]


@pytest.mark.parametrize("given", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"])
def test_json_may_be_declared_in_every_way_that_means_it(client, given):
    content = json.dumps({"model": NAME, "prompt": "w5", "max_tokens": 2})
    assert client.post("/v1/completions", content=content, headers={"content-type": given}).status_code == 200


def test_forms_are_refused(client):
    assert client.post("/v1/completions", data={"model": NAME, "prompt": "w5"}).status_code == 415
    assert client.post("/v1/completions", files={"prompt": b"w5"}).status_code == 415
    # an unknown path gives 404, whatever is sent
    assert client.post("/v1/nothing", data={"model": NAME}).status_code == 404


def test_a_million_wrong_items_are_one_mistake(client):
    """Check that one error is reported instead of one per item, in each of the forms that a prompt may have."""
    tracemalloc.start()
    try:
        for prompt in (["w5", 5] * 200_000, [[1, "x"]] * 100_000, [1] * 300_000 + ["w5"]):
            assert ask(client, status=400, prompt=prompt)["error"]["param"].startswith("prompt")
        messages = [{"role": "king"}] * 100_000
        assert ask(client, "chat/completions", 400, messages=messages)["error"]["param"] == "messages.0.role"
        assert tracemalloc.get_traced_memory()[1] < 150e6
    finally:
        tracemalloc.stop()


def test_messages_are_checked(client):
    def refused(*messages, **more):
        return ask(client, "chat/completions", 400, messages=list(messages), **more)["error"]["message"]

    assert "messages" in refused()
    assert "role" in refused({"role": "king", "content": "w5"})
    picture = {"type": "image_url", "image_url": {"url": "x"}}
    assert "messages.0.content" in refused({"role": "user", "content": [picture]})
    assert "2 messages" not in refused({"role": "user", "content": "w5"}, kv_context=2)
    assert "there are 1 messages" in refused({"role": "user", "content": "w5"}, kv_context=2)
    parts = [{"type": "text", "text": "w5 "}, {"type": "text", "text": "w6"}]
    both = [{"role": "user", "content": content} for content in (parts, "w5 w6")]
    said = [ask(client, "chat/completions", messages=[message])["kv"]["token_ids"] for message in both]
    assert said[0] == said[1]


def test_a_tokenizer_without_a_template_has_no_chat():
    own = served()
    own.engine.tokenizer.chat_template = None
    with TestClient(create_app(own)) as client:
        assert "use /v1/completions" in ask(client, status=400, **chat_body("w5", "w6"))["error"]["message"]


def test_a_policy_of_a_file_is_run_only_if_the_server_was_started_with_it(model, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom kv_transition.policies.knorm import KNorm\n\n\n"
        "@dataclass(frozen=True)\nclass Mine(KNorm):\n    '''Mine.'''\n"
    )
    body = {"prompt": "w5 w6 w7 w8 w9", "kv_policy": str(file), "kv_budget": 0.5}
    with TestClient(create_app(model)) as client:
        ask(client, status=400, **body)
    with TestClient(create_app(model, files=[str(file)])) as client:
        got = ask(client, **body)
        assert got["kv"]["token_ids"] == ask(client, **body | {"kv_policy": "knorm"})["kv"]["token_ids"]


def test_a_press_needs_kvpress(client):
    """Check the error if kvpress is not installed; if it is, a request names a press as a configuration does."""
    body = {"prompt": tokens(60), "kv_policy": "kvpress.KnormPress", "kv_budget": 0.5}
    if importlib.util.find_spec("kvpress"):
        assert ask(client, **body)["kv"]["budget_entries"] == 30
    else:
        assert "kvpress cannot be imported" in ask(client, status=400, **body)["error"]["message"]


def test_paths_and_methods_that_are_not_there(client):
    for method, path, status in [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("GET", "/docs", 404)]:
        got = client.request(method, path)
        assert (got.status_code, "message" in got.json()["error"]) == (status, True)
    assert client.get("/v1/models/other").json()["error"]["code"] == "model_not_found"


def test_a_text_that_is_too_long_is_tokenized_no_further_than_needed():
    """Check that a text is tokenized only up to the limit; all tokens of 7 MB at once would take a gigabyte."""
    own, tokenized = served(max_length=64), []
    tokenizer = own.engine.tokenizer

    def counting(text, **options):
        tokenized.append(len(text))
        return tokenizer(text, **options)

    own.engine.tokenizer = counting
    with pytest.raises(RefusalError, match="is longer than 64") as error:
        prompt_of(own.engine, CompletionRequest(model=NAME, prompt="w5 " * 2_300_000), 64)
    assert (error.value.status, error.value.code) == (400, "context_length_exceeded")
    assert sum(tokenized) <= 10_000


def test_a_large_body_is_not_read(model):
    with listening(model, max_body=2000) as url:
        large = json.dumps({"model": NAME, "prompt": "w5 " * 1000}).encode()
        headers = {"content-type": "application/json"}

        def in_pieces():
            yield from (large[i : i + 500] for i in range(0, len(large), 500))

        for content in (large, in_pieces()):
            got = httpx.post(f"{url}/v1/completions", content=content, headers=headers)
            assert got.status_code == 413
            assert got.json()["error"]["message"] == "the body has more than 2000 bytes"
        assert httpx.post(f"{url}/v1/completions", json={"model": NAME, "prompt": "w5"}).status_code == 200


def receive_all(connection):
    """Return all bytes until the server closes the connection."""
    got = b""
    while piece := connection.recv(65536):
        got += piece
    return got


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize("end", [b"Connection: close\r\n", b""], ids=["close", "keep-alive"])
@pytest.mark.parametrize("declared", [False, True], ids=["chunked", "length"])
def test_a_client_that_sends_on_reads_why_its_body_is_too_large(model, end, declared):
    """Check a client that sends the whole body before it reads the response; a reset would lose the response."""
    size = 6_000_000
    with listening(model, max_body=1_000_000) as url:
        host, port = url.removeprefix("http://").split(":")
        for _ in range(3):
            with socket.create_connection((host, int(port)), timeout=60) as connection:
                length = f"Content-Length: {size}\r\n" if declared else "Transfer-Encoding: chunked\r\n"
                connection.sendall(HEAD + end + length.encode() + b"\r\n")
                for _ in range(size // 50_000):
                    piece = b"x" * 50_000
                    connection.sendall(piece if declared else b"%x\r\n%s\r\n" % (len(piece), piece))
                if not declared:
                    connection.sendall(b"0\r\n\r\n")
                got = receive_all(connection) if end else connection.recv(65536)
            assert got.startswith(b"HTTP/1.1 413 ")
            if end:
                assert got.endswith(b"}}")
        # a client that waits for "100 Continue" gets the response without it
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: 6000000\r\nConnection: close\r\n\r\n")
            assert receive_all(connection).startswith(b"HTTP/1.1 413 ")


def test_requests_beyond_what_may_be_under_way_are_told_to_come_again(model):
    """Check that slow bodies occupy one place each, and that further requests get status 429."""
    with listening(model, queue=1) as url, contextlib.ExitStack() as open_ones:
        host, port = url.removeprefix("http://").split(":")
        for _ in range(4 * 1 + 64):
            connection = open_ones.enter_context(socket.create_connection((host, int(port))))
            connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        deadline = time.monotonic() + 30
        while (got := httpx.get(f"{url}/v1/models")).status_code != 429:
            assert time.monotonic() < deadline
        assert got.headers["retry-after"] == "1"
        assert got.json()["error"]["code"] == "overloaded"
        assert httpx.get(f"{url}/health").status_code == 200


def test_a_key_is_needed_where_one_is_set(model):
    with TestClient(create_app(model, api_key="geheim-ü")) as client:
        assert client.get("/health").status_code == 200
        for given in (None, "Bearer", "Bearer wrong", "Basic geheim-ü", "Bearer geheim-ü2", "geheim-ü"):
            headers = {} if given is None else {"authorization": given.encode()}
            got = client.get("/v1/models", headers=headers)
            assert got.status_code == 401
            assert got.headers["www-authenticate"] == "Bearer"
            assert got.json()["error"]["code"] == "invalid_api_key"
            assert "geheim" not in got.text
            assert client.post("/v1/completions", content=b"x", headers=headers).status_code == 401
        assert client.get("/v1/models", headers={"authorization": "bearer geheim-ü".encode()}).status_code == 200


def test_a_bug_is_not_told_to_the_client(model, monkeypatch):
    def broken(*_):
        raise KeyError("secret")

    monkeypatch.setattr("kv_transition.serve.model.begin", broken)
    with TestClient(create_app(model), raise_server_exceptions=False) as client:
        error = ask(client, status=500, prompt="w5 w6")["error"]
        assert error["type"] == "server_error"
        assert "secret" not in error["message"]
        assert client.get("/health").status_code == 200


def test_a_prompt_that_does_not_fit_gives_back_what_is_held(model, monkeypatch):
    """Check that the memory of stored prompts is freed first, with status 503; after that the prompt is too large."""
    own = served()
    with TestClient(create_app(own)) as client:
        ask(client, prompt="w5 w6 w7")

        def full(*_):
            raise MemoryError

        monkeypatch.setattr("kv_transition.serve.model.begin", full)
        got = client.post("/v1/completions", json={"model": NAME, "prompt": "w5 w6"})
        assert (got.status_code, got.headers["retry-after"]) == (503, "1")
        assert (len(own.prefills), own.prefills.nbytes) == (0, 0)
        monkeypatch.setattr(own.prefills, "after_prompt", full)
        assert ask(client, status=413, prompt="w5 w6")["error"]["code"] == "out_of_memory"
        monkeypatch.undo()
        ask(client, prompt="w5 w6")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--api-key-env", "NO_SUCH_KEY"], "the environment variable NO_SUCH_KEY is not set"),
        (["--statistics", "attn_sum,sum"], "there is no 'sum'"),
        (["--dtype", "int8"], "choose one of float32"),
        (["--host", "no.such.host.invalid"], "the server cannot listen at"),
        (["--policy-file", "nowhere.py"], "there is no file nowhere.py"),
        ([], "give a model folder or a hub id"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_keeps_a_server_from_starting_is_said_in_one_sentence(options, said, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    done = CliRunner().invoke(cli.app, ["serve", "--model", "./nowhere", "--port", "0", "--device", "cpu", *options])
    assert done.exit_code == 2
    (line,) = [line for line in done.output.splitlines() if "listens" not in line]
    assert said in line


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = CliRunner().invoke(cli.app, ["serve", "--model", "./nowhere", "--port", port])
    assert done.exit_code == 2
    assert f"cannot listen at 127.0.0.1:{port}" in done.output


# -- many clients, and disconnects


async def together(url, bodies):
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        return await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))


def mixed(i):
    policy = ({"kv_policy": "full"}, {"kv_policy": "h2o", "kv_budget": 0.3}, {"kv_policy": "snapkv", "kv_budget": 0.5})
    return {"model": NAME, "prompt": tokens(40, seed=i % 5), "max_tokens": 4, "temperature": 0} | policy[i % 3]


def test_two_hundred_clients_at_once_get_what_each_would_get_alone(url):
    alone = [httpx.post(f"{url}/v1/completions", json=mixed(i)).json()["kv"]["token_ids"] for i in range(15)]
    got = asyncio.run(together(url, [mixed(i) for i in range(200)]))
    assert {response.status_code for response in got} == {200}
    assert [response.json()["kv"]["token_ids"] for response in got] == [alone[i % 15] for i in range(200)]
    assert httpx.get(f"{url}/health").json()["waiting"] == 0


def test_a_full_line_asks_to_come_again(model):
    with listening(model, queue=5) as url:
        got = asyncio.run(together(url, [mixed(i) | {"max_tokens": 50} for i in range(40)]))
        statuses = [response.status_code for response in got]
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 5  # the queue's length; more if a request leaves the queue meanwhile
        refused = next(response for response in got if response.status_code == 429)
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["code"] == "overloaded"
        assert httpx.post(f"{url}/v1/completions", json=mixed(0)).status_code == 200


def states_alive():
    gc.collect()
    return sum(type(thing) is CacheState for thing in gc.get_objects())


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_vanish_leave_nothing_behind(stream):
    """Check that the server notices the disconnects; the answers would take far longer than that."""
    own = served(max_bytes=200_000)
    slow = own.engine.next_tokens

    def slowly(*arguments):
        time.sleep(0.05)
        return slow(*arguments)

    own.engine.next_tokens = slowly
    with listening(own) as url:
        host, port = url.removeprefix("http://").split(":")
        before = states_alive()
        for i in range(30):
            body = json.dumps({"model": NAME, "prompt": tokens(40, seed=i), "max_tokens": 900, "stream": stream})
            with socket.create_connection((host, int(port))) as connection:
                head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
                connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n{body}".encode())
                if i % 3 == 0:  # some clients stay for a while, and may receive some text
                    connection.settimeout(0.3)
                    with contextlib.suppress(TimeoutError):
                        connection.recv(100)
        deadline = time.monotonic() + 120
        while (health := httpx.get(f"{url}/health").json())["running"] or health["waiting"]:
            assert time.monotonic() < deadline, health
            time.sleep(0.05)
        assert health["prefill_bytes"] <= 200_000
        # a context and a prompt for each stored prefill, and the states of the last job
        assert states_alive() - before <= 2 * health["prefills"] + 4
        own.engine.next_tokens = slow
        assert httpx.post(f"{url}/v1/completions", json=mixed(0)).status_code == 200


@pytest.mark.slow
def test_what_the_schema_allows_and_what_it_forbids(model):
    """Check requests generated from the server's own schema: no server error, and each response conforms to the
    schema."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    with TestClient(create_app(model)):
        schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(model))
        seen = set()
        for operation in schema.get_all_operations():
            operation = operation.ok()

            @settings(
                max_examples=40, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(
                case=operation.as_strategy()
                | operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
            )
            def obeys(case):
                response = case.call()
                seen.add(response.status_code)
                case.validate_response(response, checks=checks)

            obeys()
    assert {200, 400} <= seen
