"""Draw perplexity against compression and against length, and merging beside dropping."""

from kv_transition.script import logged
from kv_transition.studies.perplexity.plots import write_perplexity_plots

with logged(snakemake.log[0]):
    write_perplexity_plots(
        snakemake.input.table,
        snakemake.input.pairs,
        snakemake.params.policies,
        snakemake.params.confidence,
        dict(snakemake.output.items()),
    )
