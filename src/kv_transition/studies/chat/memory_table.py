"""Table 1 of the memory study (retention and cost) and the anatomy of the cache.

Means are over all turns of all conversations; conversations are the clusters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from kv_transition.provenance import rows_to_table, write_table
from kv_transition.stats import frames, intervals
from kv_transition.stats.examples import Statistics, by_cell, inherited, padded
from kv_transition.studies.chat.analysis import CELL, counted, raters, read_verdicts
from kv_transition.studies.chat.tables import CACHE_ANATOMY, MEMORY_TABLE

MEASURES = {
    "repetition": "repetition",
    "entries": "entries_after",
    "cache_bytes": "bytes_after",
    "total_bytes": "total_bytes_after",
}
"""statistic by column of the answers, in addition to the shares and the perplexity"""
SHAPE = ["chat_set", "policy", "budget", "turn", "when", "kind", "kv_heads", "head_dim", "dtype"]
Row = dict[str, Any]


def memory_table(verdicts: pl.DataFrame, answers: pl.DataFrame, statistics: Statistics) -> list[Row]:
    """Return the rows of ``tables.MEMORY_TABLE``.

    verdicts: as `read_verdicts` returns them. answers: the columns ``CELL``, conversation_id, turn, error, answer_nll
    and those of ``MEASURES`` (tables.CHAT).

    ``retention_rule``, ``retention_judge``: share of the standing, not overridden instructions that answers follow;
    ``repetition``: share of repeated 4-grams; ``answer_perplexity``: geometric mean over the answers of their
    perplexity under the full cache; ``entries``: per KV head, and ``cache_bytes``: of the evictable layers, after each
    turn's compression; ``total_bytes``: of all layers; ``failed``: share of the turns for which the engine returned no
    answer.
    """
    confidence, rows = statistics.confidence, []

    def add(frame: pl.DataFrame, statistic: str, column: str, of: Any) -> None:
        if frame.height:
            lists = by_cell(frame.sort(CELL, maintain_order=True).select(*CELL, column, "cluster"), CELL)
            found = of(padded(lists[column]), confidence, clusters=padded(lists["cluster"]))
            rows.extend(
                {**key, "statistic": statistic, **found.row(i)} for i, key in enumerate(lists.select(CELL).to_dicts())
            )

    for by in raters(verdicts):
        add(verdicts.filter(counted()).drop_nulls(by), f"retention_{by}", by, intervals.bounded_mean)
    answers = answers.with_columns(cluster="conversation_id", failed=pl.col("error").is_not_null())
    answers = answers.with_columns(pl.col(pl.Float64).fill_nan(None))
    add(answers.drop_nulls("answer_nll"), "answer_perplexity", "answer_nll", intervals.geometric_mean)
    for statistic, column in MEASURES.items():
        of = intervals.bounded_mean if statistic == "repetition" else intervals.mean
        add(answers.drop_nulls(column), statistic, column, of)
    add(answers, "failed", "failed", intervals.bounded_mean)
    return rows


def anatomy(layers: pl.DataFrame, statistics: Statistics) -> list[Row]:
    """Return the rows of ``tables.CACHE_ANATOMY``: mean entries and bytes of the layers of each shape."""
    if not layers.height:
        return []
    conversations = (
        layers.group_by(*SHAPE, "conversation_id")
        .agg(pl.col("entries", "bytes", "bytes_per_token").cast(pl.Float64).mean(), layers=pl.col("layer").n_unique())
        .sort(*SHAPE, "conversation_id")
    )
    lists = by_cell(conversations.with_columns(cluster="conversation_id").drop("conversation_id"), SHAPE)
    shapes = lists.select(
        *SHAPE, layers=pl.col("layers").list.max(), bytes_per_token=pl.col("bytes_per_token").list.mean()
    ).to_dicts()
    rows = []
    for statistic in ("entries", "bytes"):
        found = intervals.mean(padded(lists[statistic]), statistics.confidence)
        rows += [{**shape, "statistic": statistic, **found.row(i)} for i, shape in enumerate(shapes)]
    return rows


def write_memory_table(
    verdicts: str, chat: Sequence[str], layers: Sequence[str], table: str, cache: str, statistics: Mapping[str, Any]
) -> None:
    """Write ``tables.MEMORY_TABLE`` and ``CACHE_ANATOMY`` from verdicts, answers and layers."""
    how, fields = Statistics(**statistics), inherited(verdicts) | {"statistics": dict(statistics)}
    columns = [*CELL, "conversation_id", "turn", "error", "answer_nll", *MEASURES.values()]
    answers = pl.concat([frames.read_parquet(path, columns=columns) for path in chat], how="vertical_relaxed")
    rows = memory_table(read_verdicts(verdicts), answers, how)
    write_table(table, rows_to_table(rows, MEMORY_TABLE), fields)
    parts = pl.concat([frames.read_parquet(path) for path in layers], how="vertical_relaxed")
    write_table(cache, rows_to_table(anatomy(parts, how), CACHE_ANATOMY), fields)
