"""Test that every fault of an endpoint ends as a failure with its reason or a successful retry, never as a wrong
answer."""

from __future__ import annotations

import contextlib
import email.utils
import socket
import threading
import time

import pytest
import tenacity
from hypothesis import given, settings
from hypothesis import strategies as st
from misbehaving import MODEL, Server, answer_to, serving

from kv_transition.engines import openai_compat
from kv_transition.engines.openai_compat import Client, Reply, Request
from kv_transition.errors import UserError

KEY = "sk-planted-8e1b5c0f2a"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(openai_compat, "BACKOFF", tenacity.wait_none())
    monkeypatch.setenv("PLANTED_KEY", KEY)


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


def client_of(server: Server, **changes) -> Client:
    return Client(server.url, **{"timeout_s": 20.0, "retries": 2} | changes)


def ask(server: Server, prompt: str, **changes) -> Reply:
    return client_of(server, **changes).complete(MODEL, 12, prompt=prompt)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("chat", [True, False])
def test_an_answer_comes_whole_with_its_usage(server, stream, chat):
    client = client_of(server, stream=stream)
    prompt = f"no 7, {stream} {chat}"
    said = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    reply = client.complete(MODEL, 12, **said, temperature=0.5, seed=3, extra_body={"kv_budget": 0.5})
    assert reply.text == answer_to(prompt)
    assert (reply.finish_reason, reply.error, reply.attempts, reply.model) == ("stop", None, 1, MODEL)
    assert reply.usage["prompt_tokens"] == 10
    body = server.bodies[-1]
    assert body["model"] == MODEL
    assert (body["max_tokens"], body["temperature"], body["seed"], body["kv_budget"]) == (12, 0.5, 3, 0.5)
    assert body.get("stream_options") == ({"include_usage": True} if stream else None)
    assert 0 < (reply.ttft_s or reply.latency_s) <= reply.latency_s
    assert (reply.ttft_s is None) == (reply.decode_s is None) == (not stream)
    assert server.asked[prompt] == 1


def test_token_ids_are_sent_as_they_are(server):
    assert client_of(server).complete(MODEL, 5, prompt=[4, 2, 31]).text == answer_to("no 31")
    assert server.bodies[-1]["prompt"] == [4, 2, 31]


# Faults after which a retry succeeds.
TRANSIENT = [
    *("reset", "timeout408", "conflict409", "error500", "error503", "not_json", "html", "shape"),
    *("error200", "error_in_stream", "no_choices", "unfinished"),
]


@pytest.mark.parametrize("fault", TRANSIENT)
def test_what_fails_twice_is_tried_a_third_time(server, fault):
    """Check that a request that fails twice succeeds at the third attempt."""
    prompt = f"no 5 [[{fault}*2]]"
    reply = ask(server, prompt)
    assert (reply.text, reply.error, reply.attempts) == (answer_to(prompt), None, 3)
    assert server.asked[prompt] == 3


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("error500", "status 500: something broke"),
        ("error503", "overloaded"),
        ("conflict409", "locked"),
        ("not_json", "does not match the protocol"),
        ("html", None),
        ("shape", "does not match the protocol"),
        ("error200", "out of cheese"),
        ("no_choices", "contains no choice"),
    ],
)
def test_what_fails_each_time_is_a_failure_with_its_reason(server, fault, reason, stream):
    """Check that a request that fails at every attempt is a failure with its reason after three attempts."""
    prompt = f"no 5 {stream} [[{fault}]]"
    reply = ask(server, prompt, stream=stream)
    assert reply.text is None
    assert reply.error.startswith("ENGINE_ERROR: ")
    assert reply.error.endswith(" (3 attempts)")
    assert (reason or "") in reply.error
    assert "\n" not in reply.error
    assert server.asked[prompt] == 3


@pytest.mark.parametrize(
    ("fault", "reason"), [("reset", "broke"), ("unfinished", "before"), ("error_in_stream", "died")]
)
def test_half_a_stream_is_no_answer(server, fault, reason):
    """Check that an incomplete stream is a failure."""
    reply = ask(server, f"no 6 [[{fault}]]")
    assert reply.text is None
    assert reply.error.startswith("ENGINE_ERROR: ")
    assert reason in reply.error


@pytest.mark.parametrize("fault", ["too_long", "refused_in_stream"])
def test_a_refusal_is_not_asked_for_again(server, fault):
    prompt = f"no 5 [[{fault}]]"
    reply = ask(server, prompt)
    assert "the context length is exceeded" in reply.error
    assert server.asked[prompt] == 1


@pytest.mark.parametrize("fault", ["hang", "trickle", "endless"])
def test_one_limit_covers_all_of_an_answer(server, fault):
    prompt = f"no 5 [[{fault}]]"
    started = time.monotonic()
    reply = ask(server, prompt, timeout_s=0.4)
    assert time.monotonic() - started < 5
    assert reply.error == "TIMEOUT: no complete answer within 0.4 s"
    assert server.asked[prompt] == 1


def test_a_pause_that_is_asked_for_is_kept(server):
    prompt = "no 5 [[rate*1]]"
    assert ask(server, prompt).text == answer_to(prompt)
    first, second = (at for asked, at in server.times if asked == prompt)
    assert second - first >= 1


def test_no_more_requests_allowed_is_the_endpoints_failure_and_no_rows(server):
    with pytest.raises(UserError, match="allows no more requests for now: status 429: come back tomorrow"):
        ask(server, "no 5 [[rate_long]]")
    assert server.asked["no 5 [[rate_long]]"] == 1  # the client does not wait for a day


@pytest.mark.parametrize(("value", "wait"), [("3", 3), ("0.5", 0.5), ("-1", 0), ("soon", None), ("", None)])
def test_retry_after_is_a_number_of_seconds(value, wait):
    assert openai_compat._retry_after({"retry-after": value}) == wait


@pytest.mark.parametrize(("ahead", "low", "high"), [(50, 40, 50), (-50, 0, 0)])
def test_retry_after_is_a_date(ahead, low, high):
    date = email.utils.formatdate(time.time() + ahead, usegmt=True)
    assert low <= openai_compat._retry_after({"retry-after": date}) <= high


@given(share=st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_a_connection_closed_anywhere_loses_and_changes_nothing(server, share):
    """Check that before the finish reason the request is repeated; after it, only the usage is lost."""
    prompt = f"no 5 {share} [[cut*1]]"
    server.cut_at = int(share * 1400)
    reply = ask(server, prompt)
    assert (reply.text, reply.finish_reason, reply.error) == (answer_to(prompt), "stop", None)
    assert server.asked[prompt] == reply.attempts <= 2


def test_characters_cut_by_packets_are_put_together(server):
    prompt = "no 5 [[bytewise]]"
    assert ask(server, prompt).text == answer_to(prompt)


def test_a_server_that_does_not_stream_has_no_time_to_the_first_token(server):
    reply = ask(server, "no 5 [[whole_instead]]")
    assert reply.text == answer_to("no 5 [[whole_instead]]")
    assert reply.decode_s is None


@pytest.mark.parametrize(("fault", "usage"), [("usage_none", None), ("usage_wrong", {"prompt_tokens": 0})])
def test_usage_is_repeated_and_not_believed(server, fault, usage):
    reply = ask(server, f"no 5 [[{fault}]]")
    assert reply.error is None
    assert reply.usage is None if usage is None else usage.items() <= reply.usage.items()


# ----------------------------------------------------------------------------------------------------
# The endpoint


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_an_endpoint_that_is_not_there_is_one_sentence():
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(UserError, match=rf"^{url} cannot be reached: .*is the server running there\?$") as error:
        Client(url, retries=1).complete(MODEL, 5, prompt="x")
    assert "\n" not in str(error.value)


def test_a_server_that_is_back_after_the_last_attempt_is_asked_once_more(monkeypatch):
    """Check one more request after the last attempt; otherwise a failure would be recorded that a rerun keeps."""
    port = free_port()
    with contextlib.ExitStack() as stack:

        async def comes_back(*_):
            stack.enter_context(serving(port=port))

        monkeypatch.setattr(Client, "_demand_reachable", comes_back)
        reply = Client(f"http://127.0.0.1:{port}/v1", retries=0).complete(MODEL, 5, prompt="no 5")
    assert (reply.text, reply.error, reply.attempts) == (answer_to("no 5"), None, 2)


def test_an_endpoint_that_comes_up_late_is_waited_for(monkeypatch):
    monkeypatch.setattr(openai_compat, "BACKOFF", tenacity.wait_fixed(0.2))
    port = free_port()
    started = threading.Event()

    def later() -> None:
        time.sleep(0.5)
        with serving(port=port):
            started.wait(20)

    thread = threading.Thread(target=later)
    thread.start()
    try:
        assert Client(f"http://127.0.0.1:{port}/v1", retries=50).complete(MODEL, 5, prompt="no 1").error is None
    finally:
        started.set()
        thread.join()


def test_a_wrong_model_is_one_sentence(server):
    with pytest.raises(UserError, match=r"has no model .other.*does not exist"):
        client_of(server).complete("other", 5, prompt="x")


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("PLANTED_KEY", "sk-another-key", "does not accept the one in the environment variable PLANTED_KEY"),
        ("NOT_THERE", None, "the environment variable NOT_THERE is not set"),
        (None, None, "but api_key_env names none"),
    ],
)
def test_a_wrong_key_is_one_sentence_without_the_key(monkeypatch, variable, value, sentence):
    if value:
        monkeypatch.setenv(variable, value)
    with serving(key=KEY) as server:
        with pytest.raises(UserError, match=sentence) as error:
            Client(server.url, api_key_env=variable).complete(MODEL, 5, prompt="x")
        assert "Incorrect API key provided" in str(error.value)
        assert not value or value not in str(error.value)
        assert len(server.bodies) == 1


def test_the_key_is_sent_and_repeated_nowhere(monkeypatch):
    with serving(key=KEY) as server:
        client = Client(server.url, api_key_env="PLANTED_KEY", retries=1)
        assert client.complete(MODEL, 5, prompt="x").error is None
        told = client.complete(MODEL, 5, prompt="[[echo500]]").error
        assert "failed with Bearer ***" in told
        assert client.complete(MODEL, 50, prompt="[[parrot]]").text is None
        assert KEY not in repr(client)


def test_a_key_that_no_header_can_hold_is_refused_without_being_repeated(server, monkeypatch):
    monkeypatch.setenv("PLANTED_KEY", "sk-\u2026 pasted")
    with pytest.raises(UserError, match="PLANTED_KEY contains characters") as error:
        client_of(server, api_key_env="PLANTED_KEY").complete(MODEL, 5, prompt="x")
    assert "pasted" not in str(error.value)


# ----------------------------------------------------------------------------------------------------
# Concurrent requests


@pytest.mark.parametrize("concurrency", [1, 3])
def test_at_most_so_many_are_under_way_and_the_answers_stay_in_order(concurrency):
    prompts = [f"no {i}" + (" [[error500*1]]" if i % 4 == 1 else "") for i in range(12)]
    seen = []
    with serving() as server:
        server.slow_s = 0.05
        requests = [Request(MODEL, 12, prompt=prompt) for prompt in prompts]
        replies = client_of(server).complete_all(requests, concurrency, lambda number, reply: seen.append(number))
        assert server.most_under_way == concurrency
        assert [server.asked[p] for p in prompts] == [2 if "[[" in p else 1 for p in prompts]
    assert [reply.text for reply in replies] == [answer_to(prompt) for prompt in prompts]
    assert sorted(seen) == list(range(12))
    assert {reply.co_running for reply in replies} == {concurrency > 1}


def test_what_was_answered_before_a_refusal_was_handed_over(server):
    """Check that answers before a refused request were passed to the caller."""
    seen = {}
    requests = [Request(MODEL, 12, prompt="no 1"), Request(MODEL, 12, prompt="no 2"), Request("other", 12, prompt="x")]
    with pytest.raises(UserError, match="has no model 'other'"):
        client_of(server).complete_all(requests, 1, lambda number, reply: seen.update({number: reply.text}))
    assert seen == {0: answer_to("no 1"), 1: answer_to("no 2")}


def test_a_bug_of_the_caller_is_not_a_failure(server):
    with pytest.raises(ZeroDivisionError):
        client_of(server).complete_all([Request(MODEL, 12, prompt="no 1")], 2, lambda number, reply: 1 / 0)


def test_what_is_on_this_machine():
    assert all(map(openai_compat.is_loopback, ["http://127.0.0.1:1/v1", "http://localhost/v1", "http://[::1]:3/v1"]))
    assert not any(
        map(openai_compat.is_loopback, ["https://api.openai.com/v1", "http://10.0.0.1/v1", "http://128.0.0.1"])
    )
