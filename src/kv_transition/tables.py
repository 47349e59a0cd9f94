"""The columns of every table that is written to disk."""

from __future__ import annotations

import pyarrow as pa

_TEXT, _TEXTS, _INT, _INTS, _FLOAT = pa.string(), pa.list_(pa.string()), pa.int64(), pa.list_(pa.int32()), pa.float64()

# An example as its source gives it, whatever the source. `meta` is a JSON object.
SOURCE = pa.schema(
    {
        "task": _TEXT,
        "example_id": _TEXT,
        "question": _TEXT,
        "context": _TEXT,
        "answers": _TEXTS,
        "all_classes": _TEXTS,
        "meta": _TEXT,
    }
)

# token_len: tokens of the whole prompt before truncation; prompt_len: as fed to the model.
EXAMPLES = pa.schema([*SOURCE, pa.field("token_len", _INT), pa.field("prompt_len", _INT)])

# A chosen example, ready to run: the prompt in its two segments, as text and as token ids.
BIN = pa.schema(
    [
        *EXAMPLES.remove(EXAMPLES.get_field_index("context")),
        pa.field("bin", _INT),
        pa.field("prompt_sha256", _TEXT),
        pa.field("context_text", _TEXT),
        pa.field("question_text", _TEXT),
        pa.field("context_ids", _INTS),
        pa.field("question_ids", _INTS),
        pa.field("max_new_tokens", _INT),
    ]
)

# An answer. Seconds; bytes of the cache's tensors; entries per KV head; null where a machine cannot measure.
CELLS = pa.schema(
    {
        "task": _TEXT,
        "example_id": _TEXT,
        "bin": _INT,
        "mode": _TEXT,
        "policy": _TEXT,
        "budget": _TEXT,
        "repeat": _INT,
        "prompt_sha256": _TEXT,
        "text": _TEXT,
        "finish_reason": _TEXT,
        "prompt_tokens": _INT,
        "completion_tokens": _INT,
        "budget_entries": _INT,
        "protected": _INT,
        "kept_final": _FLOAT,
        "kept_mean": _FLOAT,
        "cache_bytes": _INT,
        "total_bytes": _INT,
        "full_bytes": _INT,
        "load_s": _FLOAT,
        "prefill_s": _FLOAT,
        "compress_s": _FLOAT,
        "ttft_s": _FLOAT,
        "decode_s": _FLOAT,
        "latency_s": _FLOAT,
        "batch_size": _INT,
        "co_running": pa.bool_(),
        "peak_mem_mb": _FLOAT,
        "engine": _TEXT,
        "base_url": _TEXT,
        "raw": _TEXT,
        "error": _TEXT,
        "cell_hash": _TEXT,
    }
)

# What a policy would hold and what a step of the full cache needed: a row for each sequence (example_id, prompt_kind),
# step, policy, budget, granularity and memory. Nats; n entries before the step's token, of which k may be held. Shares
# of those k (recall; gold_new: not gold at the step before) and of the attention that the n receive (gold_mass_kept).
# Gaps: KL of the next token's distribution by what is held alone, and without the gold entries, from the full cache's.
_SET_KEY = {"policy": _TEXT, "budget": _TEXT, "granularity": _TEXT, "memory": _TEXT}
_SEQUENCE_KEY = {"task": _TEXT, "bin": _INT, "example_id": _TEXT, "prompt_kind": _TEXT}
OBSERVATIONS = pa.schema(
    {
        **_SEQUENCE_KEY,
        **_SET_KEY,
        "step": _INT,
        "token_id": _INT,
        "entropy": _FLOAT,
        "n": _INT,
        "k": _INT,
        "recall": _FLOAT,
        "gold_mass_kept": _FLOAT,
        "gold_new": _FLOAT,
        "entropy_gap": _FLOAT,
        "entropy_gap_gold": _FLOAT,
    }
)

# Means over a sequence's steps in each evictable layer (0: the lowest of them), granularity per_head.
OBSERVATION_LAYERS = pa.schema(
    {
        **_SEQUENCE_KEY,
        "policy": _TEXT,
        "budget": _TEXT,
        "memory": _TEXT,
        "layer": _INT,
        "steps": _INT,
        "recall": _FLOAT,
        "gold_mass_kept": _FLOAT,
    }
)

# What a reviewer would look for, each row one policy, budget, granularity and memory of a task: how many sequences have
# recall 0 (1) at every step, gold entries that never change, steps missing; how many steps an entropy outside
# [0, log V]. `concern` says it in words, null where there is none.
OBSERVATION_CHECKS = pa.schema(
    {
        "task": _TEXT,
        **_SET_KEY,
        "sequences": _INT,
        "steps": _INT,
        "recall_always_0": _INT,
        "recall_always_1": _INT,
        "gold_never_changes": _INT,
        "steps_missing": _INT,
        "entropy_outside": _INT,
        "concern": _TEXT,
    }
)

# An answer and what it is worth. `metric` names what `score` is for the task; em and contains are ours.
SCORES = pa.schema(
    [
        *CELLS,
        pa.field("token_len", _INT),
        pa.field("question", _TEXT),
        pa.field("answers", _TEXTS),
        pa.field("meta", _TEXT),
        pa.field("metric", _TEXT),
        pa.field("score", _FLOAT),
        pa.field("em", _FLOAT),
        pa.field("f1", _FLOAT),
        pa.field("contains", _FLOAT),
        pa.field("pred_norm", _TEXT),
        pa.field("gold_norm", _TEXT),
        pa.field("failure", _TEXT),
        pa.field("alias", pa.bool_()),
        # The document that examples share; null: each has its own.
        pa.field("cluster", _TEXT),
    ]
)

# n counts examples, clusters the documents that they share: as many, where each has its own.
_ESTIMATE = {"estimate": _FLOAT, "ci_low": _FLOAT, "ci_high": _FLOAT, "n": _INT, "method": _TEXT, "clusters": _INT}
_CELL_KEY = {"task": _TEXT, "mode": _TEXT, "policy": _TEXT, "budget": _TEXT, "bin": _INT}
_TESTED = {"p_value": _FLOAT, "p_holm": _FLOAT, "family": _TEXT}
_RATIO = {"ratio": _FLOAT, "ratio_low": _FLOAT, "ratio_high": _FLOAT}

# A statistic of one cell: score, em, f1, contains, failure_rate, score_std, latency_p50, ...
BIN_STATS = pa.schema(
    {**_CELL_KEY, "token_min": _INT, "token_max": _INT, "token_mean": _FLOAT, "statistic": _TEXT, **_ESTIMATE}
)

# A paired difference against `reference_policy` at `reference_budget` on the same examples: comparisons.parquet (from
# the full cache) and pairs.parquet (from another policy). `effect`: share of the examples that are better minus share
# that are worse; `mdd`: the true difference that such a test finds with a power of 80 %.
COMPARISONS = pa.schema(
    {
        **_CELL_KEY,
        "statistic": _TEXT,
        "reference_policy": _TEXT,
        "reference_budget": _TEXT,
        **_ESTIMATE,
        **_TESTED,
        "effect": _FLOAT,
        "effect_low": _FLOAT,
        "effect_high": _FLOAT,
        "mdd": _FLOAT,
    }
)

# A test whether a policy keeps the share `kept` of the full cache's score: `estimate` is the mean of
# score - kept * full score, `n_needed` the fewest examples with which the test can succeed at all.
NONINFERIORITY = pa.schema(
    {
        **_CELL_KEY,
        "kept": _FLOAT,
        **_ESTIMATE,
        **_RATIO,
        **_TESTED,
        "non_inferior": pa.bool_(),
        "n_needed": _INT,
    }
)

# The smallest budget that passes that test together with all larger ones; the ratio is that at this budget, or at the
# largest one tested where none passes.
SMALLEST_BUDGET = pa.schema(
    {
        "task": _TEXT,
        "mode": _TEXT,
        "policy": _TEXT,
        "bin": _INT,
        "kept": _FLOAT,
        "budget": _TEXT,
        "budget_unadjusted": _TEXT,
        "tested": _TEXTS,
        **_RATIO,
        "n": _INT,
        "clusters": _INT,
        "method": _TEXT,
        "reason": _TEXT,
    }
)

# One row per (task, mode, policy, budget): where answers become unreliable along the length bins. Bins are null where
# there is none; `detector` is "definition" or "zscore"; `details` a JSON object.
TRANSITION = pa.schema(
    {
        "task": _TEXT,
        "mode": _TEXT,
        "policy": _TEXT,
        "budget": _TEXT,
        "detector": _TEXT,
        "outcome": _TEXT,
        "onset_bin": _INT,
        "collapse_bin": _INT,
        "onset_probability": _FLOAT,
        "collapse_probability": _FLOAT,
        "n": _INT,
        "method": _TEXT,
        "reason": _TEXT,
        "details": _TEXT,
        "sentence": _TEXT,
    }
)

# The same along the budgets of one kind ("r": shares, "t": tokens) within a bin, from large to small.
BUDGET_TRANSITION = pa.schema(
    {
        "task": _TEXT,
        "mode": _TEXT,
        "policy": _TEXT,
        "bin": _INT,
        "kind": _TEXT,
        "detector": _TEXT,
        "outcome": _TEXT,
        "onset_budget": _TEXT,
        "collapse_budget": _TEXT,
        "onset_probability": _FLOAT,
        "collapse_probability": _FLOAT,
        "n": _INT,
        "method": _TEXT,
        "reason": _TEXT,
        "details": _TEXT,
        "sentence": _TEXT,
    }
)

# A decision of one round of adaptive allocation: how many examples a bin gets next, and why.
ALLOCATION = pa.schema(
    {
        "task": _TEXT,
        "bin": _INT,
        "look": _INT,
        "n": _INT,
        "available": _INT,
        "wanted": _INT,
        "alpha_spent": _FLOAT,
        "confidence": _FLOAT,
        "reason": _TEXT,
    }
)

# How entropy and recall go together, a statistic a row. n counts examples, `steps` their steps. Rows of `verdict` and
# `verdict_controlled` have an outcome and its reason; rows without a budget are over all budgets.
ENTROPY_RECALL = pa.schema(
    {
        "task": _TEXT,
        "policy": _TEXT,
        "budget": _TEXT,
        "granularity": _TEXT,
        "memory": _TEXT,
        "statistic": _TEXT,
        "estimate": _FLOAT,
        "ci_low": _FLOAT,
        "ci_high": _FLOAT,
        "n": _INT,
        "steps": _INT,
        "method": _TEXT,
        "p_value": _FLOAT,
        "p_holm": _FLOAT,
        "family": _TEXT,
        "outcome": _TEXT,
        "reason": _TEXT,
    }
)
