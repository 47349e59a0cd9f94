"""Retention of instructions per turn, survival, conflicts, and agreement of rule and judge.

An instruction counts if it is standing (meant for more than the turn in which it was given), in force at the turn and
not overridden. Retention is the share of these instructions that an answer follows. Conversations are the clusters of
all intervals.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from kv_transition.provenance import rows_to_table, write_table
from kv_transition.stats import agreement, frames, intervals, paired
from kv_transition.stats.examples import FULL, Statistics, by_cell, inherited, padded
from kv_transition.stats.intervals import Interval, finite
from kv_transition.stats.multiplicity import adjust
from kv_transition.stats.survival import median, survival
from kv_transition.studies.chat.tables import RETENTION

CELL = ["chat_set", "policy", "budget"]
RATERS = ("rule", "judge")
WINNERS = ("new", "old", "both", "neither")
"""outcomes of a conflict: which of the two instructions an answer follows"""
Row = dict[str, Any]


def read_verdicts(path: str) -> pl.DataFrame:
    """Return the verdicts (tables.CHAT_VERDICTS), sorted; ``cluster`` is the conversation."""
    frame = frames.read_parquet(path).sort(*CELL, "conversation_id", "turn", "since", "check_id")
    return frame.with_columns(cluster="conversation_id")


def counted() -> pl.Expr:
    """Return the expression that selects the verdicts that count for retention."""
    return pl.col("standing") & pl.col("overridden_by").is_null()


def retention(verdicts: pl.DataFrame, statistics: Statistics) -> list[Row]:
    """Return every row of ``tables.RETENTION`` that is computed from the verdicts."""
    if not verdicts.height:
        return []
    rows: list[Row] = []
    for by in raters(verdicts):
        own = verdicts.filter(counted()).drop_nulls(by)
        rows += _shares(own, by, "retention", [*CELL, "turn"], statistics)
        rows += _shares(own, by, "retention", CELL, statistics)
        rows += _shares(verdicts.filter(~pl.col("standing")).drop_nulls(by), by, "own_turn", CELL, statistics)
        rows += _survival(verdicts, by, statistics)
        rows += _last_turn(own, by, statistics)
        rows += _conflicts(verdicts, by, statistics)
    rows += _chance(verdicts.filter(counted()), statistics)
    if "judge" in raters(verdicts):
        rows += _agreement(verdicts, statistics)
    adjust(rows)
    return [{k: v for k, v in row.items() if k != "tests"} for row in rows]


def raters(verdicts: pl.DataFrame) -> list[str]:
    """Return ``rule``, and also ``judge`` if a judge was asked."""
    asked = verdicts["judge"].is_not_null().any() or verdicts["judge_error"].is_not_null().any()
    return [*RATERS] if asked else ["rule"]


def _rows(keys: Sequence[Row], statistic: str, by: str | None, found: Interval) -> Iterator[Row]:
    for i, key in enumerate(keys):
        yield {**key, "statistic": statistic, "by": by, **found.row(i)}


def _shares(frame: pl.DataFrame, column: str, statistic: str, key: list[str], statistics: Statistics) -> list[Row]:
    """Return the share of positive verdicts for each key."""
    if not frame.height:
        return []
    lists = by_cell(frame.sort(key, maintain_order=True).select(*key, column, "cluster"), key)
    found = intervals.bounded_mean(padded(lists[column]), statistics.confidence, clusters=padded(lists["cluster"]))
    by = column if column in RATERS else None
    return list(_rows(lists.select(key).to_dicts(), statistic, by, found))


def _chance(frame: pl.DataFrame, statistics: Statistics) -> list[Row]:
    """Return how often answers follow instructions that their conversation never gave, with the full cache."""
    own = frame.drop_nulls("chance")
    return [row | {"by": "rule"} for row in _shares(own, "chance", "chance", [*CELL, "turn"], statistics)]


# ----------------------------------------------------------------------------------------------------
# Until the first failure


def first_failures(verdicts: pl.DataFrame, by: str) -> pl.DataFrame:
    """Return a row for each conversation of a cell. ``time``: its first turn with an instruction that is not followed.

    ``failed`` is false if there is no such turn; ``time`` is then the last answered turn. A conversation is observed up
    to its first turn without a verdict. Conversations without a standing instruction, or without a verdict at the first
    turn, are left out.
    """
    key = [*CELL, "conversation_id"]
    turns = pl.col("turn")
    failed = turns.filter(counted() & ~pl.col(by)).min()
    unknown = turns.filter(counted() & pl.col(by).is_null()).min()
    return (
        verdicts.group_by(key)
        .agg(failed=failed, unknown=unknown, last=turns.filter(pl.col("rule").is_not_null()).max(), any=counted().any())
        .filter("any")
        .with_columns(last=pl.min_horizontal("last", pl.col("unknown") - 1))
        .with_columns(first=pl.col("failed").is_not_null() & (pl.col("failed") < pl.col("unknown")).fill_null(True))
        .select(*key, time=pl.when("first").then("failed").otherwise("last"), failed="first")
        .filter(pl.col("time") >= 1)
        .sort(key)
    )


def _survival(verdicts: pl.DataFrame, by: str, statistics: Statistics) -> list[Row]:
    rows, turns = [], dict(verdicts.group_by("chat_set").agg(pl.col("turn").max()).iter_rows())
    for key, own in first_failures(verdicts, by).group_by(CELL, maintain_order=True):
        cell = dict(zip(CELL, key, strict=True))
        time, failed = own["time"].to_numpy(), own["failed"].to_numpy()
        found = survival(time, failed, turns[cell["chat_set"]], statistics.confidence)
        keys = [cell | {"turn": turn} for turn in range(1, turns[cell["chat_set"]] + 1)]
        rows += [row for row in _rows(keys, "survival", by, found) if row["estimate"] is not None]
        rows.append(_median(cell, "survival_median", by, found, len(time)))
    return rows


def _median(cell: Row, name: str, by: str, curve: Interval, n: int, first: int = 1) -> Row:
    ends = dict(zip(("estimate", "ci_low", "ci_high"), (finite(end + first - 1) for end in median(curve)), strict=True))
    count = {"n": n, "clusters": n, "method": "where the curve falls to one half"}
    return cell | {"statistic": name, "by": by} | ends | count


# ----------------------------------------------------------------------------------------------------
# The last turn, against the full cache


def _last_turn(own: pl.DataFrame, by: str, statistics: Statistics) -> list[Row]:
    """Return retention at each conversation's last turn, and its paired difference from the full cache."""
    if not own.height:
        return []
    last = pl.col("turn") == pl.col("turn").max().over("chat_set", "conversation_id")
    ends = (
        own.filter(last)
        .group_by(*CELL, "conversation_id")
        .agg(pl.col(by).cast(pl.Float64).mean())
        .sort(*CELL, "conversation_id")
    )
    lists = by_cell(ends.with_columns(cluster="conversation_id"), CELL)
    found = intervals.bounded_mean(padded(lists[by]), statistics.confidence)
    rows = list(_rows(lists.select(CELL).to_dicts(), "last_turn", by, found))

    full = (pl.col("policy") == FULL["policy"]) & (pl.col("budget") == FULL["budget"])
    both = ends.filter(~full).join(ends.filter(full), on=["chat_set", "conversation_id"], suffix="_full")
    if not both.height:
        return rows
    both = both.sort(*CELL, "conversation_id").with_columns(cluster="conversation_id")
    lists = by_cell(both, CELL)
    difference = padded(lists[by]) - padded(lists[f"{by}_full"])
    tested = paired.difference(difference)
    found, p = tested.interval(statistics.confidence), tested.p
    for i, row in enumerate(_rows(lists.select(CELL).to_dicts(), "last_turn_difference", by, found)):
        rows.append(
            row
            | {"reference_policy": FULL["policy"], "reference_budget": FULL["budget"]}
            | {"method": f"paired, {row['method']}", "p_value": float(p[i])}
            | {"family": f"{row['chat_set']}/last_turn/{by}"}
        )
    return rows


# ----------------------------------------------------------------------------------------------------
# Two instructions in conflict


def pairs(verdicts: pl.DataFrame, by: str) -> pl.DataFrame:
    """Return a row for each answer at which an instruction and the instruction that overrides it are both in force.

    ``old`` and ``new``: whether it follows each; ``since``: the turn of the conflict; ``age``: turns since then.
    """
    key = [*CELL, "conversation_id", "turn"]
    old = verdicts.drop_nulls(["overridden_by", by]).select(*key, "check_id", "overridden_by", old=by)
    new = verdicts.drop_nulls(by).select(*key, "since", "age", "cluster", overridden_by="check_id", new=by)
    return old.join(new, on=[*key, "overridden_by"]).sort(*key, "check_id")


def winner() -> pl.Expr:
    """Return the expression that gives one of ``WINNERS``."""
    old, new = pl.col("old"), pl.col("new")
    said = pl.when(old & new).then(pl.lit("both")).when(new).then(pl.lit("new")).when(old).then(pl.lit("old"))
    return said.otherwise(pl.lit("neither"))


def _conflicts(verdicts: pl.DataFrame, by: str, statistics: Statistics) -> list[Row]:
    found = pairs(verdicts, by)
    if not found.height:
        return []
    shares = found.with_columns(*(winner().eq(name).alias(name) for name in WINNERS))
    rows = []
    for name in WINNERS:
        for key in ([*CELL, "age"], CELL):
            rows += [row | {"by": by} for row in _shares(shares, name, f"conflict_{name}", key, statistics)]
    return rows + _forgotten(found, by, statistics)


def _forgotten(found: pl.DataFrame, by: str, statistics: Statistics) -> list[Row]:
    """Return the number of turns after a conflict from which the first instruction is never followed again.

    This is one turn after the last answer that follows it. Rows: the share that is still followed at or after each age,
    and the median age, for the first conflict of each conversation. If the last answer follows it, it counts as not
    forgotten within the conversation.
    """
    last = pl.col("age").filter(pl.col("old")).max()
    pair = (
        found.group_by(*CELL, "conversation_id", "since", "check_id")
        .agg(seen=pl.col("age").max(), last=last.fill_null(-1))
        .sort(*CELL, "conversation_id", "since", "check_id")
        .unique([*CELL, "conversation_id"], keep="first", maintain_order=True)
    )
    rows = []
    for key, own in pair.group_by(CELL, maintain_order=True):
        cell = dict(zip(CELL, key, strict=True))
        failed = (own["last"] < own["seen"]).to_numpy()
        # ages count from 0, turns from 1
        time = np.where(failed, own["last"] + 2, own["seen"] + 1)
        ages = int(own["seen"].max()) + 1
        curve = survival(time, failed, ages, statistics.confidence)
        keys = [cell | {"age": age} for age in range(ages)]
        rows += [row for row in _rows(keys, "remembered", by, curve) if row["estimate"] is not None]
        rows.append(_median(cell, "remembered_median", by, curve, len(time), first=0))
    return rows


# ----------------------------------------------------------------------------------------------------
# Rule against judge


def _agreement(verdicts: pl.DataFrame, statistics: Statistics) -> list[Row]:
    """Return Cohen's kappa, the share of equal verdicts and of questions without a verdict, by cell and by set."""
    asked = verdicts.filter(pl.col("judge").is_not_null() | pl.col("judge_error").is_not_null())
    asked = asked.with_columns(failed=pl.col("judge").is_null(), same=pl.col("rule") == pl.col("judge"))
    rows = []
    for key in (CELL, CELL[:1]):
        rows += _shares(asked, "failed", "judge_failed", key, statistics)
        both = asked.drop_nulls(["rule", "judge"])
        rows += _shares(both, "same", "agreement", key, statistics)
        for names, own in both.sort(key, maintain_order=True).group_by(key, maintain_order=True):
            verdict = [own[name].cast(pl.Float64).to_numpy() for name in RATERS]
            found = agreement.kappa(*verdict, own["cluster"].to_numpy(), statistics.confidence)
            rows.append(dict(zip(key, names, strict=True)) | {"statistic": "kappa"} | found)
    return rows


# ----------------------------------------------------------------------------------------------------
# The cache, turn by turn

SIZES = ("entries_before", "entries_after", "bytes_after", "total_bytes_after")


def sizes(answers: pl.DataFrame, statistics: Statistics) -> list[Row]:
    """Return mean entries per KV head and mean bytes of the cache at each turn, over the conversations."""
    rows, key = [], [*CELL, "turn"]
    lists = by_cell(answers.sort(*key, "conversation_id").select(*key, *SIZES, cluster="conversation_id"), key)
    for name in SIZES:
        found = intervals.mean(padded(lists[name]), statistics.confidence)
        rows += _rows(lists.select(key).to_dicts(), name, None, found)
    return [row for row in rows if row["n"]]


def write_retention(verdicts: str, chat: Sequence[str], output: str, statistics: Mapping[str, Any]) -> None:
    """Write ``tables.RETENTION`` from verdicts (tables.CHAT_VERDICTS) and answers (tables.CHAT)."""
    how = Statistics(**statistics)
    columns = [*CELL, "conversation_id", "turn", *SIZES]
    answers = pl.concat([frames.read_parquet(path, columns=columns) for path in chat], how="vertical_relaxed")
    rows = retention(read_verdicts(verdicts), how) + (sizes(answers, how) if answers.height else [])
    write_table(output, rows_to_table(rows, RETENTION), inherited(verdicts) | {"statistics": dict(statistics)})
