"""The columns of the tables of conversations."""

from __future__ import annotations

import pyarrow as pa

from kv_transition.tables import ESTIMATE, FLOAT, INT, TESTED, TEXT

# Conversations as they are played, from any source: the system message before the first turn (null: none), and a JSON
# list of the user's turns, {"content", "checks": those in force at this turn}. `dropped_assistant`: number of assistant
# turns in the source, which are dropped because the model gives its own answers. `meta` is a JSON object.
CONVERSATIONS = pa.schema(
    {
        "chat_set": TEXT,
        "conversation_id": TEXT,
        "system": TEXT,
        "turns": TEXT,
        "n_turns": INT,
        "dropped_assistant": INT,
        "meta": TEXT,
    }
)

# An answer in a conversation; turns count from 1. `prompt_tokens`: tokens read in this turn, without the answer's own;
# `tokens_seen`: tokens read so far, evicted ones included. Entries per KV head and bytes of the evictable layers before
# and after the compression that ends the turn; total_bytes_after: of all layers; full_bytes: of a full cache.
# `repetition`: share of the answer's 4-grams of tokens that occurred in it before; `answer_nll`: nats per token of the
# answer under the full cache of the same conversation. `checks`: a JSON list of the checks in force at this turn.
CHAT = pa.schema(
    {
        "chat_set": TEXT,
        "conversation_id": TEXT,
        "turn": INT,
        "policy": TEXT,
        "budget": TEXT,
        "user": TEXT,
        "text": TEXT,
        "finish_reason": TEXT,
        "prompt_tokens": INT,
        "completion_tokens": INT,
        "tokens_seen": INT,
        "budget_entries": INT,
        "entries_before": FLOAT,
        "entries_after": FLOAT,
        "bytes_before": INT,
        "bytes_after": INT,
        "total_bytes_after": INT,
        "full_bytes": INT,
        "read_s": FLOAT,
        "decode_s": FLOAT,
        "compress_s": FLOAT,
        "ttft_s": FLOAT,
        "peak_mem_mb": FLOAT,
        "checks": TEXT,
        "repetition": FLOAT,
        "answer_nll": FLOAT,
        "raw": TEXT,
        "error": TEXT,
        "chat_hash": TEXT,
    }
)

# The anatomy of the cache before and after the compression that ends a turn (`when`), one row per layer. `kind`: full,
# or sliding (its window limits it). entries: per KV head, mean over the heads; bytes of keys and values.
CHAT_LAYERS = pa.schema(
    {
        "chat_set": TEXT,
        "conversation_id": TEXT,
        "turn": INT,
        "policy": TEXT,
        "budget": TEXT,
        "layer": INT,
        "kind": TEXT,
        "when": TEXT,
        "kv_heads": INT,
        "entries": FLOAT,
        "head_dim": INT,
        "dtype": TEXT,
        "bytes": INT,
        "bytes_per_token": FLOAT,
    }
)

# An instruction at a turn at which it is in force, and whether the answer follows it. `rule`: null if there is no
# answer. `judge`: null if the judge was not asked or gave no verdict; `judge_error` is then the reason. `age`: turns
# since it was given. `standing`: meant for more than that turn. `overrides`, `overridden_by`: the check that it
# replaces, or that replaces it. `chance` (full cache only): share of the answers at this turn of conversations without
# the instruction that follow it.
_CHAT_KEY = {"chat_set": TEXT, "conversation_id": TEXT, "turn": INT, "policy": TEXT, "budget": TEXT}
CHAT_VERDICTS = pa.schema(
    {
        **_CHAT_KEY,
        "check_id": TEXT,
        "kind": TEXT,
        "asks": TEXT,
        "standing": pa.bool_(),
        "since": INT,
        "age": INT,
        "overrides": TEXT,
        "overridden_by": TEXT,
        "rule": pa.bool_(),
        "judge": pa.bool_(),
        "judge_reason": TEXT,
        "judge_error": TEXT,
        "chance": FLOAT,
    }
)

# The judge's result for each instruction: a verdict with its reason, or an error.
JUDGE = pa.schema(
    {
        **_CHAT_KEY,
        "check_id": TEXT,
        "judge": pa.bool_(),
        "judge_reason": TEXT,
        "judge_error": TEXT,
    }
)

# A statistic of conversations under one policy and budget (null: all of them), by rule or by judge (`by`, null if
# neither applies), at a turn, or at a number of turns after a conflict (`age`). n: number of verdicts, answers or
# pairs; clusters: number of conversations. Differences have the reference that is subtracted.
RETENTION = pa.schema(
    {
        "chat_set": TEXT,
        "policy": TEXT,
        "budget": TEXT,
        "statistic": TEXT,
        "by": TEXT,
        "turn": INT,
        "age": INT,
        **ESTIMATE,
        "reference_policy": TEXT,
        "reference_budget": TEXT,
        **TESTED,
    }
)

# Table 1 of the memory study, one number per row: retention and cost of a policy and budget, over all turns.
MEMORY_TABLE = pa.schema({"chat_set": TEXT, "policy": TEXT, "budget": TEXT, "statistic": TEXT, **ESTIMATE})

# The cache before and after the compression that ends a turn: means per layer of each shape, over the conversations.
CACHE_ANATOMY = pa.schema(
    {
        "chat_set": TEXT,
        "policy": TEXT,
        "budget": TEXT,
        "turn": INT,
        "when": TEXT,
        "kind": TEXT,
        "kv_heads": INT,
        "head_dim": INT,
        "dtype": TEXT,
        "layers": INT,
        "bytes_per_token": FLOAT,
        "statistic": TEXT,
        **ESTIMATE,
    }
)
