"""The observed decode steps as arrays, with their entropy and recall."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl

from kv_transition.errors import UserError
from kv_transition.stats import frames

CELL = ["task", "policy", "budget", "granularity", "memory"]
COLUMNS = [*CELL, "example_id", "cluster", "prompt_kind", "step", "n", "entropy", "recall"]

# Bins of entropy in nats: low < 1 <= medium <= 2.5 < high.
LOW_BELOW, HIGH_ABOVE = 1.0, 2.5
LEVELS = ("low", "medium", "high")


@dataclass(frozen=True)
class Steps:
    """The steps of one task, policy, budget, granularity and memory, grouped by context and example.

    ``example`` [steps] int: codes 0, 1, ... of ``examples``. ``entropy`` (nats), ``recall``, ``step``, ``length``
    (entries in the cache) [steps] float. ``kind`` [steps] int: codes of ``kinds``, the kinds of prompt. ``left_out``:
    number of steps without entropy or recall. ``context`` [steps] int: codes of the contexts, in increasing order, if
    examples share contexts.
    """

    examples: list[str]
    example: np.ndarray
    entropy: np.ndarray
    recall: np.ndarray
    step: np.ndarray
    length: np.ndarray
    kind: np.ndarray
    kinds: list[str]
    left_out: int = 0
    context: np.ndarray | None = None

    @property
    def cluster(self) -> np.ndarray:
        """The codes of what is independent: contexts, or examples where each has its own."""
        return self.example if self.context is None else self.context

    @property
    def clusters(self) -> int:
        """How many of them there are."""
        return int(self.cluster.max()) + 1 if len(self) else 0

    @cached_property
    def level(self) -> np.ndarray:
        """The entropy bin of each step: 0 low, 1 medium, 2 high."""
        return levels(self.entropy)

    def __len__(self) -> int:
        return len(self.recall)


def levels(entropy: np.ndarray) -> np.ndarray:
    """Return the bin of each entropy: 0 low, 1 medium, 2 high."""
    return (entropy >= LOW_BELOW).astype(int) + (entropy > HIGH_ABOVE)


def read_observations(paths: Sequence[str], columns: Sequence[str] = COLUMNS) -> pl.DataFrame:
    """Return the rows of all files (tables.OBSERVATIONS), with null in place of NaN.

    Raises UserError if there is no row, a step occurs twice, a recall is outside [0, 1] or an entropy is below 0.
    """
    parts = [frames.read_parquet(path, columns=list(columns)) for path in paths]
    parts = [part for part in parts if part.height]
    if not parts:
        raise UserError("observations: there is no observed step; run the observe step on at least one example")
    frame = pl.concat(parts, how="vertical_relaxed").with_columns(
        pl.col("entropy", "recall").cast(pl.Float64).fill_nan(None)
    )
    _check(frame)
    return frame


def _check(frame: pl.DataFrame) -> None:
    double = frame.filter(frame.select(*CELL, "example_id", "prompt_kind", "step").is_duplicated())
    wrong = {
        "occurs more than once; run the observe step again": double,
        "has a recall outside [0, 1]": frame.filter(~pl.col("recall").is_between(0, 1)),
        "has an entropy that is negative or infinite": frame.filter(
            (pl.col("entropy") < 0) | pl.col("entropy").is_infinite()
        ),
    }
    for what, rows in wrong.items():
        if rows.height:
            first = rows.row(0, named=True)
            where = "/".join(str(first[name]) for name in CELL)
            raise UserError(f"observations: step {first['step']} of example {first['example_id']} in {where} {what}")


def cells(frame: pl.DataFrame) -> Iterator[tuple[dict[str, str], Steps]]:
    """Yield each task, policy, budget, granularity and memory with its steps, sorted by name."""
    for key, rows in frame.sort(*CELL, "example_id", "prompt_kind", "step").group_by(CELL, maintain_order=True):
        yield dict(zip(CELL, key, strict=True)), steps_of(rows)


def steps_of(rows: pl.DataFrame) -> Steps:
    """Return the steps of one cell, sorted by context, example and step, without rows that lack entropy or recall."""
    # a context is named after the first of its examples: the order is that of examples where each has its own
    first = pl.col("example_id").min().over(pl.coalesce("cluster", "example_id"))
    whole = rows.drop_nulls(["entropy", "recall"]).with_columns(first=first)
    whole = whole.sort("first", "example_id", "prompt_kind", "step")
    codes = (whole[name].fill_null("").rank("dense").to_numpy() for name in ("example_id", "prompt_kind", "first"))
    example, kind, context = (code.astype(int) - 1 for code in codes)
    return Steps(
        whole["example_id"].unique().sort().to_list(),
        example,
        *(whole[name].cast(pl.Float64).to_numpy() for name in ("entropy", "recall", "step", "n")),
        kind,
        whole["prompt_kind"].fill_null("").unique().sort().to_list(),
        rows.height - whole.height,
        context,
    )
