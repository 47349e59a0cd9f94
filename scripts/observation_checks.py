"""Look for what would make the observations of a task doubtful."""

from kv_transition.script import logged
from kv_transition.studies.recall.checks import write_checks

with logged(snakemake.log[0]):
    write_checks(list(snakemake.input), snakemake.output[0])
