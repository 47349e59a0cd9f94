"""Join the scores of all shards, and all looks, into one table each."""

from kv_transition.analysis.looks import write_published
from kv_transition.script import logged

with logged(snakemake.log[0]):
    write_published(
        list(snakemake.input.shards),
        list(snakemake.input.looks),
        snakemake.output.scores,
        snakemake.output.allocation,
    )
