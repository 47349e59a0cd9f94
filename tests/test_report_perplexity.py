"""Test the report section on perplexity, with windows that have known true values."""

from __future__ import annotations

import re

import numpy as np
import polars as pl
import pytest
import yaml
from simulated_windows import simulated
from test_report import Page

from kv_transition.errors import UserError
from kv_transition.outputs.build import build_report
from kv_transition.plotting.save import svg
from kv_transition.studies.perplexity import analysis, plots
from kv_transition.studies.perplexity import report as section

STATISTICS = {"confidence": 0.95, "resamples": 2000, "seed": 0}
POLICIES = {
    "full": {},
    "h2o": {},
    "stream": {"kind": "streaming_llm", "n_sink": 4},
    "entropy_merge": {},
    "entropy_drop": {},
    "merge_03": {"kind": "entropy_merge", "target": "threshold", "threshold": 0.3},
    "drop_03": {"kind": "entropy_drop", "target": "threshold", "threshold": 0.3},
    "merge_05": {"kind": "entropy_merge", "target": "threshold"},
}
COSTS = {(policy, r): cost for policy, cost in (("h2o", 0.2), ("stream", 0.4), ("entropy_merge", 0.1),
                                                ("entropy_drop", 0.2)) for r in ("r0.5", "r0.2")} | {
    ("merge_03", "r1"): 0.05, ("drop_03", "r1"): 0.1, ("merge_05", "r1"): 0.02}  # fmt: skip


def experiment(model: str = "resources/tiny-reader") -> dict:
    return {
        "experiment": "text", "model": {"name": model, "dtype": "float32"}, "kv": {"policies": POLICIES},
        "perplexity": {"corpus": "pg19", "stride": 64}, "statistics": STATISTICS,
    }  # fmt: skip


def make(folder, windows: pl.DataFrame, settings=None) -> tuple[str, str]:
    windows.write_parquet(folder / "windows.parquet")
    tables = {name: str(folder / f"{name}.parquet") for name in ("perplexity", "perplexity_pairs")}
    analysis.write_perplexity([str(folder / "windows.parquet")], *tables.values(), STATISTICS, POLICIES)
    (folder / "plots").mkdir()
    drawings = {f"{name}_svg": str(folder / f"plots/{name}.svg") for name in plots.FIGURES}
    plots.write_perplexity_plots(*tables.values(), POLICIES, 0.95, drawings)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings or experiment()))
    build_report(
        manifests=[], config=str(folder / "config.yaml"), plots_dir=str(folder / "plots"), extra=tables,
        output_md=str(folder / "report.md"), output_html=str(folder / "report.html"),
    )  # fmt: skip
    return (folder / "report.md").read_text(), (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("perplexity")
    return folder, *make(folder, simulated(np.random.default_rng(0), COSTS, lengths=(128, 256)))


def test_an_experiment_without_tasks_has_the_section(made):
    _, text, page = made
    assert "## Perplexity" in text
    assert 'data-chart="perplexity"' in page
    for name in plots.FIGURES:
        assert f"plots/{name}.svg" in text
        assert f'id="figure-{name}"' in page
    assert "None" not in text
    assert "nan" not in re.findall(r"[a-z]+", text.lower())


def test_the_page_is_well_formed(made):
    _, _, page = made
    parsed = Page(page)
    assert not parsed.open
    assert len(set(parsed.ids)) == len(parsed.ids)


def test_numbers_are_those_of_the_table(made):
    folder, _, page = made
    table = pl.read_parquet(folder / "perplexity.parquet")
    found = re.findall(r'data-from="perplexity/([^"]+)" data-n="(\d+)"[^>]*>([^<]+)<', page)
    assert len(found) > 50
    for place, n, shown in found:
        corpus, policy, budget, bin, name = place.split("/")
        at = pl.col("bin").is_null() if bin == "all" else pl.col("bin") == int(bin.removeprefix("bin"))
        row = table.filter(at, corpus=corpus, policy=policy, budget=budget).row(0, named=True)
        value = float(shown.split()[0].replace("\u00a0", " ").split()[0].rstrip("%"))
        assert value == pytest.approx(row[name] * (100 if "compression" in name else 1), rel=0.02, abs=0.06)
        assert int(n) == row["n"]


def test_the_sentences_name_the_best_and_the_worst(made):
    _, text, _ = made
    assert "with 20 % of the cache kept, entropy_merge loses the least" in text.replace("With", "with")
    assert "stream loses the most" in text


def test_what_is_exploratory_says_so(made, tmp_path):
    """Check that results on fewer than 20 books are marked as exploratory."""
    _, text, _ = made
    assert "There are at most 10 books, fewer than the required 20, so the results are exploratory" in text
    many, _ = make(tmp_path, simulated(np.random.default_rng(0), {("h2o", "r0.2"): 0.1}, books=20, windows=1))
    assert "exploratory" not in many[many.index("## Perplexity") : many.index("Setup")]


def test_merging_stands_beside_dropping(made):
    _, text, _ = made
    part = text[text.index("### Is merging better") : text.index("### Comparison with the study")]
    assert "| entropy_merge : entropy_drop |" in part
    assert "| merge_03 : drop_03 |" in part
    assert "merge_05" not in part
    assert len(re.findall(r"merging is better \|$", part, flags=re.MULTILINE)) >= 3
    whole = re.search(
        r"Of (\d+) comparisons .* in\s+(\d+), dropping in (\d+), and no difference is shown in\s+(\d+)", part
    )
    assert int(whole[1]) == sum(int(whole[i]) for i in (2, 3, 4)) == 3 * 3


def test_the_studys_figures_are_labelled_as_theirs(made, tmp_path):
    _, text, _ = made
    part = text[text.index("### Comparison with the study's expectations") :]
    assert "not measured here" in part
    assert "cannot be compared" in part
    # the nearest compression: 80 % is nearer than 50 % to 70 and 75 %
    for row in (
        "| Full Cache | 25–26 | 0 % | 3.0–3.5 GB | full |",
        "| EntropyMerged | 26–27 | 70 % | 0.9–1.2 GB | entropy_merge, 20 % |",
        "| H2O | 27–29 | 80 % | 0.6–0.8 GB | h2o, 20 % |",
        "| StreamingLLM | 27–30 | 75 % | 0.8–1.0 GB | stream, 20 % |",
    ):
        assert row in part
    same, _ = make(tmp_path, simulated(np.random.default_rng(0), COSTS), experiment("meta-llama/Llama-2-7b-hf"))
    assert "Model and corpus are the study's" in same


def test_markdown_tables_are_tables(made):
    _, text, _ = made
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        lines = block.splitlines()
        assert set(lines[1]) <= set("|-")
        assert len({line.count("|") for line in lines}) == 1


def test_lost_windows_are_told(tmp_path):
    """Check that windows without a score are counted in the text and in the table."""
    frame = simulated(np.random.default_rng(0), {("h2o", "r0.2"): 0.1})
    frame = frame.with_columns(
        nll_sum=pl.when((pl.col("policy") == "full") | (pl.col("window") > 0)).then(pl.col("nll_sum"))
    )
    text, _ = make(tmp_path, frame)
    assert "10 windows have no score" in text
    assert "40 (10), 10 without a score" in text


def test_one_book_leaves_no_interval(tmp_path):
    text, _ = make(tmp_path, simulated(np.random.default_rng(0), COSTS, books=1))
    assert "from 1 book" in text


def test_policies_that_differ_in_their_threshold_share_a_line():
    lines = plots.curves(POLICIES)
    assert lines["merge_03"] == lines["merge_05"] == "entropy_merge, thresholds"
    assert lines["drop_03"] == "drop_03"
    assert lines["entropy_merge"] == "entropy_merge"


def test_a_policy_is_drawn_at_its_own_perplexity(made):
    folder, *_ = made
    table = pl.read_parquet(folder / "perplexity.parquet")
    drawn = {(p["name"], p["budget"], p["bin"]): p for p in plots.points(table, POLICIES)}
    for row in table.iter_rows(named=True):
        point = drawn[row["policy"], row["budget"], row["bin"]]
        assert point["estimate"] == pytest.approx(row["perplexity"])
        if row["policy"] != "full":
            assert point["high"] / point["low"] == pytest.approx(row["ratio_high"] / row["ratio_low"])


def test_figures_of_nothing_say_so():
    """Check that figures without data give the reason."""
    nothing = pl.DataFrame(schema=pl.DataFrame(analysis.rows_to_table([], analysis.PERPLEXITY_STATS)).schema)
    pairs = pl.DataFrame(schema=pl.DataFrame(analysis.rows_to_table([], analysis.PERPLEXITY_PAIRS)).schema)
    assert "No window was scored" in svg(plots.compression_figure(nothing, POLICIES, 0.95))
    assert "No window was scored" in svg(plots.length_figure(nothing, POLICIES, 0.95))
    assert "No merging policy" in svg(plots.pairs_figure(pairs, 0.95))
    assert plots.explorer(nothing, POLICIES, 0.95) is None
    assert section.spans(nothing) == {}


def test_an_unknown_figure_is_refused(made):
    folder, *_ = made
    with pytest.raises(UserError, match="ppl_vs_time"):
        plots.write_perplexity_plots(
            str(folder / "perplexity.parquet"), str(folder / "perplexity_pairs.parquet"), POLICIES, 0.95,
            {"ppl_vs_time_svg": "x.svg"},
        )  # fmt: skip
