"""Conversion of scored answers to one row per example, the unit of every estimate, test and resample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa

from kv_transition.errors import UserError
from kv_transition.labels import HONEST
from kv_transition.provenance import read_metadata

CELL = ["task", "mode", "policy", "budget", "bin"]
FULL = {"policy": "full", "budget": "r1"}


@dataclass(frozen=True)
class Statistics:
    """The configuration's ``statistics`` section."""

    confidence: float = 0.95
    resamples: int = 10_000
    seed: int = 0

    @property
    def alpha(self) -> float:
        return 1 - self.confidence


def is_full() -> pl.Expr:
    """Return an expression for rows of the full cache itself."""
    return pl.col("policy").eq(FULL["policy"]) & pl.col("budget").eq(FULL["budget"])


def held_share(frame: pl.DataFrame, held: pl.Expr) -> pl.Expr:
    """Return the bytes held divided by those of a full cache, as mean over the answer, or at its end if the mean is
    unknown.

    ``held``: bytes at the end of an answer. Null if the full cache has no bytes.
    """
    share = pl.when(pl.col("full_bytes") > 0).then(held / pl.col("full_bytes"))
    if "full_mean" not in frame.columns:
        return share
    course = pl.col("kept_mean") / pl.col("kept_final") * pl.col("full_final") / pl.col("full_mean")
    return share * course.fill_null(1.0)


def example_values(scores: pa.Table) -> pl.DataFrame:
    """Return one row per cell and example: columns of the scores as means over the repeats.

    Further columns: ``failed`` (share of the repeats that failed), ``abstained`` and ``broken`` (its two kinds),
    ``footprint`` (`held_share`), ``alone`` (timings are meaningful), ``score_var`` and ``repeats`` (variance of the
    score over repeats), and ``cluster``: the document that examples share, from the optional column of the scores,
    else the example itself.

    Raises UserError if there is no row, a cell has one example twice in the same repeat, or a score is not in [0, 1].
    """
    if scores.num_rows == 0:
        raise UserError("scores: the table is empty; run at least one cell before the analysis")
    frame = pl.from_arrow(scores.drop_columns([c for c in ("answers", "raw", "text") if c in scores.column_names]))
    frame = frame.with_columns(pl.col(pl.Float64).fill_nan(None))
    _check(frame)
    if "cluster" not in frame.columns:
        frame = frame.with_columns(cluster=pl.lit(None, dtype=pl.String))
    alone = (pl.col("batch_size") == 1) & ~pl.col("co_running")
    frame = frame.with_columns(
        cluster=pl.coalesce("cluster", "example_id"),
        failed=pl.col("failure").is_not_null().cast(pl.Float64),
        abstained=pl.col("failure").is_in(HONEST).fill_null(False).cast(pl.Float64),
        broken=(pl.col("failure").is_not_null() & ~pl.col("failure").is_in(HONEST)).cast(pl.Float64),
        footprint=held_share(frame, pl.col("cache_bytes")),
        tokens_per_s=pl.when(pl.col("decode_s") > 0).then(pl.col("completion_tokens") / pl.col("decode_s")),
    ).with_columns(pl.when(alone).then(pl.col(name)) for name in ("latency_s", "ttft_s", "tokens_per_s", "peak_mem_mb"))
    columns = [
        *(
            "score",
            "em",
            "f1",
            "contains",
            "failed",
            "abstained",
            "broken",
            "kept_mean",
            "cache_bytes",
            "footprint",
            "token_len",
        ),
        *("latency_s", "ttft_s", "tokens_per_s", "peak_mem_mb"),
    ]
    key = [*CELL, "example_id"]
    return (
        frame.group_by(key)
        .agg(
            *(pl.col(name).mean() for name in columns),
            cluster=pl.col("cluster").first(),
            alias=pl.col("alias").any(),
            alone=alone.any(),
            repeats=pl.len(),
            score_var=pl.col("score").var(),
        )
        .sort(key)
    )


def _check(frame: pl.DataFrame) -> None:
    key = [*CELL, "example_id", "repeat"]
    double = frame.group_by(key).len().filter(pl.col("len") > 1)
    if double.height:
        first = double.sort(key).row(0, named=True)
        raise UserError(
            f"scores: example {first['example_id']} occurs more than once in cell {_path(first)}; score again"
        )
    for name in ("score", "em", "f1", "contains"):
        outside = frame.filter(~pl.col(name).is_between(0, 1))
        if outside.height:
            first = outside.row(0, named=True)
            raise UserError(
                f"scores: {name} of example {first['example_id']} in cell {_path(first)} is {first[name]:g}; "
                "every score must lie between 0 and 1"
            )


def _path(row: dict) -> str:
    return "/".join(str(row[name]) for name in CELL)


def on_both(frame: pl.DataFrame, reference: pl.DataFrame, on: list[str], suffix: str) -> pl.DataFrame:
    """Return the rows of ``frame`` joined with those of ``reference`` on the same examples; others are omitted."""
    return frame.join(reference, on=[*on, "bin", "example_id"], how="inner", suffix=suffix, maintain_order="left")


def by_cell(frame: pl.DataFrame, key: list[str]) -> pl.DataFrame:
    """Return one row per ``key`` with every other column as a list; clusters as codes 0, 1, ... within the cell."""
    codes = pl.col("cluster").rank("dense").over(key).cast(pl.Float64) - 1
    return frame.with_columns(cluster=codes).group_by(key, maintain_order=True).agg(pl.all().exclude(key))


def padded(lists: pl.Series) -> np.ndarray:
    """Return a column of lists as ``[rows, longest]`` with NaN for nulls and behind the end of shorter lists."""
    lengths = lists.list.len().to_numpy()
    out = np.full((len(lists), int(lengths.max()) if len(lengths) else 0), np.nan)
    filled = np.arange(out.shape[1]) < lengths[:, None]
    out[filled] = lists.explode(empty_as_null=False).cast(pl.Float64).fill_null(np.nan).to_numpy()
    return out


def inherited(path: str) -> dict[str, str]:
    """Return the metadata of an input file that its results keep: all except what each file records about itself."""
    anew = {"git_commit", "package_versions", "timestamp"}
    return {k: v for k, v in read_metadata(path).items() if k not in anew}
