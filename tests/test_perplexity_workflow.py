"""Test perplexity of real books on a real pretrained model, up to the report, through Snakemake."""

from __future__ import annotations

import math

import polars as pl
import pytest
import torch
from project import Project

SETTINGS = {
    "experiment": "small",
    "perplexity": {"corpus": "pg19", "context_tokens": [192], "stride": 32, "books": 3, "windows_per_book": 2},
    "kv": {
        "policies": {
            "full": {},
            "entropy_merge": {},
            "entropy_drop": {},
            "merge_05": {"kind": "entropy_merge", "target": "threshold", "threshold": 0.5},
        },
        "budgets": [0.5],
    },
    "statistics": {"resamples": 200},
}


@pytest.mark.slow
def test_from_books_to_the_report(kvt_data, tmp_path):
    project = Project(tmp_path)
    model = {"name": str(kvt_data / "stories260K-hf"), "dtype": "float32", "device": "cpu"}
    text = SETTINGS["perplexity"] | {"path": str(kvt_data / "pg19")}
    project.configure(SETTINGS | {"model": model, "perplexity": text})
    project.run()
    # no job is left, and the figures that the report uses are targets of their own
    assert not project.planned()
    (project.results / "plots" / "merge_vs_drop.png").unlink()
    assert "perplexity_plots" in project.planned()

    table = pl.read_parquet(project.results / "perplexity.parquet").filter(bin=0)
    assert dict(table.select("policy", "budget").iter_rows()) == {
        "full": "r1", "entropy_merge": "r0.5", "entropy_drop": "r0.5", "merge_05": "r1"
    }  # fmt: skip
    full = table.filter(policy="full").row(0, named=True)
    assert (full["n"], full["clusters"]) == (6, 3)
    assert full["perplexity"] == pytest.approx(plain_perplexity(project, model["name"]), rel=1e-5)

    report = (project.results / "report.md").read_text()
    assert "## Perplexity" in report
    assert "entropy_merge : entropy_drop" in report
    assert "| merge_05 | its own |" in report
    assert "figure-ppl_vs_compression" in (project.results / "report.html").read_text()
    header = (project.results / "tables" / "perplexity.csv").read_text().splitlines()[0]
    assert header.split(",") == table.columns


@torch.inference_mode()
def plain_perplexity(project: Project, model: str) -> float:
    """Return the perplexity of the same windows by a transformers model without a cache."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager", dtype=torch.float32).eval()
    nats = []
    for row in pl.read_parquet(project.results / "perplexity/pg19/windows_bin0.parquet").iter_rows(named=True):
        ids = torch.tensor([row["context_ids"] + row["target_ids"]])
        scored = len(row["target_ids"]) - 1
        logits = plain(input_ids=ids, use_cache=False).logits[0, -scored - 1 : -1]
        nats += torch.nn.functional.cross_entropy(logits, ids[0, -scored:], reduction="none").tolist()
    return math.exp(math.fsum(nats) / len(nats))
