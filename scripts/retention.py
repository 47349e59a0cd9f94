"""Retention, survival, conflicts and agreement from the verdicts."""

from kv_transition.script import logged
from kv_transition.studies.chat.analysis import write_retention

with logged(snakemake.log[0]):
    write_retention(
        snakemake.input.verdicts,
        list(snakemake.input.chat),
        snakemake.output[0],
        snakemake.params.statistics,
    )
