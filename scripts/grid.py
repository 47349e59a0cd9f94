"""Write down which cells there are and the hash that the rows of each must carry."""

import sys

from kv_transition.provenance import write_json

with open(snakemake.log[0], "w") as log:  # noqa: F821, Snakemake hands it in
    sys.stderr = log
    write_json(snakemake.output[0], snakemake.params.cells)  # noqa: F821
