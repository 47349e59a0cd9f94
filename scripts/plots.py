"""Draw the figures: each named output is one file of one figure."""

import sys
from contextlib import redirect_stderr

from kv_transition.analysis.plots import write_plots
from kv_transition.errors import UserError

with open(snakemake.log[0], "w", encoding="utf-8") as log, redirect_stderr(log):  # noqa: F821
    try:
        write_plots(
            snakemake.input.scores,  # noqa: F821
            snakemake.input.bin_stats,  # noqa: F821
            snakemake.input.comparisons,  # noqa: F821
            snakemake.input.transition,  # noqa: F821
            dict(snakemake.output.items()),  # noqa: F821
        )
    except UserError as error:
        print(error, file=log)
        sys.exit(str(error))
