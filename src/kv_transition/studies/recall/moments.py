"""The comparison of entropy_recall with its controls: does entropy choose better moments to recall than chance?

A control recalls as often in the same example, at random or evenly spread moments. The paired difference of the scores
is the effect of the choice of moments. `never` and `always` are the bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl
import pyarrow as pa

from kv_transition import labels, parsing
from kv_transition.provenance import rows_to_table, write_table
from kv_transition.stats import intervals, paired
from kv_transition.stats.examples import Statistics, by_cell, inherited, padded
from kv_transition.stats.multiplicity import adjust
from kv_transition.studies.grid.tables import COMPARISONS

KIND = "entropy_recall"
CHANCE = ("random", "periodic")
BOUNDS = ("never", "always")
COUNTED = ("triggers", "moved_entries", "moved_bytes", "hot_bytes", "total_bytes")
CELL = ["task", "mode", "policy", "budget"]
Options = Mapping[str, Mapping[str, Any]]


def moments_of(policies: Options) -> dict[str, str]:
    """Return how each policy of this kind chooses its moments, by its name in ``kv.policies``."""
    own = {name: options or {} for name, options in policies.items() if (options or {}).get("kind", name) == KIND}
    return {name: options.get("moments", "entropy") for name, options in own.items()}


def pairs_of(policies: Options) -> list[tuple[str, str]]:
    """Return (treated, other): each policy that uses entropy, and each policy that it is compared with.

    A control belongs to the policy that it names (``like``), or to each if it names none; bounds have the same inner
    policy.
    """
    moments = moments_of(policies)
    inner = {name: (policies[name] or {}).get("inner", "h2o") for name in moments}
    found = []
    for treated in (name for name, how in moments.items() if how == "entropy"):
        for other, how in moments.items():
            like = (policies[other] or {}).get("like") or treated
            if inner[other] == inner[treated] and how != "entropy" and like == treated:
                found.append((treated, other))
    return found


def answers(scores: pa.Table, policies: Options) -> pl.DataFrame:
    """Return a row per cell of these policies, bin and example: score, cluster and `COUNTED`, means over repeats."""
    frame = pl.from_arrow(scores.select([*CELL, "example_id", "bin", "score", "raw", "alias", "cluster"]))
    frame = frame.filter(pl.col("policy").is_in(list(moments_of(policies))) & ~pl.col("alias").fill_null(False))
    counts = [pl.col("raw").str.json_path_match(f"$.{name}").cast(pl.Float64).alias(name) for name in COUNTED]
    return (
        frame.with_columns(*counts, pl.col("score").fill_nan(None), cluster=pl.coalesce("cluster", "example_id"))
        .group_by(*CELL, "bin", "example_id")
        .agg(pl.col("score", *COUNTED).mean(), pl.col("cluster").first())
        .sort(*CELL, "bin", "example_id")
    )


def points(scores: pa.Table, policies: Options, confidence: float) -> list[dict[str, Any]]:
    """Return each policy and budget with the mean score and the means of `COUNTED`, as estimate, ci_low, ci_high, n."""
    lists = by_cell(answers(scores, policies), CELL)
    if not lists.height:
        return []
    moments, clusters = moments_of(policies), padded(lists["cluster"])
    found = {"score": intervals.bounded_mean(padded(lists["score"]), confidence, clusters=clusters)}
    found |= {name: intervals.mean(padded(lists[name]), confidence, clusters) for name in COUNTED}
    return [
        key | {"moments": moments[key["policy"]]} | {name: interval.row(i) for name, interval in found.items()}
        for i, key in enumerate(lists.select(CELL).to_dicts())
    ]


def recall_moments(scores: pa.Table, policies: Options, statistics: Statistics) -> pa.Table:
    """Return the differences between entropy's moments and others on the same examples, over all lengths
    (tables.COMPARISONS).

    The p-value of ``score`` has the same inference as its interval. It is Holm-adjusted within a task and mode, over
    all policies and budgets whose control recalls at moments of chance. ``triggers`` and ``moved_bytes`` show whether
    the control recalled as often and moved as many bytes.
    """
    frame, rows = answers(scores, policies), []
    for treated, other in pairs_of(policies):
        key = ["task", "mode", "budget", "bin", "example_id"]
        both = frame.filter(policy=treated).join(frame.filter(policy=other), on=key, suffix="_other")
        if not both.height:
            continue
        rows += _differences(by_cell(both.sort(key), CELL), treated, other, moments_of(policies)[other], statistics)
    adjust(rows)
    return rows_to_table([{k: v for k, v in row.items() if k != "tests"} for row in rows], COMPARISONS)


def _differences(lists: pl.DataFrame, treated: str, other: str, how: str, statistics: Statistics) -> list[dict]:
    clusters, confidence = padded(lists["cluster"]), statistics.confidence
    gain = {name: padded(lists[name]) - padded(lists[f"{name}_other"]) for name in ("score", "triggers", "moved_bytes")}
    found = {name: intervals.mean(gain[name], confidence, clusters) for name in ("triggers", "moved_bytes")}
    tested = paired.difference(gain["score"], clusters)
    found["score"], p = tested.interval(confidence), tested.p
    rows = []
    for i, cell in enumerate(lists.select("task", "mode", "budget").to_dicts()):
        pair = cell | {"policy": treated, "reference_policy": other, "reference_budget": cell["budget"]}
        for name, interval in found.items():
            row = pair | {"statistic": name, **interval.row(i), "method": f"paired, {interval.method[i]}"}
            if name == "score" and row["n"]:
                row["p_value"] = float(p[i])
                if how in CHANCE:
                    row["family"] = "/".join((cell["task"], cell["mode"], "moments"))
            rows.append(row)
    return rows


def answer(row: Mapping[str, Any], how: str, alpha: float) -> str:
    """Return a sentence on the difference in score from a control."""
    if row["estimate"] is None:
        return f"Unknown: no example was answered both at entropy's and at {how} moments."
    shown = labels.interval(row["estimate"], row["ci_low"], row["ci_high"], 3).replace("-", "−")
    said = f"score {shown} compared with {how} moments, n = {row['n']}, p = {row['p_holm']:.2g} after Holm"
    if row["p_holm"] < alpha and row["ci_low"] > 0:
        return f"Yes: {said}."
    if row["p_holm"] < alpha and row["ci_high"] < 0:
        return f"No, entropy chooses worse moments: {said}."
    return f"Not shown: {said}; a gain of more than {max(row['ci_high'], 0):.3f} is excluded."


def write_recall_moments(scores: str, output: str, statistics: Mapping[str, Any], policies: Options) -> None:
    """Write the table of the `recall_moments` rule; ``policies``: the configuration's ``kv.policies``."""
    columns = [*CELL, "example_id", "bin", "score", "raw", "alias", "cluster"]
    table = recall_moments(parsing.read_parquet(scores, columns=columns), policies, Statistics(**statistics))
    fields = inherited(scores) | {"statistics": dict(statistics), "policies": {k: dict(v) for k, v in policies.items()}}
    write_table(output, table, fields)
