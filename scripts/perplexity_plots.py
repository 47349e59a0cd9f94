"""Draw perplexity against compression and against length, and merging beside dropping."""

from kv_transition.analysis.perplexity_plots import write_perplexity_plots
from kv_transition.script import logged

with logged(snakemake.log[0]):
    write_perplexity_plots(
        snakemake.input.table,
        snakemake.input.pairs,
        snakemake.params.policies,
        snakemake.params.confidence,
        dict(snakemake.output.items()),
    )
