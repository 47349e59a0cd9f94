"""The cost of observing policies, compared with decoding with the full cache: CPU time of one thread, or GPU time.

    python benchmarks/observation.py [--length 4096] [--steps 64] [--device cpu] [--output FILE.json]

A model of 8 layers and 512 channels with random weights decodes greedily from one prompt: first alone, then while seven
policies are observed under four budgets in both memories, once with global sets and once with one set for each KV head.
The cost is `added`: the additional time as a share of plain decoding. It has a part for each prompt (`begin`: the
scores of policies that act once) and a part for each step. `policies` has each policy's own share, for begin and
predictions alone. Runs alternate, and the fastest of each kind counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

POLICIES = ("streaming_llm", "h2o", "h2o_heavy", "snapkv", "knorm", "keydiff", "expected_attention")
BUDGETS = ("r0.1", "r0.2", "r0.3", "r0.5")
GRANULARITIES = ("global", "per_head")


def measure(length: int, steps: int, device: str, repeats: int) -> dict[str, Any]:
    import torch
    from workload import SIZES, VOCABULARY

    from kv_transition.budget import Budget
    from kv_transition.engines.local import LocalEngine
    from kv_transition.policies.catalog import create, hyper_parameters
    from kv_transition.run.decode import Answer, Setting, decode
    from kv_transition.studies.recall.ranking import Scores
    from kv_transition.studies.recall.run import follow, shadows_of

    torch.set_num_threads(1)
    size = next(size for size in SIZES if (size.layers, size.hidden) == (8, 512))
    with tempfile.TemporaryDirectory() as folder:
        size.save(Path(folder))
        engine = LocalEngine.from_pretrained(folder, device=device)
    prompt = torch.randint(1, VOCABULARY, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    state = engine.extend(None, prompt)
    full = Setting(create("full", {}), Budget.parse("r1"), "after_prompt", first_token="full")

    def clocked(run) -> float:
        started = engine.clock()
        run()
        return engine.clock() - started

    def shadows(granularity: str):
        spec = {
            "policies": {kind: {"kind": kind, "hyper_parameters": hyper_parameters(kind)} for kind in POLICIES},
            "budgets": BUDGETS,
            "granularities": [granularity],
            "memories": ["ideal", "irreversible"],
        }
        return shadows_of(spec, 0)

    @torch.inference_mode()
    def alone(followed) -> dict[str, float]:
        """Return the seconds of each policy's begin and of its predictions, times the steps."""
        seconds = dict.fromkeys(POLICIES, 0.0)
        prompt, now = Scores(state), Scores(state)
        for each in followed:
            seconds[each.name] += clocked(lambda each=each: each.begin(prompt))
            seconds[each.name] += steps * clocked(lambda each=each: each.predict(now))
        return seconds

    @torch.inference_mode()
    def begin(followed) -> None:
        prompt = Scores(state)
        for each in followed:
            each.begin(prompt)

    follow(engine, state, shadows("global"), 2)  # what a first call loads is no part of it
    plain, beginning, observed, own = [], {}, {}, {}
    for _ in range(repeats):
        plain.append(clocked(lambda: [*decode(engine, [state], full, [Answer(0, steps)])]))
        for granularity in GRANULARITIES:
            followed = shadows(granularity)
            seconds = clocked(lambda followed=followed: follow(engine, state, followed, steps))
            observed.setdefault(granularity, []).append(seconds)
            fresh = shadows(granularity)
            beginning.setdefault(granularity, []).append(clocked(lambda fresh=fresh: begin(fresh)))
            own.setdefault(granularity, []).append(alone(shadows(granularity)))
    # plain decoding does not read its last token
    base = min(plain) / (steps - 1) * steps
    found: dict[str, Any] = {
        "model": size.name, "length": length, "steps": steps, "device": engine.device_name,
        "plain_step_ms": 1000 * base / steps,
    }  # fmt: skip
    for granularity in GRANULARITIES:
        added = min(observed[granularity]) - base
        once = min(beginning[granularity])
        found[granularity] = {
            "added": added / base,
            "added_each_step": (added - once) / base,
            "begin_ms": 1000 * once,
            "policies": {kind: min(run[kind] for run in own[granularity]) / base for kind in POLICIES},
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments.length, arguments.steps, arguments.device, arguments.repeats)
    text = json.dumps(found | {"date": time.strftime("%Y-%m-%d")}, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
