"""Join the scores of all shards, and all looks, into one table each."""

from kv_transition.script import logged
from kv_transition.studies.grid.analysis.looks import write_published

with logged(snakemake.log[0]):
    write_published(
        list(snakemake.input.shards),
        list(snakemake.input.looks),
        snakemake.output.scores,
        snakemake.output.allocation,
    )
