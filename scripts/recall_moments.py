"""Compare entropy's moments to recall with chance's, and draw what recalling costs."""

from kv_transition.analysis.entropy_recall_plots import write_moments_plots
from kv_transition.analysis.recall_moments import write_recall_moments
from kv_transition.script import logged

with logged(snakemake.log[0]):
    outputs = dict(snakemake.output.items())
    statistics, policies = snakemake.params.statistics, snakemake.params.policies
    write_recall_moments(snakemake.input.scores, outputs.pop("table"), statistics, policies)
    write_moments_plots(snakemake.input.scores, policies, statistics["confidence"], outputs)
