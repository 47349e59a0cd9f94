from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from simulated_scores import POLICIES, demo

from kv_transition.analysis import plots
from kv_transition.analysis.aggregate import write_aggregates
from kv_transition.analysis.transition import write_transition
from kv_transition.errors import UserError

STATISTICS = {"confidence": 0.95, "resamples": 300, "seed": 0}


def analysed(folder: Path, scores: pa.Table) -> list[str]:
    """The tables that figures are drawn from: paths of scores, bin_stats and transition."""
    paths = [str(folder / f"{name}.parquet") for name in ("scores", "bin_stats", "transition")]
    pq.write_table(scores, paths[0])
    write_aggregates(paths[0], paths[1], str(folder / "comparisons.parquet"), STATISTICS)
    write_transition(paths[0], paths[2], STATISTICS)
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


def test_failures_add_up_to_the_rate_in_the_table(tables):
    results = plots.read_results(*tables)
    parts, totals = plots.failure_rows(results)
    for whole in totals:
        key = {k: whole[k] for k in ("task", "mode", "policy", "budget")}
        shares = sum(p["share"] for p in parts if all(p[k] == v for k, v in key.items()))
        rates = results.stats.filter(statistic="failure_rate", **key)["estimate"]
        assert shares == pytest.approx(rates.mean())
        assert whole["estimate"] == pytest.approx(shares)
        assert whole["n"] == 100


def test_where_nothing_was_timed_the_figure_says_why(tmp_path):
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
    outputs = {f"{name}_svg": str(tmp_path / f"{name}.svg") for name in (*plots.FIGURES, "failures")}
    plots.write_plots(*paths, outputs | {"interactive": str(tmp_path / "i.html")})
    assert "n = 2" in text_of((tmp_path / "acc_vs_len.svg").read_text())


def test_aliases_of_the_full_cache_are_not_drawn(tmp_path):
    rows = demo(n=2).to_pylist()
    rows += [r | {"policy": "tova", "alias": True} for r in rows if r["policy"] == "full"]
    results = plots.read_results(*analysed(tmp_path, pa.Table.from_pylist(rows, schema=demo(n=1).schema)))
    assert {budget for _, _, budget in results.panels} == {"r0.5", "r0.2"}


def test_an_unknown_figure_is_named(tables, tmp_path):
    with pytest.raises(UserError, match="no figure is called 'pie_svg'"):
        plots.write_plots(*tables, {"pie_svg": str(tmp_path / "p.svg")})
