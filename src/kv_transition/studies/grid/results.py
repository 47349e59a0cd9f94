"""The experiment's tables for figures and report: without aliases, with null instead of NaN, in a fixed order."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import polars as pl

from kv_transition import labels
from kv_transition.errors import UserError
from kv_transition.provenance import read_metadata
from kv_transition.stats.examples import FULL
from kv_transition.stats.frames import read_table

KEY = ("task", "mode", "policy", "budget", "bin", "statistic")
Row = dict[str, Any]
BYTES_IN_ALL = pl.col("raw").str.json_path_match("$.total_bytes").cast(pl.Float64)
"""total bytes of the answers of policies that keep evicted entries in other memory; null for all others"""


def in_family(row: Row | None) -> Row | None:
    """Return a comparison with the interval that agrees with its p-value after Holm."""
    return row and row | {"ci_low": row["holm_low"], "ci_high": row["holm_high"]}


@dataclass(frozen=True)
class Results:
    """The tables of one experiment."""

    scores: pl.DataFrame
    stats: pl.DataFrame
    comparisons: pl.DataFrame
    transition: pl.DataFrame
    confidence: float = 0.95

    @cached_property
    def policies(self) -> list[str]:
        """Return all policies but the full cache, always in the same order, so that a policy keeps its colour."""
        return sorted(set(self.stats["policy"]) - {FULL["policy"]})

    @cached_property
    def budgets(self) -> list[str]:
        own = self.stats.filter(pl.col("policy") != FULL["policy"])
        return sorted(set(own["budget"]), key=labels.budget_order)

    @cached_property
    def groups(self) -> list[tuple[str, str]]:
        """Return the (task, mode) of each group; modes are never mixed."""
        found = self.stats.select("task", "mode").unique().rows()
        return sorted(found, key=lambda k: (k[0], list(labels.MODES).index(k[1])))

    @cached_property
    def panels(self) -> list[tuple[str, str, str]]:
        """Return the (task, mode, budget) of each panel with a policy, or of the full cache alone."""
        frame = self.stats.filter(pl.col("policy") != FULL["policy"])
        if not frame.height:
            frame = self.stats
        found = frame.select("task", "mode", "budget").unique().rows()
        return sorted(found, key=lambda k: (k[0], list(labels.MODES).index(k[1]), labels.budget_order(k[2])))

    @cached_property
    def pairs(self) -> list[tuple[str, str]]:
        """Return each (policy, budget), the full cache first, large budgets before small ones."""
        own = self.stats.filter(pl.col("policy") != FULL["policy"]).select("policy", "budget").unique().rows()
        return [tuple(FULL.values()), *sorted(own, key=lambda k: (labels.budget_order(k[1]), k[0]))]

    @cached_property
    def keeping_all(self) -> list[str]:
        """Return the policies that keep evicted entries in other memory and report the total bytes."""
        return sorted(set(self.scores.filter(BYTES_IN_ALL.is_not_null())["policy"]))

    @cached_property
    def contenders(self) -> list[str]:
        """Return the policies that save memory and can therefore show how little memory is enough."""
        return [policy for policy in self.policies if policy not in self.keeping_all] or self.policies

    def curve(self, statistic: str, task: str, mode: str) -> pl.DataFrame:
        return self.stats.filter(statistic=statistic, task=task, mode=mode).drop_nulls("estimate")

    @cached_property
    def _stats(self) -> dict[tuple, Row]:
        return {tuple(row[k] for k in KEY): row for row in self.stats.iter_rows(named=True)}

    @cached_property
    def _compared(self) -> dict[tuple, Row]:
        against_full = self.comparisons.filter(reference_policy=FULL["policy"])
        return {tuple(row[k] for k in KEY): row for row in against_full.iter_rows(named=True)}

    def stat(self, task: str, mode: str, policy: str, budget: str, bin: int, statistic: str) -> Row | None:
        return self._stats.get((task, mode, policy, budget, bin, statistic))

    def compared(self, task: str, mode: str, policy: str, budget: str, bin: int | None, statistic: str) -> Row | None:
        """Return the paired comparison with the full cache; ``bin`` None: over all bins."""
        return self._compared.get((task, mode, policy, budget, bin, statistic))

    def bins(self, task: str) -> list[Row]:
        """Return bin, token_min, token_max, token_mean of the task's bins, in order."""
        columns = ["bin", "token_min", "token_max", "token_mean"]
        return self.stats.filter(task=task).select(columns).unique("bin").sort("bin").to_dicts()

    @cached_property
    def several_tasks(self) -> bool:
        return len({task for task, _ in self.groups}) > 1

    def heading(self, task: str, mode: str) -> str:
        """Return ``Compressed after the prompt``, with the task if there are several."""
        return (f"{task}: compressed " if self.several_tasks else "Compressed ") + labels.mode(mode)


def read_results(scores: str, bin_stats: str, comparisons: str, transition: str) -> Results:
    """Return the tables from their files, without aliases of the full cache. Raises UserError if nothing is left."""
    confidence = json.loads(read_metadata(bin_stats).get("statistics", "{}")).get("confidence", 0.95)
    answers = read_table(scores)
    aliases = answers.filter("alias").select("policy", "budget").unique()
    without = [
        table.join(aliases, on=["policy", "budget"], how="anti", maintain_order="left")
        for table in (answers, *map(read_table, (bin_stats, comparisons, transition)))
    ]
    found = without[1].drop_nulls("bin")
    if not found.height:
        raise UserError(f"{bin_stats}: the table is empty; run the aggregate step on at least one scored cell")
    return Results(without[0], found, without[2], without[3], confidence)
