"""Requests to `kv_transition serve` one at a time and several at once: answered tokens per second, and their ratio.

    python benchmarks/batching.py [--quick] [--output FILE.json]

One server, one thread, float32, greedy, a random model; rounds of the two kinds by turns, so that neighbours on the
machine meet both. Every answer has its full length. No prompt is held, so that its reading is part of the time.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from serving import NAME, free_port, ours, server
from workload import SIZES, VOCABULARY, Size, write_figures


@dataclass(frozen=True)
class Plan:
    """The sizes of the benchmark."""

    size: Size = SIZES[1]
    at_once: int = 8
    rounds: int = 5
    length: int = 64
    max_tokens: int = 64


QUICK = Plan(SIZES[0], at_once=4, rounds=1, max_tokens=16)
WISHES: dict[str, list[dict[str, Any]]] = {
    "full": [{}],
    "full, snapkv, h2o and streaming_llm at 0.5": [
        {},
        {"kv_policy": "snapkv", "kv_budget": 0.5},
        {"kv_policy": "h2o", "kv_budget": 0.5},
        {"kv_policy": "streaming_llm", "kv_budget": 0.5},
    ],
}


def bodies_of(plan: Plan, wishes: list[dict[str, Any]], seed: str) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [
        {
            "model": NAME,
            "prompt": [draw.randrange(1, VOCABULARY) for _ in range(plan.length)],
            "temperature": 0,
            "max_tokens": plan.max_tokens,
        }
        | wishes[i % len(wishes)]
        for i in range(plan.at_once)
    ]


def served(
    client: httpx.Client, bodies: list[dict[str, Any]], at_once: int
) -> tuple[list[dict[str, Any]], float, float]:
    """Return the answers' `kv`, the wall-clock seconds and the CPU seconds of the server."""
    process = psutil.Process(_server())
    before, started = process.cpu_times(), time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        got = list(pool.map(lambda body: client.post("/completions", json=body).raise_for_status().json(), bodies))
    after, ended = process.cpu_times(), time.perf_counter()
    cpu = after.user + after.system - before.user - before.system
    return [answer["kv"] for answer in got], ended - started, cpu


def _server() -> int:
    (child,) = psutil.Process().children()
    return child.pid


def compared(client: httpx.Client, plan: Plan, name: str, wishes: list[dict[str, Any]]) -> dict[str, Any]:
    tokens = plan.at_once * plan.max_tokens
    walls: dict[int, list[float]] = {1: [], plan.at_once: []}
    cpus: dict[int, list[float]] = {1: [], plan.at_once: []}
    same = shared = 0
    for number in range(plan.rounds):
        alone = {}
        for at_once in (1, plan.at_once):
            bodies = bodies_of(plan, wishes, f"{name} {number}")
            kvs, wall, cpu = served(client, bodies, at_once)
            walls[at_once].append(wall)
            cpus[at_once].append(cpu)
            alone[at_once] = kvs
        same += sum(a["token_ids"] == b["token_ids"] for a, b in zip(*alone.values(), strict=True))
        shared = max(shared, *(kv["batch_size"] for kv in alone[plan.at_once]))
    wall = {n: statistics.median(values) for n, values in walls.items()}
    cpu = {n: statistics.median(values) for n, values in cpus.items()}
    return {
        "requests": name,
        "answers": plan.rounds * plan.at_once,
        "same_answers": same,
        "batch_size": shared,
        "alone_tokens_per_s": round(tokens / wall[1], 1),
        "together_tokens_per_s": round(tokens / wall[plan.at_once], 1),
        "wall_ratio": round(wall[1] / wall[plan.at_once], 2),
        "alone_tokens_per_cpu_s": round(tokens / cpu[1], 1),
        "together_tokens_per_cpu_s": round(tokens / cpu[plan.at_once], 1),
        "cpu_ratio": round(cpu[1] / cpu[plan.at_once], 2),
        "wall_ratios": [round(a / b, 2) for a, b in zip(*walls.values(), strict=True)],
    }


def measure(quick: bool) -> dict[str, Any]:
    plan = QUICK if quick else Plan()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = plan.size.save(folder / "model")
        port = free_port()
        # nothing is held, so that each prompt is read for each answer
        command = ours(model, port, "--statistics", "none", "--prefill-gb", "0", "--batch", str(plan.at_once))
        with server(command, port, folder) as url, httpx.Client(base_url=url, timeout=600, trust_env=False) as client:
            served(client, bodies_of(plan, [{}], "first"), plan.at_once)  # what is done once
            rows = []
            for title, wishes in WISHES.items():
                rows.append(compared(client, plan, title, wishes))
                print(json.dumps(rows[-1]), flush=True)
    return {
        "rows": rows,
        "model": plan.size.name,
        "length": plan.length,
        "max_tokens": plan.max_tokens,
        "at_once": plan.at_once,
        "rounds": plan.rounds,
    }


if __name__ == "__main__":
    write_figures(__doc__, measure)
