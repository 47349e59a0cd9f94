"""Statistics of every cell, paired differences from the full cache and between policies, and non-inferiority."""

from kv_transition.script import logged
from kv_transition.studies.grid.analysis.aggregate import write_aggregates

with logged(snakemake.log[0]):
    write_aggregates(
        snakemake.input.scores,
        snakemake.output.bin_stats,
        snakemake.output.comparisons,
        snakemake.params.statistics,
        pairs_path=snakemake.output.get("pairs"),
        noninferiority_path=snakemake.output.get("noninferiority"),
        smallest_path=snakemake.output.get("smallest_budgets"),
    )
