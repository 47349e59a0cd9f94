"""The columns of the tables of the recall study."""

from __future__ import annotations

import pyarrow as pa

from kv_transition.tables import FLOAT, INT, TEXT

# The entries that a policy would hold and that a step needed: a row for each sequence (example_id, prompt_kind), step,
# policy, budget, granularity and memory. cluster: the context, which examples may share. Entropies are in nats. n:
# entries before the step's token; k: how many of them may be held. recall: share of the k gold entries that are held;
# gold_new: share that was not gold at the previous step; gold_mass_kept: share of the attention of the n entries that
# the held ones receive. Gaps: KL divergence of the next-token distribution from the full cache's, with only the held
# entries, and without the gold entries.
_SET_KEY = {"policy": TEXT, "budget": TEXT, "granularity": TEXT, "memory": TEXT}
_SEQUENCE_KEY = {"task": TEXT, "bin": INT, "example_id": TEXT, "prompt_kind": TEXT}
OBSERVATIONS = pa.schema(
    {
        **_SEQUENCE_KEY,
        "cluster": TEXT,
        **_SET_KEY,
        "step": INT,
        "token_id": INT,
        "entropy": FLOAT,
        "n": INT,
        "k": INT,
        "recall": FLOAT,
        "gold_mass_kept": FLOAT,
        "gold_new": FLOAT,
        "entropy_gap": FLOAT,
        "entropy_gap_gold": FLOAT,
    }
)

# Means over a sequence's steps in each evictable layer (0: the lowest), with granularity per_head.
OBSERVATION_LAYERS = pa.schema(
    {
        **_SEQUENCE_KEY,
        "policy": TEXT,
        "budget": TEXT,
        "memory": TEXT,
        "layer": INT,
        "steps": INT,
        "recall": FLOAT,
        "gold_mass_kept": FLOAT,
    }
)

# Plausibility checks: a row for each policy, budget, granularity and memory of a task. Numbers of sequences with recall
# 0 (1) at every step, with gold entries that never change, and with missing steps; number of steps with an entropy
# outside [0, log V]. `concern`: the findings as a sentence, null if there are none.
OBSERVATION_CHECKS = pa.schema(
    {
        "task": TEXT,
        **_SET_KEY,
        "sequences": INT,
        "steps": INT,
        "recall_always_0": INT,
        "recall_always_1": INT,
        "gold_never_changes": INT,
        "steps_missing": INT,
        "entropy_outside": INT,
        "concern": TEXT,
    }
)

# The association of entropy and recall, one statistic per row. n: number of examples; `clusters`: number of their
# contexts; `steps`: number of their steps. Rows of `verdict` and `verdict_controlled` have an outcome and its reason;
# rows without a budget are over all budgets.
ENTROPY_RECALL = pa.schema(
    {
        "task": TEXT,
        "policy": TEXT,
        "budget": TEXT,
        "granularity": TEXT,
        "memory": TEXT,
        "statistic": TEXT,
        "estimate": FLOAT,
        "ci_low": FLOAT,
        "ci_high": FLOAT,
        "n": INT,
        "clusters": INT,
        "steps": INT,
        "method": TEXT,
        "p_value": FLOAT,
        "p_holm": FLOAT,
        "family": TEXT,
        "outcome": TEXT,
        "reason": TEXT,
    }
)
