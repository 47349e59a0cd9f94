"""Which instructions the answers of conversations follow, by rule and by judge."""

from kv_transition.script import logged
from kv_transition.studies.chat.verdicts import write_verdicts

with logged(snakemake.log[0]):
    judge = snakemake.input.get("judge")
    write_verdicts(list(snakemake.input.chat), snakemake.output[0], str(judge) if judge else None)
