"""docs/findings.md, from the tables that were kept of runs on a real language model.

python benchmarks/findings.py
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

ROOT = Path(__file__).parents[1]
TABLES = ROOT / "benchmarks" / "results" / "real"
PAGE = ROOT / "docs" / "findings.md"


def interval(row: dict) -> str:
    if row["ratio_low"] is None:
        return "1"
    return f"{row['ratio']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"


def merging() -> str:
    """The section on merging: all lengths together, and merging against dropping."""
    table = pl.read_parquet(TABLES / "merging" / "perplexity.parquet").filter(pl.col("bin").is_null())
    pairs = pl.read_parquet(TABLES / "merging" / "perplexity_pairs.parquet").filter(pl.col("bin").is_null())
    rows = table.sort("compression", "policy").to_dicts()
    n, books = rows[0]["n"], rows[0]["clusters"]
    worse = pairs.filter(pl.col("ratio_low") > 1).height
    better = pairs.filter(pl.col("ratio_high") < 1).height
    answer = "No" if better == 0 and worse else "Yes" if better and not worse else "Undecided"
    lines = [
        "## Does merging keep more than dropping?",
        "",
        f"{answer}: of {pairs.height} comparisons of merging with dropping the same spans, merging is better "
        f"in {better} and worse in {worse}; the intervals of the others hold 1. n = {n} windows of {books} books, "
        "exploratory; contexts of 1,024 and 2,048 tokens, 128 scored after each.",
        "",
        "| policy | gone | perplexity | over the full cache's |",
        "|---|---|---|---|",
        *(f"| {r['policy']} | {100 * r['compression']:.1f} % | {r['perplexity']:.2f} | {interval(r)} |" for r in rows),
        "",
        "| merging | gone | over dropping's perplexity | p (Holm) |",
        "|---|---|---|---|",
        *(
            f"| {r['policy']} | {100 * r['compression']:.1f} % | {interval(r)} | {r['p_holm']:.3f} |"
            for r in pairs.sort("policy", "compression").to_dicts()
        ),
        "",
        "What it does not show: why merging loses, other models or texts, contexts beyond 2,048 tokens, h2o and sinks.",
        "Command: `snakemake --configfile config/experiments/real_merging.yaml --config set='perplexity.path=BOOKS'`;",
        "26 minutes on one core. The weights were those of the GGUF file, dequantized to a folder before.",
    ]
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    return (
        "# Findings on a real language model\n\nSmolLM2-135M-Instruct, Q4_1 weights computed in float32. One model of "
        "135M parameters: what holds here need not hold for larger ones.\nWritten by `python benchmarks/findings.py` "
        f"from benchmarks/results/real.\n\n{merging()}\n\n## Not run\n\nTransition, entropy and recall, and degraded "
        "memory have not been run on this model.\n"
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
