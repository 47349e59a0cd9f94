"""Look for what would make the observations of a task doubtful."""

from kv_transition.analysis.observation_checks import write_checks
from kv_transition.script import logged

with logged(snakemake.log[0]):
    write_checks(list(snakemake.input), snakemake.output[0])
