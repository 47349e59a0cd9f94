"""Table 1 of the memory study, and the anatomy of the cache."""

from kv_transition.script import logged
from kv_transition.studies.chat.memory_table import write_memory_table

with logged(snakemake.log[0]):
    write_memory_table(
        snakemake.input.verdicts,
        list(snakemake.input.chat),
        list(snakemake.input.layers),
        snakemake.output.table,
        snakemake.output.cache,
        snakemake.params.statistics,
    )
