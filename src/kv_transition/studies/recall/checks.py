"""Plausibility checks of the observations."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from kv_transition.provenance import read_metadata, write_table
from kv_transition.stats import frames
from kv_transition.studies.recall.tables import OBSERVATION_CHECKS

KEY = ["task", "policy", "budget", "granularity", "memory"]
SEQUENCE = ["example_id", "prompt_kind"]

# An entropy is summed in fp32, so rounding may put it slightly outside its bounds.
_TOLERANCE = 1e-4

_WORDS = {
    "recall_always_0": "recall is 0 at every step of {} of {} sequences",
    "recall_always_1": "recall is 1 at every step of {} of {} sequences",
    "gold_never_changes": "the gold entries never change in {} of {} sequences",
    "steps_missing": "{} of {} sequences lack steps",
    "entropy_outside": "the entropy of {} steps is outside [0, log V]",
}
_EXPECTED = {"oracle": {"recall_always_1"}}
"""Checks that are expected to hold, by policy: the oracle holds all entries that the step needs."""


def check(
    observations: pl.DataFrame, vocabulary: int, sequences: Mapping[tuple[str, str], tuple[int, str]]
) -> pl.DataFrame:
    """Return a row of OBSERVATION_CHECKS for each policy, budget, granularity and memory.

    sequences: steps and finish reason by (example_id, prompt_kind), as the job recorded them. A sequence without steps
    is missing, unless the model ended it at once. A sequence of one step cannot show that a value never changes.
    """
    recorded = pl.DataFrame(
        [(*key, steps, reason) for key, (steps, reason) in sequences.items()],
        schema={"example_id": pl.String, "prompt_kind": pl.String, "recorded": pl.Int64, "reason": pl.String},
        orient="row",
    )
    keys = observations.select(KEY).unique(maintain_order=True)
    outside = ~pl.col("entropy").is_between(-_TOLERANCE, math.log(vocabulary) + _TOLERANCE)
    found = observations.group_by([*KEY, *SEQUENCE], maintain_order=True).agg(
        pl.len().alias("steps"),
        ((pl.col("recall") == 0).all() & (pl.len() > 1)).alias("recall_always_0"),
        ((pl.col("recall") == 1).all() & (pl.len() > 1)).alias("recall_always_1"),
        ((pl.col("gold_new").fill_null(0) == 0).all() & (pl.len() > 1)).alias("gold_never_changes"),
        # A comparison with NaN is not an error in polars, so NaN is checked separately.
        (outside | pl.col("entropy").is_nan() | pl.col("entropy").is_null()).sum().alias("entropy_outside"),
        (pl.col("step").sort() != pl.int_range(pl.len())).any().alias("broken"),
    )
    each = keys.join(recorded, how="cross").join(found, on=[*KEY, *SEQUENCE], how="left")
    missing = (
        pl.col("broken").fill_null(False)
        | (pl.col("steps").fill_null(0) != pl.col("recorded"))
        | ((pl.col("recorded") == 0) & (pl.col("reason") != "stop"))
    )
    flags = ["recall_always_0", "recall_always_1", "gold_never_changes", "entropy_outside"]
    counts = each.group_by(KEY, maintain_order=True).agg(
        pl.len().alias("sequences"),
        pl.col("steps").sum(),
        *(pl.col(flag).cast(pl.Int64).sum() for flag in flags),
        missing.sum().alias("steps_missing"),
    )
    rows = [row | {"concern": _concern(row)} for row in counts.to_dicts()]
    return pl.DataFrame(rows, schema_overrides={"concern": pl.String}).select(OBSERVATION_CHECKS.names)


def _concern(row: Mapping[str, Any]) -> str | None:
    """Return the concern as a sentence; None if there is none."""
    expected = _EXPECTED.get(row["policy"], set())
    said = [
        words.format(row[flag], row["sequences"])
        for flag, words in _WORDS.items()
        if row[flag] and flag not in expected
    ]
    return "; ".join(said) or None


def write_checks(observations: Sequence[str], output: str) -> None:
    """Write the checks of the observation files of one task, a file for each bin."""
    sequences: dict[tuple[str, str], tuple[int, str]] = {}
    vocabulary = 0
    for path in observations:
        about = read_metadata(path)
        vocabulary = int(about["vocab_size"])
        sequences |= {(i, kind): (steps, reason) for i, kind, steps, reason in json.loads(about["sequences"])}
    steps = pl.concat([frames.read_parquet(path) for path in observations])
    table = check(steps, vocabulary, sequences) if len(steps) else pl.DataFrame(schema=_schema())
    write_table(output, table.to_arrow().cast(OBSERVATION_CHECKS), {"vocab_size": vocabulary})


def _schema() -> dict[str, Any]:
    return pl.DataFrame(OBSERVATION_CHECKS.empty_table()).schema
