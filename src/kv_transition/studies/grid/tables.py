"""The columns of the tables of the grid: answers, scores, estimates."""

from __future__ import annotations

import pyarrow as pa

from kv_transition.tables import CELL_KEY, ESTIMATE, FLOAT, INT, RATIO, TESTED, TEXT, TEXTS

# An answer. Columns ending in _s: seconds. Columns ending in _bytes: bytes of the cache's tensors. kept_* and full_*:
# entries per KV head of the policy's cache and of a full cache, as mean over the `steps` or at the last step. Null: the
# machine cannot measure the value.
CELLS = pa.schema(
    {
        "task": TEXT,
        "example_id": TEXT,
        "bin": INT,
        "mode": TEXT,
        "policy": TEXT,
        "budget": TEXT,
        "repeat": INT,
        "prompt_sha256": TEXT,
        "text": TEXT,
        "finish_reason": TEXT,
        "prompt_tokens": INT,
        "completion_tokens": INT,
        "budget_entries": INT,
        "protected": INT,
        "kept_final": FLOAT,
        "kept_mean": FLOAT,
        "full_mean": FLOAT,
        "full_final": FLOAT,
        "steps": INT,
        "cache_bytes": INT,
        "total_bytes": INT,
        "full_bytes": INT,
        "load_s": FLOAT,
        "prefill_s": FLOAT,
        "compress_s": FLOAT,
        "ttft_s": FLOAT,
        "decode_s": FLOAT,
        "latency_s": FLOAT,
        "batch_size": INT,
        "co_running": pa.bool_(),
        "peak_mem_mb": FLOAT,
        "engine": TEXT,
        "base_url": TEXT,
        "raw": TEXT,
        "error": TEXT,
        "cell_hash": TEXT,
    }
)

# An answer with its scores. `metric`: name of the task's own metric, whose value is `score`. em and contains are
# metrics of this project.
SCORES = pa.schema(
    [
        *CELLS,
        pa.field("token_len", INT),
        pa.field("question", TEXT),
        pa.field("answers", TEXTS),
        pa.field("meta", TEXT),
        pa.field("metric", TEXT),
        pa.field("score", FLOAT),
        pa.field("em", FLOAT),
        pa.field("f1", FLOAT),
        pa.field("contains", FLOAT),
        pa.field("pred_norm", TEXT),
        pa.field("gold_norm", TEXT),
        pa.field("failure", TEXT),
        pa.field("alias", pa.bool_()),
        # Hash of the document, which examples may share; null: each example has its own document.
        pa.field("cluster", TEXT),
    ]
)

# A statistic of one cell: score, em, f1, contains, failure_rate, score_std, latency_p50, ...
BIN_STATS = pa.schema(
    {**CELL_KEY, "token_min": INT, "token_max": INT, "token_mean": FLOAT, "statistic": TEXT, **ESTIMATE}
)

# A paired difference from `reference_policy` at `reference_budget` on the same examples: comparisons.parquet (from the
# full cache) and pairs.parquet (from another policy). `effect`: share of the examples that are better minus share that
# are worse; `effect_p`: p-value of the hypothesis that it is 0. `holm_low`, `holm_high`: the interval that excludes 0
# exactly if p_holm is below 1 - confidence. `mdd`: the true difference that such a test detects with a power of 80 %.
# `n_decides`: about how many examples would show the observed difference.
COMPARISONS = pa.schema(
    {
        **CELL_KEY,
        "statistic": TEXT,
        "reference_policy": TEXT,
        "reference_budget": TEXT,
        **ESTIMATE,
        **TESTED,
        "holm_low": FLOAT,
        "holm_high": FLOAT,
        "effect": FLOAT,
        "effect_low": FLOAT,
        "effect_high": FLOAT,
        "effect_p": FLOAT,
        "mdd": FLOAT,
        "n_decides": INT,
    }
)

# A test whether a policy keeps the share `kept` of the full cache's score. `estimate`: mean of score - kept * full
# score. `n_needed`: the smallest number of examples with which the test can succeed. `n_decides`: about how many
# examples would decide if the observed mean were the true one; null if less than `kept` was observed. `ratio_holm_low`:
# the lower bound of the ratio; it is above `kept` exactly if p_holm shows non-inferiority.
NONINFERIORITY = pa.schema(
    {
        **CELL_KEY,
        "kept": FLOAT,
        **ESTIMATE,
        **RATIO,
        "ratio_holm_low": FLOAT,
        **TESTED,
        "non_inferior": pa.bool_(),
        "n_needed": INT,
        "n_decides": INT,
    }
)

# The smallest budget that passes that test together with all larger budgets. The ratio is the one at this budget, or at
# the largest tested budget if none passes.
SMALLEST_BUDGET = pa.schema(
    {
        "task": TEXT,
        "mode": TEXT,
        "policy": TEXT,
        "bin": INT,
        "kept": FLOAT,
        "budget": TEXT,
        "budget_unadjusted": TEXT,
        "tested": TEXTS,
        **RATIO,
        "n": INT,
        "clusters": INT,
        "method": TEXT,
        "reason": TEXT,
    }
)

# One row per (task, mode, policy, budget): the bins in which answers become unreliable along the length. `onset_bin`,
# `collapse_bin`: null if there is none. `detector`: "definition" or "zscore". `outcome`: a word of analysis/scale.py
# (null for zscore), which begins at `since_bin`. `n_decides`: about how many examples would decide an undecided
# outcome. `kept_low`, `kept_high`: the interval of the score kept that agrees with the outcome, after Holm. `details`:
# a JSON object.
TRANSITION = pa.schema(
    {
        "task": TEXT,
        "mode": TEXT,
        "policy": TEXT,
        "budget": TEXT,
        "detector": TEXT,
        "outcome": TEXT,
        "since_bin": INT,
        "n_decides": INT,
        "kept_low": FLOAT,
        "kept_high": FLOAT,
        "onset_bin": INT,
        "collapse_bin": INT,
        "onset_probability": FLOAT,
        "collapse_probability": FLOAT,
        "n": INT,
        "method": TEXT,
        "reason": TEXT,
        "details": TEXT,
        "sentence": TEXT,
    }
)

# The same along the budgets of one kind ("r": shares, "t": tokens) within a bin, from large to small.
BUDGET_TRANSITION = pa.schema(
    {
        "task": TEXT,
        "mode": TEXT,
        "policy": TEXT,
        "bin": INT,
        "kind": TEXT,
        "detector": TEXT,
        "outcome": TEXT,
        "since_budget": TEXT,
        "n_decides": INT,
        "kept_low": FLOAT,
        "kept_high": FLOAT,
        "onset_budget": TEXT,
        "collapse_budget": TEXT,
        "onset_probability": FLOAT,
        "collapse_probability": FLOAT,
        "n": INT,
        "method": TEXT,
        "reason": TEXT,
        "details": TEXT,
        "sentence": TEXT,
    }
)

# A decision of one look of adaptive allocation: how many examples a bin gets next, with the reason.
ALLOCATION = pa.schema(
    {
        "task": TEXT,
        "bin": INT,
        "look": INT,
        "n": INT,
        "available": INT,
        "wanted": INT,
        "alpha_spent": FLOAT,
        "confidence": FLOAT,
        "reason": TEXT,
    }
)
