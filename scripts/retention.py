"""Retention, survival, conflicts and agreement from the verdicts."""

from kv_transition.analysis.retention import write_retention
from kv_transition.script import logged

with logged(snakemake.log[0]):
    write_retention(
        snakemake.input.verdicts,
        list(snakemake.input.chat),
        snakemake.output[0],
        snakemake.params.statistics,
    )
