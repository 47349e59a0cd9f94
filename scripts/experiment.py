"""Write the resolved experiment beside its results."""

from kv_transition.outputs.resolved import write_resolved
from kv_transition.script import logged

with logged(snakemake.log[0]):
    write_resolved(snakemake.params.resolved, snakemake.output[0])
