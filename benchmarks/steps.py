"""The cost of a decode step under policies that act at each step, compared with a plain step: CPU time of one thread.

    python benchmarks/steps.py [--entries 2048] [--steps 256] [--output FILE.json] [--render docs/benchmarks.md]

A model of 8 layers and 512 channels with random weights, one sequence. The plain step reads a token after a full cache
of the same number of entries, without statistics; ``transformers`` is its own loop with its own cache. All variants
alternate within one process, step by step, so that other load on the machine slows all of them equally. A policy that
compresses every 128 tokens does nothing at most steps, so the mean, which includes two compressions, is listed with the
median over the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import numpy as np
from document import put, table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "src"))

POLICIES = ("streaming_llm", "h2o", "h2o_heavy", "tova", "r_kv")

EVERY = 128
ONCE = ("snapkv", "lagkv", "chunkkv", "cake", "criticalkv", "kvzip")


def measure(entries: int, steps: int) -> dict[str, Any]:
    import torch
    from transformers import DynamicCache
    from workload import SIZES, VOCABULARY

    from kv_transition.engines.local import LocalEngine
    from kv_transition.policies.catalog import create, hyper_parameters

    torch.set_num_threads(1)
    size = next(size for size in SIZES if (size.layers, size.hidden) == (8, 512))
    with tempfile.TemporaryDirectory() as folder:
        size.save(Path(folder))
        engine = LocalEngine.from_pretrained(folder)
        plain = LocalEngine.from_pretrained(folder).model
        plain.set_attn_implementation("sdpa")
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(1, VOCABULARY, (2 * entries,), generator=generator).tolist()
    whole = engine.extend(None, prompt)

    def stepper(kind: str, extra: dict[str, Any] | None = None) -> Callable[[int], None]:
        policy = create(kind, hyper_parameters(kind) | (extra or {}))
        held = policy.compress(whole, entries)

        def step(token: int) -> None:
            nonlocal held
            held = policy.hold(engine.extend(held, [token], policy.statistics, policy.growth(EVERY)), entries)

        return step

    def paced(kind: str) -> Callable[[int], None]:
        from kv_transition.run.paced import Paced

        policy = Paced(inner=create(kind, hyper_parameters(kind)), every=EVERY)
        held = policy.compress(engine.extend(None, prompt, policy.statistics), entries)
        said: list[int] = []

        def step(token: int) -> None:
            nonlocal held
            grown = engine.extend(held, [token], policy.statistics, EVERY)
            said.append(token)
            if "reconstruction" in policy.statistics and policy.due(grown, entries):
                grown = engine.repeated(grown, said[-EVERY:])
            held = policy.hold(grown, entries)

        return step

    def bare() -> Callable[[int], None]:
        state = engine.extend(None, prompt[:entries], frozenset(), room=steps + 10)

        def step(token: int) -> None:
            nonlocal state
            state = engine.extend(state, [token], frozenset(), steps)

        return step

    def transformers() -> Callable[[int], None]:
        cache = DynamicCache(config=plain.config)
        with torch.inference_mode():
            plain(torch.tensor([prompt[:entries]]), past_key_values=cache, logits_to_keep=1)

        @torch.inference_mode()
        def step(token: int) -> None:
            plain(torch.tensor([[token]]), past_key_values=cache, logits_to_keep=1)

        return step

    runs = {"bare": bare(), "transformers": transformers(), **{kind: stepper(kind) for kind in POLICIES}}
    runs["streaming_llm, positions: cache"] = stepper("streaming_llm", {"positions": "cache"})
    # policies that act once, compressed again each time 128 entries more are there (decoding.compress_every)
    runs |= {f"{kind}, every 128": paced(kind) for kind in ONCE}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(steps + 5):
        token = prompt[number]
        for name, step in runs.items():
            started = time.process_time()
            step(token)
            if number >= 5:  # what a first call loads is no part of it
                seconds[name].append(time.process_time() - started)
    base = np.array(seconds["bare"])
    return {
        "model": size.name,
        "entries": entries,
        "steps": steps,
        "ms": {name: 1000 * float(np.median(own)) for name, own in seconds.items()},
        "over_bare": {name: float(np.median(np.array(own) / base)) for name, own in seconds.items()},
        "mean_over_bare": {name: sum(own) / sum(seconds["bare"]) for name, own in seconds.items()},
    }


def rendered(found: dict[str, Any]) -> str:
    columns = {"ms": "ms, median", "over_bare": "over a bare step, median", "mean_over_bare": "over a bare step, mean"}
    columns = {kind: head for kind, head in columns.items() if kind in found}
    rows = [[name, *(f"{found[kind][name]:.2f}" for kind in columns)] for name in found["ms"]]
    head = ["step", *columns.values()]
    measured = f"Measured on {found['date']}, {found['steps']} steps each, commit {found['commit']}."
    return f"{table(head, rows)}\n\n{measured}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--entries", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--render", type=Path)
    parser.add_argument("--figures", type=Path, help="render these, and measure nothing")
    arguments = parser.parse_args()
    from kv_transition.provenance import git_commit

    if arguments.figures:
        found = json.loads(arguments.figures.read_text(encoding="utf-8"))
    else:
        found = measure(arguments.entries, arguments.steps)
        found |= {"date": time.strftime("%Y-%m-%d"), "commit": git_commit()}
    if arguments.render:
        put(arguments.render, "steps", rendered(found))
    text = json.dumps(found, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
