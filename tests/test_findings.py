"""Check that docs/findings.md agrees with the stored tables, and these with the stored windows and answers."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "benchmarks" / "results" / "real"
WINDOWS = sorted(path.parent.name for path in KEPT.glob("*/windows.parquet"))
ANSWERS = sorted(path.parent.name for path in KEPT.glob("*/answers.parquet"))


@pytest.fixture
def findings(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import findings

    for name, module in list(sys.modules.items()):
        if name.startswith("findings_") and hasattr(module, "IMAGES"):
            monkeypatch.setattr(module, "IMAGES", tmp_path)
    yield findings
    for name in [name for name in sys.modules if name.startswith("findings")] + ["document"]:
        sys.modules.pop(name, None)


def test_the_page_is_what_the_tables_say(findings):
    assert findings.PAGE.read_text(encoding="utf-8") == findings.page()


def test_other_pages_quote_the_sections(findings):
    for (path, place), name in findings.EXCERPTS.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        assert f"<!-- {place} -->" in text
        assert not (KEPT / name).is_dir() or findings.excerpt(name) in text
    assert findings.perplexity.front() in (ROOT / "README.md").read_text(encoding="utf-8")
    assert findings.perplexity.first_picture("") in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")


def test_every_experiment_file_of_a_command_is_there():
    page = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    files = re.findall(r"--configfile (\S+?\.yaml)", page)
    assert files
    assert all((ROOT / file).is_file() for file in files)


def test_every_picture_is_there():
    page = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    pictures = re.findall(r"\]\((images/[^)]+)\)", page)
    assert pictures
    assert all((ROOT / "docs" / picture).is_file() for picture in pictures)


@pytest.mark.parametrize("name", WINDOWS)
def test_perplexities_are_those_of_the_kept_windows(name):
    """Compare perplexity and ratio with exp of nats per token of each policy and of the full cache on the same
    windows."""
    windows = pl.read_parquet(KEPT / name / "windows.parquet")
    table = pl.read_parquet(KEPT / name / "perplexity.parquet")
    page = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    pooled = table.filter(pl.col("bin").is_null())
    assert pooled.height == windows.select("policy", "budget").n_unique()
    for row in table.to_dicts():
        there = windows if row["bin"] is None else windows.filter(bin=row["bin"])
        full = there.filter(policy="full")
        nats_full = full["nll_sum"].sum() / full["n_tokens"].sum()
        own = there.filter(policy=row["policy"], budget=row["budget"])
        nats = own["nll_sum"].sum() / own["n_tokens"].sum()
        assert row["n"] == own.height == full.height
        assert row["clusters"] == own["book_id"].n_unique()
        assert np.isclose(row["perplexity"], np.exp(nats), rtol=1e-9)
        assert np.isclose(row["ratio"], np.exp(nats - nats_full), rtol=1e-9)
        if name == "sinks" and row["bin"] is not None:
            assert f"| {row['policy']} | {np.exp(nats):.2f} |" in page
        elif name not in ("sinks", "ablation") and row["policy"] == "full" and row["bin"] is None:
            assert f"{np.exp(nats):.2f}" in page


def _examples_of_others(name: str) -> dict[tuple[str, int], int]:
    """Return the number of examples of the full cache in other kept runs, by task and longest prompt."""
    tables = [pl.read_parquet(KEPT / other / "bin_stats.parquet") for other in ANSWERS if other != name]
    rows = [row for table in tables for row in table.filter(statistic="score_mean", policy="full").to_dicts()]
    return {(row["task"], row["token_max"]): row["n"] for row in rows}


@pytest.mark.parametrize("name", ANSWERS)
def test_scores_are_means_of_the_kept_answers(name):
    answers = pl.read_parquet(KEPT / name / "answers.parquet")
    stats = pl.read_parquet(KEPT / name / "bin_stats.parquet").filter(statistic="score_mean")
    larger = _examples_of_others(name)
    page = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    assert stats.height
    for row in stats.to_dicts():
        own = answers.filter(**{key: row[key] for key in ("task", "mode", "policy", "budget", "bin")})
        assert row["n"] == own["example_id"].n_unique()
        assert np.isclose(row["estimate"], own["score"].mean())
        assert row["ci_low"] <= row["estimate"] <= row["ci_high"]
        if name == "lengths" and larger.get((row["task"], row["token_max"]), 0) > row["n"]:
            continue  # the page has the run with more examples
        assert f"{row['estimate']:.2f} [{row['ci_low']:.2f}, {row['ci_high']:.2f}]" in page


@pytest.mark.parametrize("name", [name for name in ("rules", "memory") if (KEPT / name).is_dir()])
def test_retention_is_the_share_of_the_kept_verdicts(name):
    verdicts = pl.read_parquet(KEPT / name / "verdicts.parquet").filter(pl.col("standing"))
    table = pl.read_parquet(KEPT / name / "retention.parquet").filter(by="rule", statistic="retention")
    page = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    assert table.height
    for row in table.to_dicts():
        own = verdicts.filter(policy=row["policy"], budget=row["budget"])
        own = own if row["turn"] is None else own.filter(turn=row["turn"])
        assert np.isclose(row["estimate"], own["rule"].mean())
        assert row["ci_low"] <= row["estimate"] <= row["ci_high"]
    for rule in verdicts["check_id"].unique() if name == "rules" else ():
        assert f"| {verdicts.filter(check_id=rule)['rule'].mean():.2f} [" in page


@pytest.mark.skipif(not (KEPT / "recall").is_dir(), reason="no run of real_recall is kept")
def test_moments_of_recall_are_counted_in_the_kept_windows():
    windows = pl.read_parquet(KEPT / "recall" / "windows.parquet")
    page = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    triggers, steps = (windows.filter(policy="recall_entropy")[name].sum() for name in ("triggers", "steps"))
    assert f"| where entropy is high | {100 * triggers / steps:.0f} % |" in page
    assert windows.filter(policy="recall_always").select((pl.col("triggers") == pl.col("steps")).all()).item()
    assert windows.filter(policy="recall_never")["triggers"].sum() == 0


@pytest.mark.parametrize("name", [name for name in ("chat", "chat_refinement") if (KEPT / name).is_dir()])
def test_changes_of_answers_are_means_of_the_kept_turns(name):
    """Compare the section with the mean difference from the full cache at each conversation's last turn."""
    turns = pl.read_parquet(KEPT / name / "turns.parquet").to_dicts()
    page = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    at = {(t["policy"], t["budget"], t["conversation_id"], t["turn"]): t["answer_nll"] for t in turns}
    last = {c: max(turn for *_, one, turn in at if one == c) for *_, c, _ in at}
    cells = {(policy, budget) for policy, budget, *_ in at if policy != "full"}
    assert cells
    for policy, budget in cells:
        apart = [at[policy, budget, c, turn] - at["full", "r1", c, turn] for c, turn in last.items()]
        assert re.search(
            rf"\| {len(apart)} \| {policy} \| {100 * float(budget[1:]):.0f} % \| {np.mean(apart):.2f} \[", page
        )


@pytest.mark.skipif(not (KEPT / "entropy_heads").is_dir(), reason="no run of real_entropy_heads is kept")
def test_gaps_are_means_of_the_kept_steps():
    """Compare the means of the lower and upper third of entropy with a sorted list of the measured steps."""
    observed = pl.read_parquet(KEPT / "entropy_heads" / "observations.parquet").to_dicts()
    page = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    measured = [row for row in observed if row["entropy_gap"] is not None and row["policy"] != "oracle"]
    entropies = sorted(row["entropy"] for row in measured)
    low, high = (entropies[round(share * (len(entropies) - 1))] for share in (1 / 3, 2 / 3))
    for policy, memory in {(row["policy"], row["memory"]) for row in measured}:
        own = [r for r in measured if (r["policy"], r["memory"], r["budget"]) == (policy, memory, "r0.2")]
        thirds = [[r["entropy_gap"] for r in own if r["entropy"] <= low],
                  [r["entropy_gap"] for r in own if r["entropy"] >= high]]  # fmt: skip
        line = next(line for line in page.splitlines() if line.startswith(f"| {policy} | {memory} | "))
        assert re.search(r"\| {:.2f} \[.*\| {:.2f} \[".format(*map(np.mean, thirds)), line)
