"""Relate entropy to recall: correlations, means by entropy bin, verdicts."""

from kv_transition.script import logged
from kv_transition.studies.recall.analysis import write_entropy_recall

with logged(snakemake.log[0]):
    write_entropy_recall(
        list(snakemake.input),
        snakemake.output[0],
        snakemake.params.statistics,
    )
