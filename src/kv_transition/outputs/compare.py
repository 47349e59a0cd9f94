"""Compare two experiments on the same examples: another model, other code or other settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import polars.selectors as cs
from statsmodels.stats.multitest import multipletests

from kv_transition import labels
from kv_transition.errors import UserError
from kv_transition.outputs import experiment
from kv_transition.plotting import panels, save
from kv_transition.provenance import atomic_path
from kv_transition.report import page
from kv_transition.report.numbers import number
from kv_transition.stats import frames
from kv_transition.studies.grid import tradeoff
from kv_transition.studies.grid.analysis.aggregate import Statistics, comparisons
from kv_transition.studies.grid.tables import SCORES

CELL = ["task", "mode", "policy", "budget"]
UNIT = [*CELL, "example_id", "repeat"]
SAME = ["question", "answers"]
# Keys that always differ between experiments, or only name a folder.
_NO_SETTING = ("experiment", "output", "report", "provenance", "hardware")


def compare(results_a: str, results_b: str, output: str) -> None:
    """Write report.md, report.html and differences.csv into the folder ``output``: B minus A, paired by example.

    ``results_a`` and ``results_b`` are folders of finished experiments (scores.parquet and config.yaml in each).
    Examples are the same if task, id, question and gold answers are equal; bins are those of A. Intervals and tests are
    those of every comparison in the project, with A's confidence; Holm within one task, mode and statistic.

    Raises UserError if a file is missing or the two experiments have no answer in common.
    """
    a, b = _scores(results_a), _scores(results_b)
    config_a, config_b = (experiment.read_config(f"{folder}/config.yaml") for folder in (results_a, results_b))
    statistics = experiment.statistics(config_a, f"{results_a}/config.yaml")
    name_a, name_b = _names(results_a, results_b, config_a, config_b)
    paired_a, paired_b, matching = _matched(a, b)
    if not paired_a.height:
        raise UserError(
            f"{results_a} and {results_b} have no answer in common; compare experiments that share tasks, examples, "
            "modes, policies and budgets"
        )
    table = differences(paired_a, paired_b, statistics)
    folder = Path(output)
    with atomic_path(folder / "differences.csv") as temporary:
        table.write_csv(temporary)
    groups = list(_groups(table, paired_a))
    context = {
        "title": f"{name_b} against {name_a}",
        "a": name_a, "b": name_b, "folders": {"A": results_a, "B": results_b},
        "models": {"A": experiment.model_name(config_a), "B": experiment.model_name(config_b)},
        "commits": {"A": experiment.commit(config_a), "B": experiment.commit(config_b)},
        "confidence": f"{100 * statistics.confidence:g} %",
        "settings": setting_differences(config_a, config_b),
        "matching": matching,
        "answer": _answer(groups, name_a, name_b, 1 - statistics.confidence),
        "groups": groups,
        "citation": experiment.citation(config_b),
        "charts": {},
    }  # fmt: skip
    svg = save.svg(_figure(groups, context))
    context["figure"] = {"svg": page.inline_svg(svg, "differences", f"Score of {name_b} minus score of {name_a}")}
    drawing_path = folder / "differences.svg"
    with atomic_path(drawing_path) as temporary:
        temporary.write_text(svg, encoding="utf-8")
    page.write_markdown(str(folder / "report.md"), "compare.md.jinja", context)
    page.write_page(str(folder / "report.html"), "compare.html.jinja", context)


def _scores(folder: str) -> pl.DataFrame:
    path = Path(folder) / "scores.parquet"
    if not path.is_file():
        raise UserError(f"{folder}: there is no scores.parquet in it; give the results folder of a finished experiment")
    found = frames.read_parquet(path)
    if lacking := [name for name in SCORES.names if name not in found.columns]:
        raise UserError(f"{path} has no column {lacking[0]}, because another version wrote it; score the answers again")
    return found.filter(~pl.col("alias")).with_columns(cs.float().fill_nan(None))


def _names(folder_a: str, folder_b: str, config_a: Mapping, config_b: Mapping) -> tuple[str, str]:
    """Return the names of the experiments, or their folders if the names are equal."""
    names = tuple(str(c.get("experiment", Path(f).name)) for c, f in ((config_a, folder_a), (config_b, folder_b)))
    if names[0] != names[1]:
        return names
    folders = tuple(Path(f).resolve() for f in (folder_a, folder_b))
    if folders[0].name != folders[1].name:
        return folders[0].name, folders[1].name
    return f"{names[0]} (A)", f"{names[1]} (B)"


def _matched(a: pl.DataFrame, b: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame, dict[str, int]]:
    """Return the answers that both experiments have (B's in A's bins), and the numbers of answers that were omitted."""
    pairs = a.select(*UNIT, "bin", *SAME, "prompt_sha256").join(
        b.select(*UNIT, *SAME, "prompt_sha256"), on=UNIT, suffix="_b"
    )
    same = pairs.filter(pl.all_horizontal(pl.col(c).eq_missing(pl.col(f"{c}_b")) for c in SAME))
    key = same.select(*UNIT, "bin")
    matching = {
        "common": same.height,
        "only_a": a.height - pairs.height,
        "only_b": b.height - pairs.height,
        "other_content": pairs.height - same.height,
        "other_prompt": same.filter(pl.col("prompt_sha256") != pl.col("prompt_sha256_b")).height,
    }
    return a.join(key.drop("bin"), on=UNIT), b.drop("bin").join(key, on=UNIT), matching


def differences(a: pl.DataFrame, b: pl.DataFrame, statistics: Statistics) -> pl.DataFrame:
    """Return B minus A for each task, mode, policy, budget and bin (null: all): the columns of tables.COMPARISONS.

    ``score`` and ``failure_rate``; over all bins also ``score_ratio`` (B over A) and ``speedup`` (A's time over B's).
    """
    # Reuse the comparison with the full cache: A takes the place of the full cache, B that of the policy.
    cells = pl.concat([frame.select(CELL) for frame in (a, b)]).unique().sort(CELL).with_row_index("cell")
    one, other = (frame.join(cells, on=CELL).with_columns(task=pl.col("cell").cast(pl.String)) for frame in (a, b))
    one = one.with_columns(policy=pl.lit("full"), budget=pl.lit("r1"))
    other = other.with_columns(policy=pl.lit("b"), budget=pl.lit("b"))
    shared = [name for name in one.columns if name in other.columns]
    found = comparisons(pl.concat([one.select(shared), other.select(shared)]).to_arrow(), statistics)
    table = pl.from_arrow(found).with_columns(cell=pl.col("task").cast(cells.schema["cell"])).drop(CELL)
    table = table.drop("holm_low", "holm_high")  # they would be those of a family of one test
    table = table.join(cells, on="cell", maintain_order="left").drop("cell", "reference_policy", "reference_budget")
    scope = pl.when(pl.col("bin").is_null()).then(pl.lit("all bins")).otherwise(pl.lit("by bin"))
    family = pl.concat_str("task", "mode", "statistic", scope, separator="/")
    table = table.with_columns(family=pl.when(pl.col("p_value").is_not_null()).then(family))
    adjusted = [
        part.with_columns(p_holm=pl.Series(multipletests(part["p_value"].to_numpy(), method="holm")[1]))
        for part in table.drop_nulls("family").partition_by("family", maintain_order=True)
    ]
    rest = table.filter(pl.col("family").is_null())
    order = [*CELL, "bin", "statistic"]
    every = pl.concat([*adjusted, rest], how="vertical_relaxed").sort(order, nulls_last=True)
    return every.select(*order, pl.exclude(order))


def _groups(table: pl.DataFrame, a: pl.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield the rows of the report's tables for each task and mode."""
    bins = {
        (task, bin): labels.token_range(low, high)
        for task, bin, low, high in a.group_by("task", "bin")
        .agg(pl.col("token_len").min(), high=pl.col("token_len").max())
        .iter_rows()
    }
    index = {tuple(row[k] for k in (*CELL, "bin", "statistic")): row for row in table.iter_rows(named=True)}
    found = set(table.select("task", "mode").iter_rows())
    for task, mode in sorted(found, key=lambda g: (g[0], list(labels.MODES).index(g[1]))):
        own = table.filter(task=task, mode=mode)
        numbers = sorted(b for t, b in bins if t == task)
        cells = sorted(set(own.select("policy", "budget").iter_rows()), key=lambda c: (labels.budget_order(c[1]), c[0]))
        rows = []
        for policy, budget in cells:

            def at(statistic: str, bin: int | None = None, cell: tuple = (policy, budget)) -> dict[str, Any] | None:
                return index.get((task, mode, *cell, bin, statistic))  # noqa: B023, called at once

            score, failed = at("score"), at("failure_rate")
            rows.append({
                "policy": policy, "budget": labels.budget(budget), "name": f"{policy}, {labels.budget(budget)}",
                "score": number(score, "differences", signed=True), "p": labels.tested(score),
                "failed": number(failed, "differences", signed=True), "failed_p": labels.tested(failed),
                "ratio": number(at("score_ratio"), "differences", 0, 100, " %"),
                "speed": number(at("speedup"), "differences", 2, 1, "×"),
                "n": score["n"], "raw": score,
                "bins": [number(at("score", b), "differences", signed=True) for b in numbers],
            })  # fmt: skip
        heads = [{"tokens": bins[task, b], "n": {row["bins"][i].n for row in rows}} for i, b in enumerate(numbers)]
        for head in heads:
            head["n"] = " to ".join(str(n) for n in sorted({min(head["n"]), max(head["n"])}))
        yield {"heading": f"{task}, compressed {labels.mode(mode)}", "rows": rows, "bins": heads}


def _answer(groups: list[dict[str, Any]], a: str, b: str, alpha: float) -> str:
    """Return one or two sentences on the differences."""
    rows = [(g, row) for g in groups for row in g["rows"] if row["raw"]["p_holm"] is not None]
    clear = [(g, row) for g, row in rows if row["raw"]["p_holm"] < alpha]
    if not clear:
        widest = max((abs(row["raw"][k]) for _, row in rows for k in ("ci_low", "ci_high")), default=None)
        hidden = "" if widest is None else f" A difference of up to {widest:.2f} cannot be excluded."
        return f"No difference in score is shown between {b} and {a}.{hidden}"
    better = sum(row["raw"]["estimate"] > 0 for _, row in clear)
    group, most = max(clear, key=lambda pair: abs(pair[1]["raw"]["estimate"]))
    return (
        f"{b} scores differently in {len(clear)} of {len(rows)} policies and budgets (better in {better}, worse in "
        f"{len(clear) - better}); most for {most['name']}, {group['heading']}: {most['score']} (n = {most['n']})."
    )


def _figure(groups: list[dict[str, Any]], context: Mapping[str, Any]) -> panels.Spec:
    policies = sorted({row["policy"] for g in groups for row in g["rows"]} - {"full"})
    data, drawn = panels.Datasets(), []
    for group in groups:
        rows = [
            {"policy": r["policy"], "name": r["name"], "estimate": r["raw"]["estimate"], "low": r["raw"]["ci_low"],
             "high": r["raw"]["ci_high"], "interval": str(r["score"]), "p": r["p"], "n": r["n"],
             "lengths": tradeoff.ALL_LENGTHS, "method": r["raw"]["method"]}
            for r in group["rows"]
        ]  # fmt: skip
        layers = tradeoff.forest(rows, policies, data, what=f"{context['b']} minus {context['a']}")
        drawn.append(panels.panel(layers, 300, {"step": 21}, panels.title(group["heading"])))
    note = f"score, same examples, over all lengths; {context['confidence']} intervals; right of the line: B is better"
    return panels.figure(drawn, 2, data, f"B, {context['b']}, minus A, {context['a']}", note)


def setting_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the keys of the configuration that differ between the two experiments, with both values."""
    flat_a, flat_b = (dict(_flat({k: v for k, v in c.items() if k not in _NO_SETTING})) for c in (a, b))
    keys = sorted(k for k in flat_a.keys() | flat_b.keys() if flat_a.get(k) != flat_b.get(k))
    return [(k, *("not there" if k not in flat else str(flat[k]) for flat in (flat_a, flat_b))) for k in keys]


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner
