"""Send mutated requests, several at a time, to a server of this project: each is answered or refused within a time
limit."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
from serving import NAME
from test_serve_fuzz import GOOD, changed, damaged

READER = Path(__file__).parents[2] / "resources/tiny-reader"
AT_ONCE = 4
LATEST_S = 60.0
"""seconds after which a request without an answer counts as a hang"""
RAW = 10
"""one request in this many also has a damaged head and is sent over a bare connection"""
JSON = {"content-type": "application/json"}


def fuzz(n: int, rng: random.Random) -> dict:
    """Send ``n`` requests; return the count of each status, the slowest time, and the server's memory before and after.

    closed: the number of damaged heads after which the server closed the connection without a response. before: the
    memory after a tenth of the requests, because the first of each kind load code and fill the store of prompts.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "kv_transition", "serve", "--model", READER, "--name", NAME, "--port", str(port)]
    command += ["--device", "cpu", "--threads", "1", "--max-length", "512", "--max-body-mb", "0.02"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    seen: Counter[str] = Counter()
    seconds: list[float] = []
    try:
        server.stderr.readline()
        memory = psutil.Process(server.pid).memory_info
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=LATEST_S, trust_env=False) as client:

            def send(seed: str) -> None:
                draw, started = random.Random(seed), time.monotonic()
                path, body = draw.choice(GOOD)
                content = json.dumps(changed(draw, body) if draw.random() < 0.7 else body).encode()
                content = damaged(draw, content) if draw.random() < 0.4 else content
                if draw.randrange(RAW):
                    status = _posted(client, f"/v1/{path}", content)
                else:
                    status = _raw(port, damaged(draw, _head(path, content)) + content)
                seen[status] += 1
                seconds.append(time.monotonic() - started)

            seeds = [f"{rng.random()} {i}" for i in range(n)]
            before = 0
            with ThreadPoolExecutor(AT_ONCE) as pool:
                for start in range(0, n, 100):
                    list(pool.map(send, seeds[start : start + 100]))
                    before = memory().rss if not before and start >= n // 10 else before
            health = client.get("/health").json()
        after = memory().rss
    finally:
        server.kill()
        server.wait()
    faults = sum(count for status, count in seen.items() if status.startswith("5") or status == "hangs")
    return {
        "tries": n,
        "faults": faults,
        "statuses": dict(sorted(seen.items())),
        "slowest_s": round(max(seconds), 2),
        "memory_mb": {"before": round(before / 2**20), "after": round(after / 2**20)},
        "healthy": health["status"] == "ok" and not health["running"],
    }


def _posted(client: httpx.Client, path: str, content: bytes) -> str:
    try:
        return str(client.post(path, content=content, headers=JSON).status_code)
    except httpx.TimeoutException:
        return "hangs"
    except httpx.TransportError:
        return "closed"


def _head(path: str, content: bytes) -> bytes:
    return (
        f"POST /v1/{path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    ).encode()


def _raw(port: int, content: bytes) -> str:
    """Send bytes and close the sending side, because the server would wait for the rest of a length that is too
    large."""
    got = b""
    with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port), LATEST_S) as connection:
        try:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(65536):
                got += piece
        except TimeoutError:
            return "hangs"
    words = got.split(b" ", 2)
    return words[1].decode() if len(words) > 1 and words[1].isdigit() else "closed"
