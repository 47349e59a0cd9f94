"""Draw retention, survival, the size of the cache and conflicts."""

from kv_transition.script import logged
from kv_transition.studies.chat.plots import write_retention_plots

with logged(snakemake.log[0]):
    write_retention_plots(snakemake.input[0], snakemake.params.confidence, dict(snakemake.output.items()))
