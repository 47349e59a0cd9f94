"""Compare entropy's moments to recall with chance's, and draw what recalling costs."""

from kv_transition.script import logged
from kv_transition.studies.recall.moments import write_recall_moments
from kv_transition.studies.recall.plots import write_moments_plots

with logged(snakemake.log[0]):
    outputs = dict(snakemake.output.items())
    statistics, policies = snakemake.params.statistics, snakemake.params.policies
    write_recall_moments(snakemake.input.scores, outputs.pop("table"), statistics, policies)
    write_moments_plots(snakemake.input.scores, policies, statistics["confidence"], outputs)
