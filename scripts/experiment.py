"""Write the resolved experiment beside its results."""

import sys

from kv_transition.experiment import write_resolved

with open(snakemake.log[0], "w") as log:  # noqa: F821, Snakemake hands it in
    sys.stderr = log
    write_resolved(snakemake.params.resolved, snakemake.output[0])  # noqa: F821
