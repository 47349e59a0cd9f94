"""Perplexity of each policy and budget from the scored windows, and merging beside dropping."""

from kv_transition.script import logged
from kv_transition.studies.perplexity.analysis import write_perplexity

with logged(snakemake.log[0]):
    write_perplexity(
        list(snakemake.input),
        snakemake.output.table,
        snakemake.output.pairs,
        snakemake.params.statistics,
        snakemake.params.policies,
        snakemake.params.expected,
    )
