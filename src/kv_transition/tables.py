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
    ]
)

_ESTIMATE = {"estimate": _FLOAT, "ci_low": _FLOAT, "ci_high": _FLOAT, "n": _INT, "method": _TEXT}
_CELL_KEY = {"task": _TEXT, "mode": _TEXT, "policy": _TEXT, "budget": _TEXT, "bin": _INT}

# A statistic of one cell: score, em, f1, contains, failure_rate, score_std, latency_p50, ...
BIN_STATS = pa.schema(
    {**_CELL_KEY, "token_min": _INT, "token_max": _INT, "token_mean": _FLOAT, "statistic": _TEXT, **_ESTIMATE}
)

# A paired difference against `reference_policy` at `reference_budget` on the same examples.
COMPARISONS = pa.schema(
    {
        **_CELL_KEY,
        "statistic": _TEXT,
        "reference_policy": _TEXT,
        "reference_budget": _TEXT,
        **_ESTIMATE,
        "p_value": _FLOAT,
        "p_holm": _FLOAT,
        "family": _TEXT,
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
    }
)
