"""Test the judge with endpoints that answer correctly, incorrectly, late or not at all."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from kv_transition import settings
from kv_transition.engines import openai_compat
from kv_transition.errors import UserError
from kv_transition.provenance import rows_to_table, text_sha256, write_table
from kv_transition.studies.chat import judge as judge_module
from kv_transition.studies.chat import specs as chat_specs
from kv_transition.studies.chat.checks import Check
from kv_transition.studies.chat.judge import main, write_judge
from kv_transition.studies.chat.settings import Judge
from kv_transition.studies.chat.tables import CHAT, CHAT_VERDICTS
from kv_transition.studies.chat.verdicts import write_verdicts

KEY = "sk-planted-0123456789"
GOOD = {"follows": True, "reason": "it does"}


@pytest.fixture(autouse=True)
def _key_and_no_pauses(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setattr(openai_compat, "BACKOFF", lambda state: 0.0)


class Endpoint:
    """An OpenAI-compatible endpoint that handles each question as ``act`` says, and records the requests."""

    def __init__(self, act: Callable[[dict], object]) -> None:
        self.asked: list[dict] = []
        self.headers: list[dict] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                self._send(200, {"object": "list", "data": []})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                endpoint.asked.append(body)
                endpoint.headers.append(dict(self.headers))
                said = act(json.loads(body["messages"][1]["content"]))
                if callable(said):
                    said(self)
                elif isinstance(said, int):
                    self._send(said, {"error": {"message": f"no, {self.headers['authorization']}"}})
                elif isinstance(said, bytes):
                    self._raw(said)
                else:
                    self._raw(events(said if isinstance(said, str) else json.dumps(said)))

            def _send(self, status, value):
                text = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def _raw(self, text):
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.end_headers()
                self.wfile.write(text)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True

    @property
    def settings(self) -> dict:
        url = f"http://127.0.0.1:{self.server.server_port}/v1"
        own = {"model": "fair", "timeout_s": 5.0, "retries": 1, "concurrency": 3, "api_key_env": "JUDGE_KEY"}
        return Judge(base_url=url, **own).model_dump()


def events(text: str, finish: str | None = "stop", done: bool = True) -> bytes:
    """Return a streamed answer in pieces of five characters."""
    pieces = [{"delta": {"content": text[i : i + 5]}} for i in range(0, len(text), 5)]
    pieces += [{"delta": {}, "finish_reason": finish}] if finish else []
    lines = [f"data: {json.dumps({'model': 'fair', 'choices': [{'index': 0} | piece]})}\n\n" for piece in pieces]
    return "".join([*lines, "data: [DONE]\n\n" if done else ""]).encode()


@contextmanager
def endpoint(act: Callable[[dict], object]) -> Iterator[Endpoint]:
    there = Endpoint(act)
    thread = threading.Thread(target=there.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield there
    finally:
        there.server.shutdown()
        thread.join()
        there.server.server_close()


def chat_file(folder: Path, answers: list[list[str | None]]) -> str:
    """Write conversations with these answers; each must say "yes" and, from turn 2 on, be short."""
    said_yes = Check(kind="contains", value="yes", id="c1", since=1)
    short = Check(kind="max_words", value=2, id="c2", since=2)
    rows = [
        {
            "chat_set": "talks", "conversation_id": f"k{k}", "turn": turn, "policy": "full", "budget": "r1",
            "user": f"turn {turn}?", "text": text,
            "checks": json.dumps([c.model_dump() for c in (said_yes, short) if c.in_force(turn)]),
        }
        for k, texts in enumerate(answers)
        for turn, text in enumerate(texts, 1)
    ]  # fmt: skip
    path = str(folder / "chat.parquet")
    write_table(path, rows_to_table(rows, CHAT), {})
    return path


def fair(asked: dict) -> dict:
    """Judge both instructions correctly, with code that is independent of the rules on purpose."""
    if "at most 2 words" in asked["instruction"]:
        return {"follows": asked["answer"].count(" ") < 2, "reason": "counted"}
    return {"follows": "yes" in asked["answer"], "reason": "read"}


def judge(tmp_path: Path, act, answers, **changes) -> tuple[list[dict], Endpoint]:
    """Run the judge; return the rows that it wrote, and the endpoint."""
    with endpoint(act) as there:
        settings = there.settings | changes
        output = str(tmp_path / "judge.parquet")
        write_judge([chat_file(tmp_path, answers)], output, str(tmp_path / "store.sqlite"), settings)
    return pq.read_table(output).to_pylist(), there


def test_good_verdicts_stand_beside_the_rules(tmp_path):
    """Check that the judge's verdicts and the rules' verdicts are in one table, and check the request."""
    answers = [["yes", "yes it is so"], ["no", "yes well"]]
    rows, there = judge(tmp_path, fair, answers)
    assert [(r["conversation_id"], r["turn"], r["check_id"], r["judge"]) for r in rows] == [
        ("k0", 1, "c1", True), ("k0", 2, "c1", True), ("k0", 2, "c2", False),
        ("k1", 1, "c1", False), ("k1", 2, "c1", True), ("k1", 2, "c2", True),
    ]  # fmt: skip
    assert {r["judge_error"] for r in rows} == {None}
    write_verdicts([str(tmp_path / "chat.parquet")], str(tmp_path / "v.parquet"), str(tmp_path / "judge.parquet"))
    both = pq.read_table(tmp_path / "v.parquet").cast(CHAT_VERDICTS).to_pylist()
    assert [(r["rule"], r["judge"]) for r in both] == [(r["judge"], r["judge"]) for r in rows]
    asked = there.asked[0]
    assert asked["temperature"] == 0
    assert asked["messages"][0] == {"role": "system", "content": judge_module.RUBRIC}
    assert set(json.loads(asked["messages"][1]["content"])) == {"instruction", "message", "answer"}
    metadata = {k.decode(): v.decode() for k, v in pq.read_schema(tmp_path / "judge.parquet").metadata.items()}
    assert metadata["rubric_sha256"] == text_sha256(judge_module.RUBRIC)
    assert metadata["model"] == "fair"


def late(handler):
    time.sleep(1.0)
    handler._raw(events(json.dumps(GOOD)))


def half_a_body(handler):
    handler.send_response(200)
    handler.send_header("content-type", "text/event-stream")
    handler.send_header("content-length", "100000")
    handler.end_headers()
    handler.wfile.write(events(json.dumps(GOOD), done=False)[:90])


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (late, "TIMEOUT: "),
        (500, "ENGINE_ERROR: status 500"),
        (half_a_body, "ENGINE_ERROR: the connection broke"),
        (events(json.dumps(GOOD), finish=None, done=False), "ENGINE_ERROR: the answer is incomplete"),
        (b'data: {"choices": [{"ind', "ENGINE_ERROR: "),
        (b"data: []\n\ndata: [DONE]\n\n", "ENGINE_ERROR: "),
        ("The answer does follow it.", "MALFORMED: the reply is not a JSON object but 'The answer does follow it.'"),
        ('{"follows": true', "MALFORMED: "),
        ("", "MALFORMED: the reply of the judge is empty"),
        ({"follows": "yes"}, "SCHEMA: follows: "),
        ({"follows": 1}, "SCHEMA: follows: "),
        ({"follows": None}, "SCHEMA: follows: "),
        ({"verdict": True}, "SCHEMA: follows: field required"),
        ([True], "SCHEMA: the verdict: "),
        ({"follows": True, "reason": 7}, "SCHEMA: reason: "),
    ],
    ids=lambda value: getattr(value, "__name__", str(value))[:30],
)
def test_what_is_no_verdict_is_a_failure_with_its_reason_and_no_zero(tmp_path, act, said):
    """Check that an invalid verdict is null with its reason, and that other verdicts are kept."""

    def once(asked):
        return act if asked["answer"] == "yes bad" else fair(asked)

    rows, _ = judge(tmp_path, once, [["yes bad"], ["yes"], ["no"]], timeout_s=0.5)
    failed, *others = rows
    assert failed["judge"] is None
    assert failed["judge_error"].startswith(said)
    assert [(r["judge"], r["judge_error"]) for r in others] == [(True, None), (False, None)]


def test_a_verdict_in_a_fence_or_after_thoughts_is_read(tmp_path):
    def wordy(asked):
        return f"<think>{{}} hm</think>\n```json\n{json.dumps(fair(asked))}\n```"

    rows, _ = judge(tmp_path, wordy, [["yes", "no"]])
    assert [r["judge"] for r in rows] == [True, False, True]


def test_a_verdict_that_is_cut_says_so(tmp_path):
    """Check that a truncated verdict is reported as cut at max_tokens."""
    rows, _ = judge(tmp_path, lambda _: events('{"follows": tr', finish="length"), [["yes"]])
    assert rows[0]["judge_error"].endswith("(cut at max_tokens)")


def test_a_fault_that_passes_is_asked_again(tmp_path):
    seen = []

    def moody(asked):
        seen.append(asked)
        return 503 if len(seen) == 1 else fair(asked)

    rows, there = judge(tmp_path, moody, [["yes"]])
    assert [r["judge"] for r in rows] == [True]
    assert len(there.asked) == 2


def test_a_rerun_asks_only_what_is_missing(tmp_path):
    answers = [["yes", "yes well"], ["no", "bad"], ["yes", "no"]]

    def mostly(asked):
        return "what?" if asked["answer"] == "bad" else fair(asked)

    rows, there = judge(tmp_path, mostly, answers)
    # "yes" in turn 1 is the same question in two conversations
    assert len(there.asked) == len(rows) - 1
    assert sum(r["judge"] is None for r in rows) == 2
    again, there = judge(tmp_path, fair, answers)
    with_port = [json.loads(body["messages"][1]["content"])["answer"] for body in there.asked]
    assert len(with_port) == len(rows) - 1  # a different server counts as a different judge

    with endpoint(mostly) as there:
        files = [chat_file(tmp_path, answers)], str(tmp_path / "judge.parquet"), str(tmp_path / "own.sqlite")
        write_judge(*files, there.settings)
        first = len(there.asked)
        write_judge(*files, there.settings)
        assert [json.loads(b["messages"][1]["content"])["answer"] for b in there.asked[first:]] == ["bad", "bad"]
        write_judge(*files, there.settings | {"concurrency": 1, "timeout_s": 9.0})
        assert len(there.asked) == first + 4
    assert [r["judge"] for r in again] == [True, True, True, False, False, True, True, False, True]


def test_what_was_said_before_the_server_went_away_is_kept(tmp_path):
    answers = [[f"yes {i}"] for i in range(9)]
    files = [chat_file(tmp_path, answers)], str(tmp_path / "judge.parquet"), str(tmp_path / "store.sqlite")
    asked = []

    def until_four(question):
        asked.append(question["answer"])
        return 401 if len(asked) > 4 else fair(question)

    with endpoint(until_four) as there:
        with pytest.raises(UserError, match="requires an API key"):
            write_judge(*files, there.settings | {"concurrency": 1})
        assert not Path(files[1]).exists()
        asked.clear()
        with pytest.raises(UserError):
            write_judge(*files, there.settings | {"concurrency": 1})
        assert asked == [f"yes {i}" for i in (4, 5, 6, 7, 8)]  # the endpoint refuses the last one
        asked.clear()
        write_judge(*files, there.settings | {"concurrency": 1})
        assert asked == ["yes 8"]
    assert [r["judge"] for r in pq.read_table(files[1]).to_pylist()] == [True] * 9


def test_no_server_at_all_is_one_sentence(tmp_path, capsys):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = Judge(base_url=f"http://127.0.0.1:{port}/v1", model="m", retries=0, timeout_s=2.0).model_dump()
    path = chat_file(tmp_path, [["yes"]])
    output = str(tmp_path / "judge.parquet")
    code = main(["--spec", json.dumps({"judge": settings}), "--store", str(tmp_path / "s"), "--output", output, path])
    assert code == 2
    assert "cannot be reached" in capsys.readouterr().err
    assert not Path(output).exists()


def test_an_answer_that_is_not_there_is_not_judged(tmp_path):
    rows, there = judge(tmp_path, fair, [["yes", None]])
    assert [(r["turn"], r["judge"]) for r in rows] == [(1, True)]
    assert len(there.asked) == 1


def test_the_key_reaches_the_endpoint_and_nothing_else(tmp_path, capsys):
    def indiscreet(asked):
        return {"yes": fair(asked), "no": 500, "maybe": f"your key is {KEY}"}[asked["answer"]]

    rows, there = judge(tmp_path, indiscreet, [["yes"], ["no"], ["maybe"]])
    assert {h.get("Authorization") or h.get("authorization") for h in there.headers} == {f"Bearer {KEY}"}
    assert [r["judge"] for r in rows] == [True, None, None]
    assert all(r["judge_error"] for r in rows[1:])
    print(rows)
    shown = capsys.readouterr()
    assert KEY not in shown.out + shown.err
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"judge.parquet", "store.sqlite"} <= {file.name for file in files}
    for file in files:
        assert KEY.encode() not in file.read_bytes()
    for value in pq.read_table(tmp_path / "judge.parquet").to_pylist():
        assert KEY not in json.dumps(value)


# ----------------------------------------------------------------------------------------------------
# A real server


@pytest.fixture(scope="module")
def real_server(tmp_path_factory):
    """Yield the address of ``transformers serve`` with a random chat model, and the model's folder."""
    pytest.importorskip("fastapi")
    from models import random_model
    from transformers import AutoTokenizer

    home = tmp_path_factory.mktemp("serve")
    folder = home / "model"
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "resources/tiny-reader/tokenizer")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    random_model("qwen2", vocab_size=len(tokenizer)).save_pretrained(folder)
    (home / "hub").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--host", "127.0.0.1",
               "--port", str(port), "--device", "cpu", "--dtype", "float32"]  # fmt: skip
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    with (home / "log").open("w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            for _ in range(240):
                time.sleep(0.5)
                assert server.poll() is None, (home / "log").read_text()
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                    break
                except (urllib.error.URLError, OSError):
                    continue
            yield f"http://127.0.0.1:{port}/v1", str(folder)
        finally:
            server.terminate()
            server.wait(timeout=20)


@pytest.mark.slow
def test_a_real_server_with_a_model_that_cannot_judge(tmp_path, real_server):
    url, folder = real_server
    settings = Judge(base_url=url, model=folder, api_key_env=None, max_tokens=16).model_dump()
    path = chat_file(tmp_path, [["yes", "no it is not"]])
    write_judge([path], str(tmp_path / "judge.parquet"), str(tmp_path / "store.sqlite"), settings)
    rows = pq.read_table(tmp_path / "judge.parquet").to_pylist()
    assert len(rows) == 3
    assert all(r["judge"] is None for r in rows)
    assert all(r["judge_error"].startswith("MALFORMED: ") for r in rows)


# ----------------------------------------------------------------------------------------------------
# The judge in the configuration


def experiment(**judge):
    chat = {"source": "generated", "n": 4} | ({"judge": judge} if judge else {})
    return settings.parse({"chat": chat, "kv": {"policies": {"full": {}, "random": {}}, "budgets": [0.5]}})


def test_a_judge_makes_no_conversation_stale():
    plain, judged = experiment(), experiment(base_url="http://127.0.0.1:1/v1", model="m")
    assert chat_specs.cell(plain, "random", "r0.5") == chat_specs.cell(judged, "random", "r0.5")
    assert chat_specs.conversations(plain) == chat_specs.conversations(judged)
    assert chat_specs.judge(judged)["judge"]["model"] == "m"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"api_key_env": KEY}, "never the key itself"),
        ({"base_url": f"http://me:{KEY}@host/v1"}, "contains a key or a password"),
        ({"base_url": f"http://host/v1?key={KEY}"}, "contains a key or a password"),
        ({"base_url": "host"}, "not an address such as"),
        ({"model": ""}, "chat.judge.model"),
        ({"concurrency": 0}, "chat.judge.concurrency"),
    ],
)
def test_a_bad_judge_is_refused_without_repeating_a_key(changed, said):
    with pytest.raises(UserError, match=said) as refused:
        experiment(**({"base_url": "http://127.0.0.1:1/v1", "model": "m"} | changed))
    assert KEY not in str(refused.value)
