"""Draw entropy against recall."""

from kv_transition.analysis.entropy_recall_plots import write_entropy_recall_plots
from kv_transition.script import logged

with logged(snakemake.log[0]):
    write_entropy_recall_plots(
        snakemake.input.table,
        list(snakemake.input.observations),
        snakemake.params.confidence,
        dict(snakemake.output.items()),
    )
