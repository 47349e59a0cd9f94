"""Scored windows with known true values: books differ, windows of a book are similar, policies have a known cost."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl

TOKENS, ENTRY_BYTES = 64, 512
LOG_PPL, BOOK_SD, WINDOW_SD = 3.0, 0.4, 0.15
# nats per token above the full cache, and the variation of that difference between books and between windows
COST_BOOK_SD, COST_WINDOW_SD = 0.03, 0.05


def simulated(
    rng: np.random.Generator,
    costs: Mapping[tuple[str, str], float],
    *,
    books: int = 10,
    windows: int = 5,
    lengths: tuple[int, ...] = (256,),
    corpus: str = "pg19",
) -> pl.DataFrame:
    """Return rows of tables.PERPLEXITY (the analysed columns) for the full cache and each (policy, budget: r...)."""
    rows = []
    for bin, length in enumerate(lengths):
        base = rng.normal(LOG_PPL, BOOK_SD, (books, 1)) + rng.normal(0, WINDOW_SD, (books, windows))
        for (policy, budget), cost in {("full", "r1"): 0.0, **costs}.items():
            own = cost + rng.normal(0, COST_BOOK_SD, (books, 1)) + rng.normal(0, COST_WINDOW_SD, (books, windows))
            own = own * (policy != "full")
            entries = int(np.ceil(float(budget[1:]) * length))
            for book in range(books):
                for window in range(windows):
                    rows.append({
                        "corpus": corpus, "book_id": f"book{book:03d}", "window": window, "bin": bin,
                        "policy": policy, "budget": budget, "context_start": window * 1000, "context_tokens": length,
                        "nll_sum": float((base + own)[book, window] * TOKENS), "n_tokens": TOKENS,
                        "budget_entries": entries, "kept_final": float(entries + TOKENS), "kept_mean": float(entries),
                        "bytes_before": length * ENTRY_BYTES, "bytes_after": entries * ENTRY_BYTES,
                        "cache_bytes": (entries + TOKENS) * ENTRY_BYTES,
                        "total_bytes": (entries + TOKENS) * ENTRY_BYTES,
                        "full_bytes": (length + TOKENS) * ENTRY_BYTES, "prefill_s": 1.0, "compress_s": 0.1,
                        "score_s": float(rng.uniform(0.9, 1.1)), "peak_mem_mb": None, "raw": "{}", "error": None,
                        "perplexity_hash": "0",
                    })  # fmt: skip
    return pl.DataFrame(rows, schema_overrides={"peak_mem_mb": pl.Float64, "error": pl.String})
