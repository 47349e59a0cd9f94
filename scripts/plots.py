"""Draw the figures: each named output is one file of one figure."""

from kv_transition.script import logged
from kv_transition.studies.grid.plots import write_plots

with logged(snakemake.log[0]):
    write_plots(
        snakemake.input.scores,
        snakemake.input.bin_stats,
        snakemake.input.comparisons,
        snakemake.input.transition,
        dict(snakemake.output.items()),
    )
