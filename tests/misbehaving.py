"""An OpenAI-compatible server on loopback that fails as its prompts request, and counts its requests.

A prompt that contains ``[[FAULT]]`` triggers that fault each time it is sent; ``[[FAULT*2]]`` triggers it only the
first two times. The answer depends on the prompt alone, so that a test can detect a wrong, a lost or a duplicated
answer.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import socketserver
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

MODEL = "tiny"
_MARK = re.compile(r"\[\[([a-z0-9_]+)(?:\*(\d+))?\]\]")
_PATHS = ("/v1/chat/completions", "/v1/completions")

Json = dict[str, Any]


def answer_to(prompt: str) -> str:
    """Return words and characters of several bytes, so that a cut may split a character."""
    number = re.search(r"no (\d+)", prompt)
    return f"the answer to {number[1] if number else 0} is schön — 答案 🗝"


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, key: str | None = None, port: int = 0):
        self.key = key
        self.asked: Counter[str] = Counter()
        """how often each prompt was sent"""
        self.bodies: list[Json] = []
        self.times: list[tuple[str, float]] = []
        self.authorizations: list[str | None] = []
        self.under_way = 0
        self.most_under_way = 0
        self.gate = threading.Event()
        """the event that [[gate]] waits for"""
        self.slow_s = 0.0
        self.cut_at = 0
        """number of response bytes that [[cut]] sends before it closes"""
        self.lock = threading.Lock()
        self.over = threading.Event()
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the tests include clients that disconnect


@contextlib.contextmanager
def serving(key: str | None = None, port: int = 0) -> Iterator[Server]:
    with Server(key, port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.gate.set()
            server.shutdown()


class _Handler(socketserver.StreamRequestHandler):
    server: Server
    disable_nagle_algorithm = True

    def handle(self) -> None:
        line = self.rfile.readline().decode()
        if not line:
            return
        method, path, _ = line.split()
        headers = {}
        while header := self.rfile.readline().decode().strip():
            name, _, value = header.partition(":")
            headers[name.lower()] = value.strip()
        body = json.loads(self.rfile.read(int(headers.get("content-length", 0))) or b"{}")
        server = self.server
        if method == "GET":
            return self.reply(404, {"error": {"message": "no list of models here"}})
        prompt = body.get("prompt") if "prompt" in body else "".join(m["content"] for m in body["messages"])
        prompt = prompt if isinstance(prompt, str) else f"no {prompt[-1]}"
        with server.lock:
            server.asked[prompt] += 1
            time_asked = server.asked[prompt]
            server.bodies.append(body)
            server.times.append((prompt, time.monotonic()))
            server.authorizations.append(headers.get("authorization"))
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            self.respond(path, body, prompt, time_asked, headers.get("authorization"))
        finally:
            with server.lock:
                server.under_way -= 1

    def respond(self, path: str, body: Json, prompt: str, time_asked: int, authorization: str | None) -> None:
        server = self.server
        if server.key and authorization != f"Bearer {server.key}":
            return self.reply(401, {"error": {"message": f"Incorrect API key provided: {authorization}."}})
        if path not in _PATHS:
            return self.reply(404, {"error": {"message": "no such path"}})
        if body["model"] != MODEL:
            return self.reply(404, {"error": {"message": f"The model {body['model']!r} does not exist."}})
        if server.slow_s:
            time.sleep(server.slow_s)
        mark = _MARK.search(prompt)
        if mark and time_asked <= int(mark[2] or 1_000_000):
            return getattr(self, mark[1])(body, prompt)
        return self.fine(body, prompt)

    # ------------------------------------------------------------------------------------------------
    # Correct answers

    def events(self, body: Json, prompt: str, usage: Json | None = None) -> list[bytes]:
        chat = "messages" in body
        text = answer_to(prompt)
        pieces = [text[i : i + 5] for i in range(0, len(text), 5)]

        def event(choices: list[Json], **more: Any) -> bytes:
            value = {"id": "1", "object": "x", "created": 1, "model": body["model"], "choices": choices, **more}
            return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"

        def choice(text: str, finish: str | None = None) -> Json:
            said = {"delta": {"content": text}} if chat else {"text": text}
            return {"index": 0, **said, "finish_reason": finish}

        told = self.usage(body, prompt) if usage is None else usage
        last = [event([], usage=told)] if told else []
        return [*(event([choice(p)]) for p in pieces), event([choice("", "stop")]), *last, b"data: [DONE]\n\n"]

    def usage(self, body: Json, prompt: str) -> Json:
        return {"prompt_tokens": 10, "completion_tokens": min(9, body["max_tokens"]), "total_tokens": 19}

    def whole(self, body: Json, prompt: str) -> Json:
        text = answer_to(prompt)
        said = {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
        choice = {"index": 0, **said, "finish_reason": "stop"}
        return {"id": "1", "model": body["model"], "choices": [choice], "usage": self.usage(body, prompt)}

    def fine(self, body: Json, prompt: str) -> None:
        self.wfile.write(self.response(body, prompt))

    def response(self, body: Json, prompt: str) -> bytes:
        if not body.get("stream"):
            return self.head(200, "application/json", whole := json.dumps(self.whole(body, prompt)).encode()) + whole
        return self.head(200, "text/event-stream") + b"".join(self.events(body, prompt))

    # ------------------------------------------------------------------------------------------------
    # Faults

    def hang(self, body: Json, prompt: str) -> None:
        self.server.over.wait(60)

    def gate(self, body: Json, prompt: str) -> None:
        self.server.gate.wait(60)
        self.fine(body, prompt)

    def trickle(self, body: Json, prompt: str) -> None:
        """Send a comment at regular intervals and never finish."""
        self.wfile.write(self.head(200, "text/event-stream"))
        while not self.server.over.wait(0.05):
            self.wfile.write(b": still there\n\n")

    def endless(self, body: Json, prompt: str) -> None:
        self.wfile.write(self.head(200, "text/event-stream"))
        while not self.server.over.wait(0.05):
            self.wfile.write(self.events(body, prompt)[0])

    def reset(self, body: Json, prompt: str) -> None:
        """Reset the connection in the middle of the stream."""
        response = self.response(body, prompt)
        self.wfile.write(response[: len(response) // 2])
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def cut(self, body: Json, prompt: str) -> None:
        """Close the connection properly, but before the response is complete."""
        self.wfile.write(self.response(body, prompt)[: self.server.cut_at])

    def bytewise(self, body: Json, prompt: str) -> None:
        for byte in self.response(body, prompt):
            self.wfile.write(bytes([byte]))
            self.wfile.flush()

    def rate(self, body: Json, prompt: str) -> None:
        self.reply(429, {"error": {"message": "slow down"}}, {"Retry-After": "1"})

    def rate_long(self, body: Json, prompt: str) -> None:
        self.reply(429, {"error": {"message": "come back tomorrow"}}, {"Retry-After": "86400"})

    def timeout408(self, body: Json, prompt: str) -> None:
        self.reply(408, {"error": {"message": "too slow"}})

    def conflict409(self, body: Json, prompt: str) -> None:
        self.reply(409, {"error": {"message": "locked"}})

    def error500(self, body: Json, prompt: str) -> None:
        self.reply(500, {"error": {"message": "something broke"}})

    def error503(self, body: Json, prompt: str) -> None:
        self.wfile.write(self.head(503, "text/html", page := b"<html>\n<b>overloaded</b></html>") + page)

    def echo500(self, body: Json, prompt: str) -> None:
        self.reply(500, {"error": {"message": f"failed with {self.server.authorizations[-1]}"}})

    def parrot(self, body: Json, prompt: str) -> None:
        """Return the API key as the answer."""
        whole = self.whole(body, prompt)
        whole["choices"][0] |= {"text": str(self.server.authorizations[-1])}
        self.reply(200, whole)

    def die(self, body: Json, prompt: str) -> None:
        """Stop the whole server."""
        self.server.shutdown()
        self.server.server_close()

    def too_long(self, body: Json, prompt: str) -> None:
        self.reply(400, {"error": {"message": "the context length is exceeded", "code": "context_length_exceeded"}})

    def oom(self, body: Json, prompt: str) -> None:
        self.reply(413, {"error": {"message": "it does not fit the memory", "code": "out_of_memory"}})

    def not_json(self, body: Json, prompt: str) -> None:
        if body.get("stream"):
            broken = b"".join(self.events(body, prompt)[:2]) + b'data: {"choices": [{"text": "half\n\n'
            self.wfile.write(self.head(200, "text/event-stream") + broken)
        else:
            self.wfile.write(self.head(200, "application/json", broken := b'{"choices": [{"te') + broken)

    def html(self, body: Json, prompt: str) -> None:
        self.wfile.write(self.head(200, "text/html", page := b"<html>please log in</html>") + page)

    def shape(self, body: Json, prompt: str) -> None:
        """Return valid JSON that does not follow the protocol."""
        value = b'{"choices": {"text": 3}, "usage": [1]}'
        if body.get("stream"):
            self.wfile.write(self.head(200, "text/event-stream") + b"data: " + value + b"\n\n")
        else:
            self.wfile.write(self.head(200, "application/json", value) + value)

    def error200(self, body: Json, prompt: str) -> None:
        self.reply(200, {"error": {"message": "out of cheese"}})

    def error_in_stream(self, body: Json, prompt: str) -> None:
        some = b"".join(self.events(body, prompt)[:3])
        error = b'data: {"error": {"message": "the worker died", "code": 500}}\n\ndata: [DONE]\n\n'
        self.wfile.write(self.head(200, "text/event-stream") + some + error)

    def refused_in_stream(self, body: Json, prompt: str) -> None:
        error = b'data: {"error": {"message": "the context length is exceeded", "code": 400}}\n\n'
        self.wfile.write(self.head(200, "text/event-stream") + error)

    def no_choices(self, body: Json, prompt: str) -> None:
        if body.get("stream"):
            self.wfile.write(self.head(200, "text/event-stream") + b"".join(self.events(body, prompt)[-2:]))
        else:
            self.reply(200, self.whole(body, prompt) | {"choices": []})

    def unfinished(self, body: Json, prompt: str) -> None:
        """Send [DONE] without a finish reason."""
        events = self.events(body, prompt)
        self.wfile.write(self.head(200, "text/event-stream") + b"".join(events[:3] + events[-1:]))

    def whole_instead(self, body: Json, prompt: str) -> None:
        """Ignore the request to stream, and send the whole response."""
        self.fine(body | {"stream": False}, prompt)

    def usage_wrong(self, body: Json, prompt: str) -> None:
        wrong = {"prompt_tokens": 0, "completion_tokens": body["max_tokens"] + 1, "total_tokens": "many"}
        self.told(body, prompt, wrong)

    def usage_none(self, body: Json, prompt: str) -> None:
        self.told(body, prompt, {})

    def told(self, body: Json, prompt: str, usage: Json) -> None:
        self.wfile.write(self.head(200, "text/event-stream") + b"".join(self.events(body, prompt, usage)))

    # ------------------------------------------------------------------------------------------------

    def reply(self, status: int, value: Json, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.wfile.write(self.head(status, "application/json", content, headers) + content)

    def head(
        self, status: int, kind: str, content: bytes | None = None, headers: dict[str, str] | None = None
    ) -> bytes:
        lines = [f"HTTP/1.1 {status} X", f"Content-Type: {kind}", "Connection: close"]
        if content is not None:
            lines.append(f"Content-Length: {len(content)}")
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()
