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

# A chosen example, ready to run: the prompt in its two segments, as text and as token ids. Without its chat template it
# is context_text from content_start on and question_text up to content_end; null: the two cannot be told apart.
BIN = pa.schema(
    [
        *EXAMPLES.remove(EXAMPLES.get_field_index("context")),
        pa.field("bin", _INT),
        pa.field("prompt_sha256", _TEXT),
        pa.field("context_text", _TEXT),
        pa.field("question_text", _TEXT),
        pa.field("content_start", _INT),
        pa.field("content_end", _INT),
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

# A window of a book: a context, and the tokens after it, of which the first is only fed and the last only scored.
# `window` counts the book's windows; the same scored tokens have the same number in each length bin. `context_start` is
# the place in the book of the context's first token.
_WINDOW = {
    "corpus": _TEXT,
    "book_id": _TEXT,
    "window": _INT,
    "bin": _INT,
    "context_start": _INT,
    "context_tokens": _INT,
}
WINDOW_KEY = tuple(_WINDOW)
WINDOWS = pa.schema({**_WINDOW, "prompt_sha256": _TEXT, "context_ids": _INTS, "target_ids": _INTS})

# A window scored. Nats over n_tokens tokens; seconds; bytes of the cache's tensors in the evictable layers (total: all
# layers) after the last token, of which full_bytes would be a full cache's; bytes_before and bytes_after the
# compression; entries per KV head. `raw`: what the policy says of itself, a JSON object.
PERPLEXITY = pa.schema(
    {
        **_WINDOW,
        "policy": _TEXT,
        "budget": _TEXT,
        "nll_sum": _FLOAT,
        "n_tokens": _INT,
        "budget_entries": _INT,
        "kept_final": _FLOAT,
        "kept_mean": _FLOAT,
        "bytes_before": _INT,
        "bytes_after": _INT,
        "cache_bytes": _INT,
        "total_bytes": _INT,
        "full_bytes": _INT,
        "prefill_s": _FLOAT,
        "compress_s": _FLOAT,
        "score_s": _FLOAT,
        "peak_mem_mb": _FLOAT,
        "raw": _TEXT,
        "error": _TEXT,
        "perplexity_hash": _TEXT,
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

# Conversations as they are played, whatever their source: what the system says before the first turn (null: nothing),
# and a JSON list of the user's turns, {"content", "checks": those in force at this turn}. `dropped_assistant` counts
# turns of the assistant in the source: the model gives its own answers. `meta` is a JSON object.
CONVERSATIONS = pa.schema(
    {
        "chat_set": _TEXT,
        "conversation_id": _TEXT,
        "system": _TEXT,
        "turns": _TEXT,
        "n_turns": _INT,
        "dropped_assistant": _INT,
        "meta": _TEXT,
    }
)

# An answer in a conversation; turns count from 1. `prompt_tokens`: read in this turn beside the answer's own;
# `tokens_seen`: read so far, whatever was forgotten. Entries per KV head and bytes of the evictable layers before and
# after the compression that ends the turn, total_bytes_after of all layers; full_bytes as nothing forgotten would take.
# `repetition`: share of the answer's 4-grams of tokens that stood in it before; `answer_nll`: nats a token of the
# answer under the full cache of the same conversation. `checks` is a JSON list of those in force at this turn.
CHAT = pa.schema(
    {
        "chat_set": _TEXT,
        "conversation_id": _TEXT,
        "turn": _INT,
        "policy": _TEXT,
        "budget": _TEXT,
        "user": _TEXT,
        "text": _TEXT,
        "finish_reason": _TEXT,
        "prompt_tokens": _INT,
        "completion_tokens": _INT,
        "tokens_seen": _INT,
        "budget_entries": _INT,
        "entries_before": _FLOAT,
        "entries_after": _FLOAT,
        "bytes_before": _INT,
        "bytes_after": _INT,
        "total_bytes_after": _INT,
        "full_bytes": _INT,
        "read_s": _FLOAT,
        "decode_s": _FLOAT,
        "compress_s": _FLOAT,
        "ttft_s": _FLOAT,
        "peak_mem_mb": _FLOAT,
        "checks": _TEXT,
        "repetition": _FLOAT,
        "answer_nll": _FLOAT,
        "raw": _TEXT,
        "error": _TEXT,
        "chat_hash": _TEXT,
    }
)

# The anatomy of the cache before and after the compression that ends a turn (`when`), a row a layer. `kind`: full, or
# sliding (forgets by itself). entries: per KV head, mean over the heads; bytes of keys and values.
CHAT_LAYERS = pa.schema(
    {
        "chat_set": _TEXT,
        "conversation_id": _TEXT,
        "turn": _INT,
        "policy": _TEXT,
        "budget": _TEXT,
        "layer": _INT,
        "kind": _TEXT,
        "when": _TEXT,
        "kv_heads": _INT,
        "entries": _FLOAT,
        "head_dim": _INT,
        "dtype": _TEXT,
        "bytes": _INT,
        "bytes_per_token": _FLOAT,
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

# A policy and budget on the windows of one corpus, by length bin and over all of them (bin null). `perplexity` is that
# of all its windows; `ratio`, to the full cache, of the `paired` ones that both scored. `compression`: share of the
# full cache's bytes that is gone once the context is compressed, `compression_end` after the last scored token. n
# counts windows, clusters the books that they are from, `missing` the windows without a score. Bytes (after the last
# token), entries and seconds are means over windows, peak_mem_mb the highest.
_SPAN = {"context_min": _INT, "context_max": _INT}
PERPLEXITY_STATS = pa.schema(
    {
        "corpus": _TEXT,
        "policy": _TEXT,
        "budget": _TEXT,
        "bin": _INT,
        **_SPAN,
        "perplexity": _FLOAT,
        "perplexity_low": _FLOAT,
        "perplexity_high": _FLOAT,
        **_RATIO,
        "paired": _INT,
        "compression": _FLOAT,
        "compression_low": _FLOAT,
        "compression_high": _FLOAT,
        "compression_end": _FLOAT,
        "compression_end_low": _FLOAT,
        "compression_end_high": _FLOAT,
        "tokens_per_s": _FLOAT,
        "tokens_per_s_low": _FLOAT,
        "tokens_per_s_high": _FLOAT,
        "n": _INT,
        "clusters": _INT,
        "n_tokens": _INT,
        "missing": _INT,
        "exploratory": pa.bool_(),
        "method": _TEXT,
        "budget_entries": _FLOAT,
        "kept_final": _FLOAT,
        "kept_mean": _FLOAT,
        "cache_bytes": _FLOAT,
        "total_bytes": _FLOAT,
        "full_bytes": _FLOAT,
        "prefill_s": _FLOAT,
        "compress_s": _FLOAT,
        "score_s": _FLOAT,
        "peak_mem_mb": _FLOAT,
    }
)

# Merging against dropping the same spans: `ratio` is the perplexity of `policy` over that of `reference_policy` on the
# same windows, so that below 1 merging is better. The compressions say whether the footprints were the same.
PERPLEXITY_PAIRS = pa.schema(
    {
        "corpus": _TEXT,
        "policy": _TEXT,
        "reference_policy": _TEXT,
        "budget": _TEXT,
        "bin": _INT,
        **_SPAN,
        **_RATIO,
        "n": _INT,
        "clusters": _INT,
        "exploratory": pa.bool_(),
        "method": _TEXT,
        **_TESTED,
        "compression": _FLOAT,
        "reference_compression": _FLOAT,
    }
)

# An instruction at a turn at which it is in force, and whether the answer follows it: `rule` is null where there is no
# answer; `judge` where it was not asked or gave no verdict, `judge_error` then says why. `age`: turns since it was
# given. `standing`: meant for more than that turn. `overrides`, `overridden_by`: the check that it replaces, or that
# replaces it. `chance`, of the full cache only: how often answers at this turn of conversations without it follow it.
_CHAT_KEY = {"chat_set": _TEXT, "conversation_id": _TEXT, "turn": _INT, "policy": _TEXT, "budget": _TEXT}
CHAT_VERDICTS = pa.schema(
    {
        **_CHAT_KEY,
        "check_id": _TEXT,
        "kind": _TEXT,
        "asks": _TEXT,
        "standing": pa.bool_(),
        "since": _INT,
        "age": _INT,
        "overrides": _TEXT,
        "overridden_by": _TEXT,
        "rule": pa.bool_(),
        "judge": pa.bool_(),
        "judge_reason": _TEXT,
        "judge_error": _TEXT,
        "chance": _FLOAT,
    }
)

# What the judge said of each: a verdict with its reason, or an error.
JUDGE = pa.schema(
    {
        **_CHAT_KEY,
        "check_id": _TEXT,
        "judge": pa.bool_(),
        "judge_reason": _TEXT,
        "judge_error": _TEXT,
    }
)

# A statistic of conversations under one policy and budget (null: all of them), by rule or by judge (`by`, null where
# neither matters), at a turn or, after a conflict, so many turns later (`age`). n counts verdicts, answers or pairs,
# clusters the conversations. Differences have the reference that is subtracted.
RETENTION = pa.schema(
    {
        "chat_set": _TEXT,
        "policy": _TEXT,
        "budget": _TEXT,
        "statistic": _TEXT,
        "by": _TEXT,
        "turn": _INT,
        "age": _INT,
        **_ESTIMATE,
        "reference_policy": _TEXT,
        "reference_budget": _TEXT,
        **_TESTED,
    }
)

# Table 1 of the memory study, a number a row: what a policy and budget retain and what they take, over all turns.
MEMORY_TABLE = pa.schema({"chat_set": _TEXT, "policy": _TEXT, "budget": _TEXT, "statistic": _TEXT, **_ESTIMATE})

# The cache before and after the compression that ends a turn: means over the conversations of a layer of each shape.
CACHE_ANATOMY = pa.schema(
    {
        "chat_set": _TEXT,
        "policy": _TEXT,
        "budget": _TEXT,
        "turn": _INT,
        "when": _TEXT,
        "kind": _TEXT,
        "kv_heads": _INT,
        "head_dim": _INT,
        "dtype": _TEXT,
        "layers": _INT,
        "bytes_per_token": _FLOAT,
        "statistic": _TEXT,
        **_ESTIMATE,
    }
)
