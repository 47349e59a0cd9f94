"""Test two small studies on the embedded models, from their configuration to the report."""

from __future__ import annotations

import json

import polars as pl
import pytest
import yaml
from project import ROOT, Project

pytestmark = pytest.mark.slow


def study(tmp_path, name: str, **changes) -> Project:
    """Run the study of this name in a separate project; ``changes`` replace keys of its sections."""
    project = Project(tmp_path)
    config = yaml.safe_load((ROOT / f"config/experiments/{name}.yaml").read_text(encoding="utf-8"))
    for section, keys in changes.items():
        config[section] = config.get(section, {}) | keys
    project.configure(config | {"experiment": "small"})
    project.run()
    assert not project.planned()
    return project


def test_entropy_and_recall(tmp_path):
    kinds = ("full", "h2o", "recall", "recall_random", "recall_always", "recall_never")
    policies = yaml.safe_load((ROOT / "config/experiments/entropy_recall_tiny.yaml").read_text())["kv"]["policies"]
    project = study(
        tmp_path,
        "entropy_recall_tiny",
        dataset={"lengths": [160], "n_per_length": 10},
        binning={"n_bins": 1, "n_per_bin": 6},
        kv={"policies": {name: policies[name] for name in kinds}},
        observe={"budgets": [0.2], "max_tokens": 4, "entropy_gap_every": 2},
        statistics={"resamples": 200},
    )
    steps = pl.read_parquet(project.results / "observations/reader_mixed/bin0.parquet")
    asked = pl.read_parquet(project.results / "data/reader_mixed/bin0.parquet")
    kinds_asked = {json.loads(meta)["kind"] for meta in asked["meta"]}
    assert set(steps["prompt_kind"]) <= kinds_asked | {"continuation"}
    assert {"ambiguous", "continuation"} <= set(steps["prompt_kind"])
    assert set(steps["policy"]) == {"h2o", "oracle"}
    assert steps.filter(policy="oracle", memory="ideal")["recall"].min() == 1.0

    scores = pl.read_parquet(project.results / "scores.parquet").filter(~pl.col("alias"))
    texts = {
        name: dict(scores.filter(policy=name).select("example_id", "text").iter_rows())
        for name in set(scores["policy"])
    }
    assert texts["recall_never"] == texts["h2o"]
    facts = {
        name: [json.loads(raw) for raw in scores.filter(policy=name).sort("example_id")["raw"]]
        for name in ("recall", "recall_always")
    }
    assert all(row["triggers"] == row["steps"] for row in facts["recall_always"])
    calibration = json.loads((project.results / "calibration/reader_mixed.json").read_text())
    assert not set(calibration["example_ids"]) & set(scores["example_id"])
    entropies = calibration["entropies"]
    place = 0.7 * (len(entropies) - 1)
    below, above = entropies[int(place)], entropies[min(int(place) + 1, len(entropies) - 1)]
    assert all(below <= row["tau"] <= above for row in facts["recall"])

    report = (project.results / "report.md").read_text()
    for words in ("## Entropy and recall", "recall_random", "stay in host memory"):
        assert words in report


def test_memory_in_conversation(tmp_path):
    project = study(
        tmp_path,
        "degraded_memory_tiny",
        chat={"n": 6, "max_turns": 4},
        kv={"policies": {"full": {}, "streaming_llm": {}}, "budgets": [0.2]},
        statistics={"resamples": 200},
    )
    verdicts = pl.read_parquet(next(project.results.rglob("chat_verdicts.parquet")))
    standing = verdicts.filter("standing", pl.col("overridden_by").is_null())
    kept = dict(standing.group_by("policy").agg(pl.col("rule").mean()).iter_rows())
    assert set(kept) == {"full", "streaming_llm", "text_drop"}
    assert kept["full"] == 1.0
    assert kept["streaming_llm"] < 0.7

    # recompute the verdicts from the answers
    said = pl.concat(
        pl.read_parquet(path) for path in project.results.rglob("chat/*/*/*.parquet") if "layers" not in path.name
    )
    answers = {tuple(row[:-1]): row[-1] for row in said.select(
        "policy", "conversation_id", "turn", "text").iter_rows()}  # fmt: skip
    ends = verdicts.filter(kind="ends_with")
    assert ends.height
    checks = {}
    for row in said.iter_rows(named=True):
        for check in json.loads(row["checks"]):
            checks[row["conversation_id"], check["id"]] = check["value"]
    for row in ends.iter_rows(named=True):
        words = answers[row["policy"], row["conversation_id"], row["turn"]].split()
        wanted = checks[row["conversation_id"], row["check_id"]]
        assert row["rule"] == (words[-1:] == [wanted])

    full = said.filter(policy="full")
    assert (full["entries_after"] == full["tokens_seen"]).all()
    assert (said.filter(policy="streaming_llm")["entries_after"] < full["entries_after"].max()).all()
    assert "## Conversations on a compressed cache" in (project.results / "report.md").read_text()
    assert "text_drop" in (project.results / "report.html").read_text()
