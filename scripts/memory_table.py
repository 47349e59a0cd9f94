"""Table 1 of the memory study, and the anatomy of the cache."""

from kv_transition.analysis.memory_table import write_memory_table
from kv_transition.script import logged

with logged(snakemake.log[0]):
    write_memory_table(
        snakemake.input.verdicts,
        list(snakemake.input.chat),
        list(snakemake.input.layers),
        snakemake.output.table,
        snakemake.output.cache,
        snakemake.params.statistics,
    )
