"""Test the figures of the grid: their content, their data, and equal bytes when drawn twice."""

from __future__ import annotations

import json
import re
from pathlib import Path

import altair as alt
import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from simulated_scores import POLICIES, demo

from kv_transition import labels
from kv_transition.errors import UserError
from kv_transition.outputs import experiment
from kv_transition.studies.grid import entries, plots, tradeoff
from kv_transition.studies.grid.analysis.aggregate import write_aggregates
from kv_transition.studies.grid.analysis.transition import write_transition
from kv_transition.studies.grid.report import findings
from kv_transition.studies.grid.report import headline as verdict
from kv_transition.studies.grid.results import read_results

STATISTICS = {"confidence": 0.95, "resamples": 300, "seed": 0}


def analysed(folder: Path, scores: pa.Table) -> list[str]:
    """Write the tables that figures are drawn from; return the paths of scores, bin_stats, comparisons and
    transition."""
    paths = [str(folder / f"{name}.parquet") for name in ("scores", "bin_stats", "comparisons", "transition")]
    pq.write_table(scores, paths[0])
    write_aggregates(*paths[:3], STATISTICS)
    write_transition(paths[0], paths[3], STATISTICS)
    return paths


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> list[str]:
    return analysed(tmp_path_factory.mktemp("tables"), demo())


def text_of(svg: str) -> str:
    return " ".join(re.findall(r">([^<>]+)<", svg))


def test_figures_name_every_policy_the_lengths_n_and_the_intervals(tmp_path, tables):
    outputs = {"acc_vs_len_svg": str(tmp_path / "a.svg"), "acc_vs_len_png": str(tmp_path / "a.png")}
    plots.write_plots(*tables, outputs)
    words = text_of((tmp_path / "a.svg").read_text())
    for part in ("full", *POLICIES, "n = 20", "95 % intervals", "20 % of the cache kept", "After the prompt", "4.1k"):
        assert part in words
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_drawing_twice_gives_the_same_bytes(tmp_path, tables):
    for run in ("a", "b"):
        plots.write_plots(*tables, {
            "failures_svg": str(tmp_path / f"{run}.svg"), "failures_png": str(tmp_path / f"{run}.png"),
            "interactive": str(tmp_path / f"{run}.html"),
        })  # fmt: skip
    for ext in ("svg", "png", "html"):
        assert (tmp_path / f"a.{ext}").read_bytes() == (tmp_path / f"b.{ext}").read_bytes()
    page = (tmp_path / "a.html").read_text()
    assert not re.search(r"<(script|link)[^>]+(src|href)=", page), "the page must work offline"


def test_figures_are_valid_vega_lite(tables):
    """Check whole figures against the schema of Vega-Lite, because Altair does not check the parts that it makes."""
    results = read_results(*tables)
    drawn = [plots.along_length(results, name) for name in plots.FIGURES]
    drawn += [plots.failure_stack(results), plots.interactive(results), entries.entries_figure(results)]
    drawn += [draw(results) for draw in (tradeoff.front_figure, tradeoff.difference_figure)]
    drawn += [draw(results) for draw in (tradeoff.front_explorer, tradeoff.difference_explorer)]
    schema = jsonschema.Draft7Validator(alt.load_schema())
    assert [spec["title"]["text"] for spec in drawn if not schema.is_valid({**spec, "datasets": {}})] == []
    assert not schema.is_valid({**drawn[0], "datasets": {}, "vconcat": [{"layer": [{"mark": "no such mark"}]}]})


def test_failures_add_up_to_the_rate_in_the_table(tables):
    results = read_results(*tables)
    parts, totals = plots.failure_rows(results)
    for whole in totals:
        key = {k: whole[k] for k in ("task", "mode", "policy", "budget")}
        shares = sum(p["share"] for p in parts if all(p[k] == v for k, v in key.items()))
        rates = results.stats.filter(statistic="failure_rate", **key)["estimate"]
        assert shares == pytest.approx(rates.mean())
        assert whole["estimate"] == pytest.approx(shares)
        assert whole["n"] == 100


def test_numbers_on_bars_stand_in_the_part_of_their_kind(tables):
    """Check that kinds of failure can be told without colours: the number of the legend is inside its own part."""
    data = plots.failure_stack(read_results(*tables))["datasets"]
    numbered = 0
    for name, rows in data.items():
        if not rows or "number" not in rows[0]:
            continue
        bars = data[f"rows{int(name.removeprefix('rows')) - 2}"]
        for row in rows:
            own = [bar for bar in bars if bar["name"] == row["name"]]
            (part,) = (bar for bar in own if bar["failure"].startswith(f"{row['number']} "))
            left = sum(bar["share"] for bar in own if bar["order"] < part["order"])
            assert left < row["at"] < left + part["share"]
            numbered += 1
    assert numbered > 5


def test_where_nothing_was_timed_the_figure_says_why(tmp_path):
    """Check that the figure of latencies gives the reason if no latency was measured."""
    paths = analysed(tmp_path, demo(n=3, timed=False))
    plots.write_plots(*paths, {"latency_vs_len_svg": str(tmp_path / "l.svg")})
    assert "no answer ran alone at batch size 1" in text_of((tmp_path / "l.svg").read_text())


@pytest.mark.parametrize("keep", ["full only", "one policy, one bin"])
def test_small_experiments_are_drawn(tmp_path, keep):
    rows = demo(n=2).to_pylist()
    if keep == "full only":
        rows = [r for r in rows if r["policy"] == "full"]
    else:
        rows = [r for r in rows if r["policy"] in ("full", "h2o") and r["bin"] == 0 and r["mode"] == "after_prompt"]
    paths = analysed(tmp_path, pa.Table.from_pylist(rows, schema=demo(n=1).schema))
    outputs = {f"{name}_svg": str(tmp_path / f"{name}.svg") for name in plots.FIGURE_NAMES}
    plots.write_plots(*paths, outputs | {"interactive": str(tmp_path / "i.html")})
    assert "n = 2" in text_of((tmp_path / "acc_vs_len.svg").read_text())


def test_entries_over_the_answer_are_those_that_the_rows_recorded(tmp_path, tables):
    """Check mean, minimum and maximum for two answers of 3 and 2 tokens at a budget of 8; without data the figure says
    so."""
    rows = demo(n=2).to_pylist()
    held = iter([[[0, 8.0], [1, 9.0], [2, 8.0]], [[0, 10.0], [1, 12.0]]])
    for row in rows:
        if (row["policy"], row["budget"], row["mode"], row["bin"]) == ("h2o", "r0.5", "after_prompt", 0):
            row |= {"raw": json.dumps({"token_ids": [], "entries": next(held)}), "budget_entries": 8}
    paths = analysed(tmp_path, pa.Table.from_pylist(rows, schema=demo(n=1).schema))
    points = entries.entry_rows(read_results(*paths))
    assert {(p["policy"], p["budget"], p["mode"]) for p in points} == {("h2o", "r0.5", "after_prompt")}
    assert [(p["step"], p["estimate"], p["low"], p["high"], p["n"]) for p in points] == [
        (0, 9 / 8, 1.0, 10 / 8, 2),
        (1, 10.5 / 8, 9 / 8, 12 / 8, 2),
        (2, 1.0, 1.0, 1.0, 1),
    ]
    for some, words in ((paths, "50 % of the cache kept"), (tables, "Nothing to draw: no answer was compressed")):
        plots.write_plots(*some, {"entries_over_steps_svg": str(tmp_path / "e.svg")})
        assert words in text_of((tmp_path / "e.svg").read_text())


def test_aliases_of_the_full_cache_are_not_drawn(tmp_path):
    rows = demo(n=2).to_pylist()
    rows += [r | {"policy": "tova", "alias": True} for r in rows if r["policy"] == "full"]
    results = read_results(*analysed(tmp_path, pa.Table.from_pylist(rows, schema=demo(n=1).schema)))
    assert {budget for _, _, budget in results.panels} == {"r0.5", "r0.2"}


def test_the_front_is_what_no_other_point_beats(tables):
    """Compare the Pareto front of score and bytes with a loop over all pairs of points."""
    results = read_results(*tables)
    points = tradeoff.front(results)
    assert len(points) == 2 * (1 + 5 * 2)
    for mode in ("before_question", "after_prompt"):
        own = [(p["bytes"], p["estimate"], p["best"]) for p in points if p["mode"] == mode]
        for size, score, best in own:
            dominated = any(
                (s <= size and e >= score) and (s, e) != (size, score) for s, e, _ in own
            )  # not worse in bytes and score, and different in at least one
            assert best == (not dominated)
        assert max(own, key=lambda p: p[1])[2], "the highest score is always on the front"


def test_footprints_are_mean_shares_of_bytes(tables):
    results = read_results(*tables)
    found = tradeoff.footprints(results)
    for policy, budget in (("h2o", "r0.2"), ("full", "r1")):
        rows = results.scores.filter(mode="after_prompt", policy=policy, budget=budget).to_dicts()
        shares = [row["cache_bytes"] / row["full_bytes"] for row in rows]
        row = found["reader_qa", "after_prompt", policy, budget]
        assert row["estimate"] == pytest.approx(sum(shares) / len(shares))
        assert row["n"] == 100


def test_what_is_kept_in_other_memory_is_not_saved(tmp_path):
    """Check a policy that is as good as the full cache and holds all entries in two memories: it has no smallest
    budget."""
    rows = demo().to_pylist()
    for row in rows:
        if row["policy"] == "h2o":
            full = next(
                r for r in rows if all(r[k] == row[k] for k in ("mode", "example_id")) and r["policy"] == "full"
            )
            row |= {name: full[name] for name in ("score", "em", "f1", "contains", "failure")}
            row["raw"] = json.dumps({"total_bytes": row["full_bytes"]})
        elif row["policy"] != "full":
            row["raw"] = json.dumps({"token_ids": [1]})
    scores = pa.Table.from_pylist(rows, schema=demo().schema)
    results = read_results(*analysed(tmp_path, scores))
    assert results.keeping_all == ["h2o"]
    assert tradeoff.footprints(results)["reader_qa", "after_prompt", "h2o", "r0.2"]["estimate"] == 1.0
    assert tradeoff.footprints(results)["reader_qa", "after_prompt", "snapkv", "r0.2"]["estimate"] < 0.25
    for words in (*verdict.answer(results, "reader_qa", "after_prompt"), *findings.findings(results)[0]["sentences"]):
        assert "h2o" not in words
    assert any("h2o evicts stay in host memory" in words for words in experiment.limits({}, results))


def test_a_policy_with_a_footprint_of_its_own_is_no_alias(tmp_path):
    """Check that a quantized cache at a budget of 1 is drawn, and that an alias of the full cache is not."""
    rows = demo().to_pylist()
    own = [row | {"policy": "quantized", "budget": "r1"} for row in rows if row["policy"] == "h2o"]
    own = [row for row in own if row["kept_final"] < 0.3 * row["prompt_tokens"]]
    alias = [row | {"policy": "h2o", "alias": True} for row in rows if row["policy"] == "full"]
    results = read_results(*analysed(tmp_path, pa.Table.from_pylist(rows + own + alias, schema=demo().schema)))
    assert ("quantized", "r1") in results.pairs
    assert ("h2o", "r1") not in results.pairs
    assert ("quantized", "r1") in {(point["policy"], point["budget"]) for point in tradeoff.front(results)}


def test_without_bytes_there_is_a_word_instead_of_a_front(tmp_path):
    rows = [r | {"cache_bytes": None, "full_bytes": None} for r in demo(n=2).to_pylist()]
    paths = analysed(tmp_path, pa.Table.from_pylist(rows, schema=demo(n=1).schema))
    plots.write_plots(*paths, {"front_svg": str(tmp_path / "f.svg")})
    assert "bytes of the cache were not measured" in text_of((tmp_path / "f.svg").read_text())
    assert tradeoff.front_explorer(read_results(*paths)) is None


def test_differences_are_written_with_their_sign():
    row = {"estimate": -0.314, "ci_low": -0.41, "ci_high": 0.001}
    assert labels.signed(row) == "−0.31 [−0.41, 0.00]"
    assert labels.signed({"estimate": 0.5, "ci_low": None, "ci_high": 0.62}) == "+0.50 […, +0.62]"
    assert labels.signed({"estimate": None, "ci_low": None, "ci_high": None}) == "–"


def test_an_unknown_figure_is_named(tables, tmp_path):
    with pytest.raises(UserError, match="no figure is called 'pie_svg'"):
        plots.write_plots(*tables, {"pie_svg": str(tmp_path / "p.svg")})
