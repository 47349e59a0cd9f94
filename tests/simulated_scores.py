"""A seeded replacement for scores.parquet: F1-like answers with a known true value for every cell."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pyarrow as pa

from kv_transition.studies.grid.tables import SCORES

LENGTHS = (256, 512, 1024, 2048, 4096)
MODES = ("before_question", "after_prompt")
POLICIES = ("random", "streaming_llm", "h2o", "snapkv", "tova")
BUDGETS = ("r0.5", "r0.2")


def cell_rows(
    scores: np.ndarray,
    failures: np.ndarray,
    *,
    task: str = "reader_qa",
    mode: str = "after_prompt",
    policy: str = "full",
    budget: str = "r1",
    bin: int = 0,
    length: int = 256,
    timed: bool = True,
    seed: int = 0,
    per_document: int = 1,
) -> list[dict]:
    """Return the rows of one cell from ``scores [examples, repeats]`` and ``failures`` of the same shape (True if
    failed).

    ``per_document`` consecutive examples share a document.
    """
    rng = np.random.default_rng(seed + 1000 * bin)
    share = 1.0 if budget[0] == "r" and budget[1:] == "1" else float(budget[1:]) if budget[0] == "r" else 0.1
    rows = []
    for i in range(scores.shape[0]):
        tokens = int(length + rng.integers(-15, 16))
        for repeat in range(scores.shape[1]):
            seconds = tokens * 2e-5 * (0.6 + 0.4 * share) * float(rng.lognormal(0, 0.1))
            score, failed = float(scores[i, repeat]), bool(failures[i, repeat])
            rows.append(
                {
                    "task": task,
                    "example_id": f"{task}-{bin}-{i}",
                    "bin": bin,
                    "mode": mode,
                    "policy": policy,
                    "budget": budget,
                    "repeat": repeat,
                    "prompt_tokens": tokens,
                    "completion_tokens": 4,
                    "kept_final": share * tokens,
                    "kept_mean": share * tokens,
                    "cache_bytes": int(share * tokens * 2048),
                    "full_bytes": tokens * 2048,
                    "prefill_s": seconds,
                    "compress_s": seconds * 0.05,
                    "ttft_s": seconds * 1.05,
                    "decode_s": 0.01 + seconds * 0.2,
                    "latency_s": 0.01 + seconds * 1.25,
                    "batch_size": 1,
                    "co_running": not timed,
                    "peak_mem_mb": 310 + tokens / 100,
                    "engine": "local",
                    "token_len": tokens,
                    "question": "Where does Mara Voss work ?",
                    "answers": ["Org Name"],
                    "meta": json.dumps({"kind": "one_hop"}),
                    "metric": "qa_f1",
                    "score": 0.0 if failed else score,
                    "em": float(score == 1 and not failed),
                    "f1": 0.0 if failed else score,
                    "contains": float(score == 1 and not failed),
                    "failure": ("EMPTY_OUTPUT", "DEGENERATE", "TRUNCATED")[i % 3] if failed else None,
                    "alias": False,
                    "cluster": f"document-{bin}-{i // per_document}" if per_document > 1 else None,
                }
            )
    return rows


def table(rows: list[dict]) -> pa.Table:
    return pa.Table.from_pylist([{name: row.get(name) for name in SCORES.names} for row in rows], schema=SCORES)


def _key_seed(*parts: object) -> int:
    return int(hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:8], 16)


def demo(n: int = 20, timed: bool = True) -> pa.Table:
    """Return 2 modes x (full + 5 policies x 2 budgets) x 5 bins x n examples, in the form of the tiny reader's
    results."""
    rows = []
    for mode in MODES:
        for policy, budget in [("full", "r1")] + [(p, b) for p in POLICIES for b in BUDGETS]:
            for b, length in enumerate(LENGTHS):
                rng = np.random.default_rng(_key_seed(mode, policy, budget, b))
                right = _truth(mode, policy, budget, b)
                u = rng.random((n, 1))
                scores = np.where(u < right, 1.0, np.where(u < right + 0.1, rng.choice([0.4, 0.5, 0.67], (n, 1)), 0.0))
                failures = (scores == 0) & (rng.random((n, 1)) < (0.5 if policy != "full" else 0.0))
                rows += cell_rows(
                    scores, failures, mode=mode, policy=policy, budget=budget, bin=b, length=length, timed=timed
                )
    return table(rows)


def _truth(mode: str, policy: str, budget: str, b: int) -> float:
    """Return the probability of a right answer."""
    if policy == "full":
        return 0.98
    kept = {"random": 0.3, "streaming_llm": 0.6, "h2o": 0.75, "snapkv": 0.98, "tova": 0.95}[policy]
    decline = {"random": 0.03, "streaming_llm": 0.1, "h2o": 0.08, "snapkv": 0.0, "tova": 0.19}[policy]
    if mode == "before_question":
        kept, decline = kept * 0.5, decline * 0.5
    if budget == "r0.5":
        kept, decline = min(1.0, kept + 0.2), decline / 2
    return max(0.02, kept - decline * b)
