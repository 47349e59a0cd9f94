"""The columns of the tables of the recall study."""

from __future__ import annotations

import pyarrow as pa

from kv_transition.tables import FLOAT, INT, TEXT

# The entries that a policy would hold and that a step needed: a row for each sequence (example_id, prompt_kind),
# step, policy, budget, granularity and memory. cluster: the context, which examples may share. Nats; n entries before
# the step's token, of which k may be held. Shares of those k (recall; gold_new: not gold at the step before) and of the
# attention that the n receive (gold_mass_kept). Gaps: KL of the next token's distribution by what is held alone, and
# without the gold entries, from the full cache's.
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

# Means over a sequence's steps in each evictable layer (0: the lowest of them), granularity per_head.
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

# What a reviewer would look for, each row one policy, budget, granularity and memory of a task: how many sequences have
# recall 0 (1) at every step, gold entries that never change, steps missing; how many steps an entropy outside
# [0, log V]. `concern` says it in words, null where there is none.
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

# How entropy and recall go together, a statistic a row. n counts examples, `clusters` the contexts that they are about,
# `steps` their steps. Rows of `verdict` and `verdict_controlled` have an outcome and its reason; rows without a budget
# are over all budgets.
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
