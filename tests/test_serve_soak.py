"""Test that after many bad requests the server is healthy, has not grown, and has no fault."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
from serving import NAME
from test_serve_fuzz import GOOD, changed, damaged

READER = Path(__file__).parents[1] / "resources" / "tiny-reader"
MILLIONS = [
    {"prompt": "Dikuna Bank dates from 1911 . " * 233_000},
    {"prompt": list(range(50)) * 30_000},
    {"prompt": ["a", 5] * 500_000},
    {"prompt": "x", "stop": "w" * 7_000_000, "max_tokens": 3},
    {"prompt": "x" * 9_000_000},
]
JSON = {"content-type": "application/json"}


@pytest.mark.slow
def test_bad_clients_leave_the_server_as_it_was():
    """Check that resident memory grows by less than a fifth after the first answers, and that no status is 500 or
    above."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "kv_transition", "serve", "--model", READER, "--name", NAME, "--port", str(port)]
    process = subprocess.Popen([*command, "--device", "cpu", "--threads", "1"], stderr=subprocess.PIPE)
    draw, statuses = random.Random("soak"), set()
    try:
        assert b"stop with Ctrl+C" in process.stderr.readline()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300, trust_env=False) as client:

            def post(path, content, headers=JSON):
                statuses.add(client.post(f"/v1/{path}", content=content, headers=headers).status_code)

            for path, body in GOOD[:4]:
                post(path, json.dumps(body).encode())
            before = psutil.Process(process.pid).memory_info().rss
            for body in MILLIONS:
                post("completions", json.dumps({"model": NAME, "temperature": 0} | body).encode())
            for _ in range(60):
                path, body = draw.choice(GOOD)
                if draw.random() < 0.5:
                    body = changed(draw, body)
                content = json.dumps(body | {"max_tokens": 2} if isinstance(body, dict) else body).encode()
                post(path, damaged(draw, content) if draw.random() < 0.5 else content)
            post("completions", b"prompt=x", {"content-type": "application/x-www-form-urlencoded"})
            for number in range(10):
                with socket.create_connection(("127.0.0.1", port)) as leaves:
                    content = json.dumps({"model": NAME, "prompt": [5 + number] * 500, "max_tokens": 500}).encode()
                    head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
                    leaves.sendall(b"POST /v1/completions HTTP/1.1\r\n" + head.encode() + content)
            while (health := client.get("/health").json())["running"] or health["waiting"]:
                pass
            path, body = GOOD[0]
            post(path, json.dumps(body).encode())
            after = psutil.Process(process.pid).memory_info().rss
        assert health["status"] == "ok"
        assert {200, 400, 413, 415} <= statuses
        assert not [status for status in statuses if status >= 500], statuses
        assert after < 1.2 * before, (before / 2**20, after / 2**20)
    finally:
        process.kill()
        process.wait()
