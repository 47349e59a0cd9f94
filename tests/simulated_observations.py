"""Seeded replacements for the observation files and for the scores of entropy_recall, with known true values."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa

from kv_transition.studies.grid.tables import SCORES
from kv_transition.studies.recall.tables import OBSERVATIONS

_FILE = Path(__file__).parents[1] / "benchmarks" / "simulated_steps.py"
_SPEC = importlib.util.spec_from_file_location("simulated_steps", _FILE)
simulated_steps = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = simulated_steps
_SPEC.loader.exec_module(simulated_steps)


def rows_of(steps, **key) -> list[dict]:
    """Return the rows of one cell from its steps (analysis.observations.Steps)."""
    cell = {"task": "reader_qa", "policy": "h2o", "budget": "r0.2", "granularity": "global", "memory": "ideal"} | key
    return [
        {
            **cell,
            "bin": 0,
            "example_id": steps.examples[steps.example[i]],
            "prompt_kind": steps.kinds[steps.kind[i]],
            "step": int(steps.step[i]),
            "token_id": 1,
            "entropy": float(steps.entropy[i]),
            "n": int(steps.length[i]),
            "k": 10,
            "recall": float(steps.recall[i]),
        }
        for i in range(len(steps))
    ]


def table(rows: list[dict]) -> pa.Table:
    return pa.Table.from_pylist([{name: row.get(name) for name in OBSERVATIONS.names} for row in rows], OBSERVATIONS)


def observed(n: int = 24, steps: int = 16, seed: int = 0) -> pa.Table:
    """Return h2o at four budgets and snapkv at two on the same steps. Recall falls with entropy, faster at small
    budgets."""
    rng = np.random.default_rng(seed)
    base = simulated_steps.driven(rng, n, steps)
    rows = []
    for policy, budgets in (("h2o", (0.1, 0.2, 0.3, 0.5)), ("snapkv", (0.1, 0.5))):
        for r in budgets:
            noise = rng.normal(0, 0.05, len(base))
            recall = np.clip(0.97 - (1 - r) * 0.2 * base.entropy + noise, 0, 1)
            changed = simulated_steps.Steps(**{**vars(base), "recall": recall})
            for granularity, memory in (("global", "ideal"), ("per_head", "irreversible")):
                rows += rows_of(changed, policy=policy, budget=f"r{r}", granularity=granularity, memory=memory)
    return table(rows)


POLICIES = {
    "full": {},
    "h2o": {},
    "entropy_recall": {"tau": 1.0},
    "at_random": {"kind": "entropy_recall", "moments": "random", "like": "entropy_recall"},
    "evenly": {"kind": "entropy_recall", "moments": "periodic", "like": "entropy_recall"},
    "never": {"kind": "entropy_recall", "moments": "never"},
    "always": {"kind": "entropy_recall", "moments": "always"},
}


def recalled_scores(gain: float, n: int = 40, seed: int = 0) -> pa.Table:
    """Return scores of those policies at two budgets; recall at high entropy makes an answer right more often by
    ``gain``."""
    rng = np.random.default_rng(seed)
    rates = {"full": 0.95, "h2o": 0.4, "entropy_recall": 0.5 + gain, "at_random": 0.5, "evenly": 0.5, "never": 0.4,
             "always": 0.9}  # fmt: skip
    share = {"entropy_recall": 0.2, "at_random": 0.2, "evenly": 0.2, "never": 0.0, "always": 1.0}
    rows = []
    for budget in ("r0.5", "r0.2"):
        luck = rng.random(n)  # the same for all policies, because an easy example is easy for all of them
        for policy, rate in rates.items():
            if policy == "full" and budget != "r0.5":
                continue
            for i in range(n):
                moved = int(share.get(policy, 0) * 2**20 * (1 + i % 3))
                counts = {"triggers": 3, "moments": [1, 4, 7], "moved_entries": moved // 64, "moved_bytes": moved,
                          "hot_bytes": 2**19, "total_bytes": 2**22}  # fmt: skip
                rows.append({
                    "task": "reader_qa", "example_id": f"e{i}", "bin": i % 2, "mode": "after_prompt", "policy": policy,
                    "budget": "r1" if policy == "full" else budget, "repeat": 0, "score": float(luck[i] < rate),
                    "em": float(luck[i] < rate), "f1": float(luck[i] < rate), "contains": float(luck[i] < rate),
                    "raw": json.dumps({"token_ids": [1, 2]} | (counts if policy in share else {})), "alias": False,
                    "batch_size": 1, "co_running": False, "token_len": 100, "cache_bytes": 2**19, "full_bytes": 2**22,
                    "prompt_tokens": 100, "completion_tokens": 4, "kept_mean": 10.0, "metric": "qa_f1",
                    "latency_s": 1.0, "ttft_s": 0.1, "decode_s": 0.5, "question": "?", "answers": ["a"], "meta": "{}",
                    "engine": "local",
                })  # fmt: skip
    return pa.Table.from_pylist([{name: row.get(name) for name in SCORES.names} for row in rows], SCORES)
