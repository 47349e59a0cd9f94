"""Draw entropy against recall."""

from kv_transition.script import logged
from kv_transition.studies.recall.plots import write_entropy_recall_plots

with logged(snakemake.log[0]):
    write_entropy_recall_plots(
        snakemake.input.table,
        list(snakemake.input.observations),
        snakemake.params.confidence,
        dict(snakemake.output.items()),
    )
