"""A leaderboard of several experiments: leaderboard.json in one schema, and a page with a sortable table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import polars as pl
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kv_transition.errors import UserError
from kv_transition.outputs import experiment
from kv_transition.parsing import parse_json
from kv_transition.provenance import write_json, write_text
from kv_transition.report import page
from kv_transition.stats.examples import FULL

FILE, PAGE = "leaderboard.json", "leaderboard.html"
_BESIDE = {
    "kept": "kept_mean",
    "footprint": "footprint",
    "cache_bytes": "cache_bytes",
    "failure_rate": "failure_rate",
    "tokens_per_s": "tokens_per_s",
}
"""column of an entry: the statistic of bin_stats that it is read from"""

Share = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Entry(_Strict):
    """The score of one cell of an experiment: a task, length bin, policy and budget."""

    experiment: str
    model: str
    dataset: str
    task: str
    mode: str
    policy: str
    budget: str
    bin: Annotated[int, Field(ge=0)]
    token_min: int | None = None
    token_max: int | None = None
    metric: str
    score: Share
    ci_low: Share | None
    ci_high: Share | None
    n: Annotated[int, Field(ge=0)]
    method: str
    kept: float | None = None
    footprint: float | None = None
    cache_bytes: float | None = None
    failure_rate: float | None = None
    tokens_per_s: float | None = None


class Leaderboard(_Strict):
    """The content of leaderboard.json."""

    version: Literal[1] = 1
    entries: list[Entry]


def leaderboard(sources: Sequence[str], output: str) -> None:
    """Write leaderboard.json and leaderboard.html from several results folders or leaderboard.json files.

    Raises UserError if a folder contains no scored experiment, a file does not match the schema, or two sources contain
    the same cell.
    """
    entries = [entry for source in sources for entry in _entries(Path(source))]
    seen: set[tuple[Any, ...]] = set()
    for entry in entries:
        key = tuple(getattr(entry, name) for name in ("experiment", "model", "task", "mode", "policy", "budget", "bin"))
        if key in seen:
            raise UserError(f"{entry.experiment}: {entry.policy} at {entry.budget} of {entry.task} is given twice")
        seen.add(key)
    folder = Path(output)
    write_json(folder / FILE, Leaderboard(entries=entries).model_dump())
    write_text(folder / PAGE, render(entries))


def render(entries: Sequence[Entry]) -> str:
    """Return the HTML page of entries, the best scores first; all text is escaped, and it needs no other file."""
    rows = sorted((entry.model_dump() for entry in entries), key=lambda row: (-row["score"], row["policy"]))
    return page.environment(html=True).get_template("leaderboard.html.jinja").render(rows=rows)


def _entries(source: Path) -> list[Entry]:
    if source.is_file():
        return _from_file(source)
    if not source.is_dir():
        raise UserError(f"{source}: there is no such folder; give results folders or {FILE} files")
    table = source / "bin_stats.parquet"
    if not table.is_file():
        raise UserError(f"{source}: it has no bin_stats.parquet; run the experiment up to its report first")
    config = experiment.read_config(str(source / "config.yaml"))
    return _from_table(_read(table), _read(source / "scores.parquet", ["task", "metric"]), config)


def _read(path: Path, columns: list[str] | None = None) -> pl.DataFrame:
    try:
        return pl.read_parquet(path, columns=columns)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _from_file(path: Path) -> list[Entry]:
    value = parse_json(path.read_text(encoding="utf-8"), str(path))
    try:
        return Leaderboard.model_validate(value).entries
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {where} does not match the schema in docs/leaderboard.md ({first['msg']})") from None


def _from_table(stats: pl.DataFrame, scores: pl.DataFrame, config: Mapping[str, Any]) -> list[Entry]:
    cell = ["task", "mode", "policy", "budget", "bin"]
    metrics = dict(scores.unique("task").select("task", "metric").iter_rows())
    values = {
        (name, *row[:-1]): row[-1]
        for name, statistic in _BESIDE.items()
        for row in stats.filter(pl.col("statistic") == statistic).select(*cell, "estimate").iter_rows()
    }
    about = {
        "experiment": str(config.get("experiment", "unknown")),
        "model": experiment.model_name(config),
        "dataset": str((config.get("dataset") or {}).get("name", "unknown")),
    }
    found = []
    wanted = [*cell, "token_min", "token_max", "estimate", "ci_low", "ci_high", "n", "method"]
    # a policy that keeps everything is the full cache, which has rows of its own
    alias = (pl.col("budget") == FULL["budget"]) & (pl.col("policy") != FULL["policy"])
    main = stats.filter((pl.col("statistic") == "score_mean") & pl.col("estimate").is_not_null() & ~alias)
    for row in main.select(wanted).iter_rows(named=True):
        key = tuple(row[name] for name in cell)
        beside = {name: _finite(values.get((name, *key))) for name in _BESIDE}
        metric = metrics.get(row["task"]) or "score"
        limits = {name: _finite(row[name]) for name in ("ci_low", "ci_high")}
        plain = {name: row[name] for name in (*cell, "token_min", "token_max", "n", "method")}
        found.append(Entry(**about, **plain, **limits, **beside, metric=metric, score=row["estimate"]))
    return found


def _finite(value: float | None) -> float | None:
    return None if value is None or value != value or abs(value) == float("inf") else value


def schema() -> str:
    """Return the JSON schema of leaderboard.json."""
    return json.dumps(Leaderboard.model_json_schema(), indent=1)
