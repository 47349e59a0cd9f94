"""Statistics of every cell, and paired differences from the full cache."""

import sys
from contextlib import redirect_stderr

from kv_transition.analysis.aggregate import write_aggregates
from kv_transition.errors import UserError

with open(snakemake.log[0], "w", encoding="utf-8") as log, redirect_stderr(log):  # noqa: F821
    try:
        write_aggregates(
            snakemake.input.scores,  # noqa: F821
            snakemake.output.bin_stats,  # noqa: F821
            snakemake.output.comparisons,  # noqa: F821
            snakemake.params.statistics,  # noqa: F821
        )
    except UserError as error:
        print(error, file=log)
        sys.exit(str(error))
