"""Write down which cells there are and the hash that the rows of each must carry."""

from kv_transition.provenance import write_json
from kv_transition.script import logged

with logged(snakemake.log[0]):
    write_json(snakemake.output[0], snakemake.params.cells)
