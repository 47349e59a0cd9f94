"""Export the results: CSV tables, summary.json, matched_budget.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from kv_transition import labels
from kv_transition.outputs import experiment
from kv_transition.outputs.sqlite import write_sqlite
from kv_transition.provenance import atomic_path, read_metadata, write_json
from kv_transition.stats import frames
from kv_transition.studies.grid.analysis import scale
from kv_transition.studies.grid.analysis.noninferiority import KEPT
from kv_transition.studies.grid.report import card
from kv_transition.studies.grid.results import Results, Row, read_results
from kv_transition.studies.grid.tradeoff import footprints

VERSION = 2
RAW = "raw"  # the engine's response as JSON, which is in the Parquet file and in SQLite only


def write_csv(table: str, output: str) -> None:
    """Write a Parquet table as CSV: lists joined by `` | ``, empty for null, without the engine's raw responses."""
    frame = frames.read_parquet(table)
    lists = [name for name, kind in frame.schema.items() if isinstance(kind, pl.List)]
    frame = frame.with_columns(pl.col(name).cast(pl.List(pl.String)).list.join(" | ") for name in lists)
    with atomic_path(output) as temporary:
        frame.drop(RAW, strict=False).write_csv(temporary)


def summary(results: Results, settings: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the verdict as JSON values: every policy and budget with its score, footprint, speed and transition.

    An estimate is an object of estimate, ci_low, ci_high and n, or null if nothing was measured.
    """
    kept_bytes = footprints(results)
    zones = {
        tuple(row[k] for k in ("task", "mode", "policy", "budget")): row
        for row in results.transition.filter(detector="definition").iter_rows(named=True)
    }
    rows = []
    for task, mode in results.groups:
        tokens = {b["bin"]: [b["token_min"], b["token_max"]] for b in results.bins(task)}
        for policy, budget in results.pairs[1:]:
            compared = {
                name: results.compared(task, mode, policy, budget, None, statistic)
                for name, statistic in (
                    ("score_kept", "score_ratio"), ("score_difference", "score"),
                    ("failure_rate_difference", "failure_rate"), ("speedup", "speedup"),
                )
            }  # fmt: skip
            if compared["score_kept"] is None:
                continue
            zone = zones.get((task, mode, policy, budget))
            rows.append({
                "task": task, "mode": mode, "policy": policy, "budget": budget, "kept": labels.budget(budget),
                "outcome": zone and zone["outcome"], "n_decides": zone and zone["n_decides"],
                "since_tokens": zone and tokens.get(zone["since_bin"]),
                "bytes_kept": _plain(kept_bytes.get((task, mode, policy, budget))),
                **{name: _plain(row) for name, row in compared.items()},
                "transition": zone and {
                    "reason": zone["reason"],
                    "onset_tokens": tokens.get(zone["onset_bin"]), "collapse_tokens": tokens.get(zone["collapse_bin"]),
                },
            })  # fmt: skip
    return {
        "version": VERSION,
        "experiment": settings.get("experiment"),
        "model": experiment.model_name(settings),
        "commit": experiment.commit(settings),
        "answers": results.scores.height,
        "confidence": results.confidence,
        "outcomes": {word: text.format(kept=f"{100 * KEPT:g} %") for word, text in scale.DEFINITIONS.items()},
        "clock": metadata.get("clock"),
        "results": rows,
    }


def _plain(row: Row | None) -> dict[str, Any] | None:
    if row is None or row["estimate"] is None:
        return None
    return {k: row[k] for k in ("estimate", "ci_low", "ci_high", "n")}


def write_exports(
    *,
    tables: Mapping[str, str],
    config: str,
    csv_dir: str,
    summary_json: str | None = None,
    card_json: str | None = None,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write ``{csv_dir}/{table}.csv`` for every table, summary.json and matched_budget.json; arguments are paths.

    ``tables``: scores, bin_stats, comparisons and transition, or none in an experiment without tasks, which has neither
    a summary nor a card. ``extra``: further tables by name; files that do not exist are omitted. Raises UserError as
    `read_results` does.
    """
    for name, path in {**tables, **(extra or {})}.items():
        if Path(path).is_file():
            write_csv(path, f"{csv_dir}/{name}.csv")
    if not tables:
        return
    results, settings = read_results(**tables), experiment.read_config(config)
    metadata = read_metadata(tables["scores"])
    write_json(summary_json, summary(results, settings, metadata))
    write_json(card_json, card.matched_budget(results, settings, metadata))


def write_all(
    *,
    config: str,
    manifests: Sequence[str],
    extra: Mapping[str, str],
    csv: str,
    summary: str | None = None,
    card: str | None = None,
    sqlite: str | None = None,
    **answered: str,
) -> None:
    """Write the CSV tables, summary.json, matched_budget.json and the SQLite database; arguments are paths.

    ``answered``: scores, bin_stats, comparisons and transition, or none in an experiment without tasks.
    """
    write_exports(tables=answered, config=config, csv_dir=csv, summary_json=summary, card_json=card, extra=extra)
    if sqlite:
        copied = dict(extra) | {name: path for name, path in answered.items() if name == "comparisons"}
        own = {name: path for name, path in answered.items() if name != "comparisons"}
        write_sqlite(**own, output=sqlite, config=config, manifests=manifests, extra=copied)
