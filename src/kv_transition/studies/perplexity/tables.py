"""The columns of the tables of scored text."""

from __future__ import annotations

import pyarrow as pa

from kv_transition.tables import FLOAT, INT, INTS, RATIO, TESTED, TEXT

# A window of a book: a context, and the tokens after it, of which the first is only fed and the last only scored.
# `window`: index of the window in its book; the same scored tokens have the same index in each length bin.
# `context_start`: position in the book of the context's first token.
_WINDOW = {
    "corpus": TEXT,
    "book_id": TEXT,
    "window": INT,
    "bin": INT,
    "context_start": INT,
    "context_tokens": INT,
}
WINDOW_KEY = tuple(_WINDOW)
WINDOWS = pa.schema({**_WINDOW, "prompt_sha256": TEXT, "context_ids": INTS, "target_ids": INTS})

# A scored window. nll_sum: nats over n_tokens tokens. *_s: seconds. Bytes of the cache's tensors in the evictable
# layers (total: in all layers) after the last token; full_bytes: the same of a full cache; bytes_before, bytes_after:
# before and after the compression. Entries are per KV head. `raw`: facts that the policy records, a JSON object.
PERPLEXITY = pa.schema(
    {
        **_WINDOW,
        "policy": TEXT,
        "budget": TEXT,
        "nll_sum": FLOAT,
        "n_tokens": INT,
        "budget_entries": INT,
        "kept_final": FLOAT,
        "kept_mean": FLOAT,
        "full_mean": FLOAT,
        "bytes_before": INT,
        "bytes_after": INT,
        "cache_bytes": INT,
        "total_bytes": INT,
        "full_bytes": INT,
        "prefill_s": FLOAT,
        "compress_s": FLOAT,
        "score_s": FLOAT,
        "peak_mem_mb": FLOAT,
        "raw": TEXT,
        "error": TEXT,
        "perplexity_hash": TEXT,
    }
)

# A policy and budget on the windows of one corpus, by length bin and over all lengths (bin null). `perplexity`: of all
# its windows. `ratio`: to the full cache, over the `paired` windows that both scored. `compression`: share of the full
# cache's bytes that is removed when the context is compressed; `compression_end`: the same after the last scored
# token. n: number of windows; clusters: number of their books; `missing`: number of windows without a score. Bytes
# (after the last token), entries and seconds are means over windows; peak_mem_mb is the maximum.
_SPAN = {"context_min": INT, "context_max": INT}
PERPLEXITY_STATS = pa.schema(
    {
        "corpus": TEXT,
        "policy": TEXT,
        "budget": TEXT,
        "bin": INT,
        **_SPAN,
        "perplexity": FLOAT,
        "perplexity_low": FLOAT,
        "perplexity_high": FLOAT,
        **RATIO,
        **TESTED,
        "paired": INT,
        "compression": FLOAT,
        "compression_low": FLOAT,
        "compression_high": FLOAT,
        "compression_end": FLOAT,
        "compression_end_low": FLOAT,
        "compression_end_high": FLOAT,
        "tokens_per_s": FLOAT,
        "tokens_per_s_low": FLOAT,
        "tokens_per_s_high": FLOAT,
        "n": INT,
        "clusters": INT,
        "n_tokens": INT,
        "missing": INT,
        "exploratory": pa.bool_(),
        "method": TEXT,
        "budget_entries": FLOAT,
        "kept_final": FLOAT,
        "kept_mean": FLOAT,
        "cache_bytes": FLOAT,
        "total_bytes": FLOAT,
        "full_bytes": FLOAT,
        "prefill_s": FLOAT,
        "compress_s": FLOAT,
        "score_s": FLOAT,
        "peak_mem_mb": FLOAT,
    }
)

# Merging compared with dropping the same spans. `ratio`: the perplexity of `policy` divided by that of
# `reference_policy` on the same windows; below 1, merging is better. The compressions show whether the footprints were
# the same.
PERPLEXITY_PAIRS = pa.schema(
    {
        "corpus": TEXT,
        "policy": TEXT,
        "reference_policy": TEXT,
        "budget": TEXT,
        "bin": INT,
        **_SPAN,
        **RATIO,
        "n": INT,
        "clusters": INT,
        "exploratory": pa.bool_(),
        "method": TEXT,
        **TESTED,
        "compression": FLOAT,
        "reference_compression": FLOAT,
    }
)
