"""Compare entropy's moments to recall with chance's, and draw what recalling costs."""

import sys
from contextlib import redirect_stderr

from kv_transition.analysis.entropy_recall_plots import write_moments_plots
from kv_transition.analysis.recall_moments import write_recall_moments
from kv_transition.errors import UserError

with open(snakemake.log[0], "w", encoding="utf-8") as log, redirect_stderr(log):  # noqa: F821
    outputs = dict(snakemake.output.items())  # noqa: F821
    statistics, policies = snakemake.params.statistics, snakemake.params.policies  # noqa: F821
    try:
        write_recall_moments(snakemake.input.scores, outputs.pop("table"), statistics, policies)  # noqa: F821
        write_moments_plots(snakemake.input.scores, policies, statistics["confidence"], outputs)  # noqa: F821
    except UserError as error:
        print(error, file=log)
        sys.exit(str(error))
