"""Perplexity of each policy and budget, and its ratio to the full cache's, from the scored windows.

Perplexity is exp(sum of nll / number of tokens). Windows of one book depend on each other, so books are the clusters
of every interval and test (`stats.quotients`), which are computed on the logarithm for perplexities and ratios.
Policies are compared on the windows that both scored (docs/perplexity.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from kv_transition.errors import UserError
from kv_transition.policies import catalog
from kv_transition.provenance import rows_to_table, write_table
from kv_transition.stats import frames
from kv_transition.stats.examples import FULL, Statistics, inherited, is_full
from kv_transition.stats.intervals import finite
from kv_transition.stats.multiplicity import adjust
from kv_transition.stats.quotients import Quotient, quotient
from kv_transition.studies.perplexity.tables import PERPLEXITY_PAIRS, PERPLEXITY_STATS

CELL = ["corpus", "policy", "budget", "bin"]
WINDOW = ["corpus", "bin", "book_id", "window"]
MEANS = ("budget_entries", "kept_final", "kept_mean", "cache_bytes", "total_bytes", "full_bytes",
         "prefill_s", "compress_s", "score_s")  # fmt: skip
COLUMNS = [*WINDOW, "policy", "budget", "context_tokens", "nll_sum", "n_tokens", "bytes_before", "bytes_after",
           "peak_mem_mb", "perplexity_hash", *MEANS]  # fmt: skip
MERGE, DROP = "entropy_merge", "entropy_drop"
EXPLORATORY = 20  # results from fewer books are labelled exploratory
METHOD = "Student t by book, with one more book as far out as the farthest"
ONE_BOOK = "; no interval from one book"
Options = Mapping[str, Mapping[str, Any] | None]
Row = dict[str, Any]


def read_windows(paths: Sequence[str], expected: Mapping[str, str] | None = None) -> pl.DataFrame:
    """Return the rows of all files (tables.PERPLEXITY) in their order; a sum of nll that is NaN becomes null.

    expected: by path, the ``perplexity_hash`` that the rows of the file must have; None: any. Raises UserError if a
    hash differs, if there is no window, if a window occurs twice, or if its nll or its number of tokens is invalid.
    """
    read = {path: frames.read_parquet(path, columns=COLUMNS) for path in paths}
    for path, part in read.items() if expected is not None else ():
        if other := set(part["perplexity_hash"]) - {expected.get(path)}:
            raise UserError(
                f"{path} was computed with other settings or code, perplexity_hash {min(map(str, other))} instead of "
                f"{expected.get(path)}; delete it and run again"
            )
    parts = [part for part in read.values() if part.height]
    if not parts:
        raise UserError("perplexity: there is no window; give a corpus with longer texts, or shorter contexts")
    frame = pl.concat(parts, how="vertical_relaxed").sort(*CELL, "book_id", "window")
    nll = pl.col("nll_sum").cast(pl.Float64)
    frame = frame.with_columns(nll_sum=pl.when(nll.is_finite()).then(nll))
    wrong = {
        "occurs more than once; run the perplexity step again": frame.select(
            *CELL, "book_id", "window"
        ).is_duplicated(),
        "has a negative sum of nll; run the perplexity step again": (frame["nll_sum"] < 0).fill_null(False),
        "has a score but no scored token; run the perplexity step again": (
            frame["nll_sum"].is_not_null() & ~(frame["n_tokens"].fill_null(0) > 0)
        ),
    }
    for what, rows in wrong.items():
        if rows.any():
            first = frame.filter(rows).row(0, named=True)
            where = f"{first['policy']}/{first['budget']}/bin{first['bin']}"
            raise UserError(f"perplexity: window {first['window']} of {first['book_id']} in {where} {what}")
    return frame


def _levels(frame: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """Yield the rows of each length bin, and then all rows with bin null."""
    yield frame
    yield frame.with_columns(bin=pl.lit(None, dtype=frame.schema["bin"]))


def _codes(frame: pl.DataFrame) -> np.ndarray:
    return frame["book_id"].rank("dense").to_numpy() - 1


def _floats(frame: pl.DataFrame, *columns: str) -> list[np.ndarray]:
    return [frame[column].cast(pl.Float64).fill_null(np.nan).to_numpy() for column in columns]


def _method(books: int) -> str:
    return METHOD + (ONE_BOOK if books == 1 else "")


def perplexity(windows: pl.DataFrame, statistics: Statistics) -> pa.Table:
    """Return a row per corpus, policy, budget and length bin, and over all lengths (tables.PERPLEXITY_STATS).

    The full cache's own ratio is 1 by definition and has no interval. p-values have the same inference as the interval
    of the ratio. They are Holm-adjusted over the policies and bins of a corpus and budget; the results over all lengths
    are a separate family.
    """
    full = windows.filter(is_full()).select(*WINDOW, nll_full="nll_sum", tokens_full="n_tokens")
    both = windows.join(full, on=WINDOW, how="left", maintain_order="left")
    rows = []
    for level in _levels(both):
        for key, own in level.group_by(CELL, maintain_order=True):
            rows.append(dict(zip(CELL, key, strict=True)) | _cell(own, statistics))
    for row in rows:
        if row["p_value"] is not None:
            row["family"] = f"{row['corpus']}/{row['budget']}/{'all lengths' if row['bin'] is None else 'by bin'}"
    adjust(rows)
    return rows_to_table([{k: v for k, v in row.items() if k != "tests"} for row in rows], PERPLEXITY_STATS)


def _cell(own: pl.DataFrame, statistics: Statistics) -> Row:
    scored = own.drop_nulls("nll_sum")
    paired = scored.drop_nulls("nll_full").filter(pl.col("n_tokens") == pl.col("tokens_full"))
    nll, tokens, seconds = _floats(scored, "nll_sum", "n_tokens", "score_s")
    before, after, end, full = _floats(scored, "bytes_before", "bytes_after", "cache_bytes", "full_bytes")
    book = _codes(scored)
    found = quotient(nll, tokens, book, statistics.confidence).exp().columns("perplexity")
    found |= quotient(after, before, book, statistics.confidence).rest().columns("compression")
    found |= quotient(end, full, book, statistics.confidence).rest().columns("compression_end")
    found |= quotient(tokens, seconds, book, statistics.confidence).columns("tokens_per_s")
    if own["policy"][0] == FULL["policy"]:
        ratio = Quotient(1.0 if scored.height else np.nan, np.nan, np.nan)
    else:
        nll, reference, tokens = _floats(paired, "nll_sum", "nll_full", "n_tokens")
        ratio = quotient(nll - reference, tokens, _codes(paired), statistics.confidence).exp()
    books = scored["book_id"].n_unique()
    return found | ratio.columns("ratio") | {
        "p_value": finite(ratio.p),
        "context_min": own["context_tokens"].min(),
        "context_max": own["context_tokens"].max(),
        "paired": paired.height,
        "n": scored.height,
        "clusters": books,
        "n_tokens": int(scored["n_tokens"].sum()),
        "missing": own.height - scored.height,
        "exploratory": books < EXPLORATORY,
        "method": _method(books),
        **{name: scored[name].mean() for name in MEANS},
        "peak_mem_mb": scored["peak_mem_mb"].max(),
    }  # fmt: skip


def pairs_of(policies: Options) -> list[tuple[str, str]]:
    """Return pairs (merging, dropping) of policies of ``kv.policies`` that select the same spans."""
    found: dict[str, dict[str, Row]] = {MERGE: {}, DROP: {}}
    for name, options in policies.items():
        kind, chosen = catalog.resolve(name, options or {})
        if kind in found:
            found[kind][name] = chosen
    return [
        (merging, dropping)
        for merging, options in found[MERGE].items()
        for dropping, spans in found[DROP].items()
        # the way of merging may differ, because its effect is what is compared
        if options | spans == options
    ]


def merge_against_drop(windows: pl.DataFrame, policies: Options, statistics: Statistics) -> pa.Table:
    """Return the comparison of each merging policy with the policy that drops the same spans (tables.PERPLEXITY_PAIRS).

    p-values have the same inference as the interval of the ratio. They are Holm-adjusted over all pairs, budgets and
    bins of a corpus; the results over all lengths are a separate family.
    """
    rows = []
    for merging, dropping in pairs_of(policies):
        both = windows.filter(policy=merging).join(
            windows.filter(policy=dropping), on=[*WINDOW, "budget"], suffix="_other", maintain_order="left"
        )
        both = both.drop_nulls(["nll_sum", "nll_sum_other"])
        for level in _levels(both):
            for key, own in level.group_by("corpus", "budget", "bin", maintain_order=True):
                named = dict(zip(("corpus", "budget", "bin"), key, strict=True))
                rows.append(named | {"policy": merging, "reference_policy": dropping} | _pair(own, statistics))
    for row in rows:
        row["family"] = f"{row['corpus']}/merge_drop/{'all lengths' if row['bin'] is None else 'by bin'}"
    adjust(rows)
    return rows_to_table([{k: v for k, v in row.items() if k != "tests"} for row in rows], PERPLEXITY_PAIRS)


def _pair(own: pl.DataFrame, statistics: Statistics) -> Row:
    nll, other, tokens = _floats(own, "nll_sum", "nll_sum_other", "n_tokens")
    book, books = _codes(own), own["book_id"].n_unique()
    ratio = quotient(nll - other, tokens, book, statistics.confidence).exp()

    def gone(suffix: str) -> float | None:
        before, after = (own[f"{name}{suffix}"].sum() for name in ("bytes_before", "bytes_after"))
        return 1 - after / before if before else None

    return ratio.columns("ratio") | {
        "context_min": own["context_tokens"].min(),
        "context_max": own["context_tokens"].max(),
        "n": own.height,
        "clusters": books,
        "exploratory": books < EXPLORATORY,
        "method": _method(books),
        "p_value": 1.0 if np.isnan(ratio.p) else ratio.p,
        "compression": gone(""),
        "reference_compression": gone("_other"),
    }


def write_perplexity(
    windows: Sequence[str],
    table: str,
    pairs: str,
    statistics: Mapping[str, Any],
    policies: Options,
    expected: Mapping[str, str] | None = None,
) -> None:
    """Write the tables of the `perplexity_stats` rule.

    policies: the configuration's ``kv.policies``. expected: as for `read_windows`. Raises UserError if the windows
    cannot be analysed.
    """
    found, chosen = read_windows(windows, expected), Statistics(**statistics)
    fields = inherited(windows[0]) | {"statistics": dict(statistics)}
    write_table(table, perplexity(found, chosen), fields)
    write_table(pairs, merge_against_drop(found, policies, chosen), fields)
