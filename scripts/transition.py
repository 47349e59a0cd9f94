"""Find the transition zone of every policy, along the lengths and along the budgets."""

import sys
from contextlib import redirect_stderr

from kv_transition.analysis.transition import write_transition
from kv_transition.errors import UserError

with open(snakemake.log[0], "w", encoding="utf-8") as log, redirect_stderr(log):  # noqa: F821
    try:
        write_transition(
            snakemake.input.scores,  # noqa: F821
            snakemake.output.transition,  # noqa: F821
            snakemake.params.statistics,  # noqa: F821
            snakemake.output.get("budget_transition"),  # noqa: F821
        )
    except UserError as error:
        print(error, file=log)
        sys.exit(str(error))
