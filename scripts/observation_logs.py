"""Write the observations of a task in the recall study's layout."""

from kv_transition.script import logged
from kv_transition.studies.recall.step_logs import write_logs

with logged(snakemake.log[0]):
    write_logs(list(snakemake.input), snakemake.output[0])
