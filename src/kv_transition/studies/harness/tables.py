"""The columns of the tables of lm-evaluation-harness's tasks."""

from __future__ import annotations

import pyarrow as pa

from kv_transition.tables import FLOAT, INT, TESTED, TEXT

_METRIC = {"task": TEXT, "metric": TEXT, "filter": TEXT}

# A document of a task under one metric and filter of the harness. `value` is null if the metric has no number for a
# single document (perplexities). `response` is the harness's own, after the filter, as JSON.
DOCUMENTS = pa.schema(
    {
        **_METRIC,
        "mode": TEXT,
        "policy": TEXT,
        "budget": TEXT,
        "doc_id": INT,
        "doc_hash": TEXT,
        "value": FLOAT,
        "target": TEXT,
        "response": TEXT,
        "harness_hash": TEXT,
    }
)

# A task, metric and filter under a policy, budget and mode (null: the full cache, which is the same in every mode).
# `score` and `stderr` are the harness's own over `n` documents; `difference` is the mean of the policy's values minus
# those of the full cache over the `paired` documents that both have.
HARNESS = pa.schema(
    {
        **_METRIC,
        "mode": TEXT,
        "policy": TEXT,
        "budget": TEXT,
        "higher_is_better": pa.bool_(),
        "score": FLOAT,
        "stderr": FLOAT,
        "n": INT,
        "difference": FLOAT,
        "difference_low": FLOAT,
        "difference_high": FLOAT,
        "paired": INT,
        "method": TEXT,
        **TESTED,
    }
)
