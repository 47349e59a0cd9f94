"""Take a look at the experiment: which bins need more examples."""

from kv_transition.script import logged
from kv_transition.studies.grid.analysis.looks import write_look

with logged(snakemake.log[0]):
    write_look(
        list(snakemake.input.scores),
        list(snakemake.input.manifests),
        snakemake.output[0],
        snakemake.params.plan,
        snakemake.params.statistics,
        int(snakemake.wildcards.look),
    )
