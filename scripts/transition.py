"""Find the transition zone of every policy, along the lengths and along the budgets."""

from kv_transition.script import logged
from kv_transition.studies.grid.analysis.transition import write_transition

with logged(snakemake.log[0]):
    write_transition(
        snakemake.input.scores,
        snakemake.output.transition,
        snakemake.params.statistics,
        snakemake.output.get("budget_transition"),
    )
