"""Statistics of every cell, paired differences from the full cache and between policies, and non-inferiority."""

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
            pairs_path=snakemake.output.get("pairs"),  # noqa: F821
            noninferiority_path=snakemake.output.get("noninferiority"),  # noqa: F821
            smallest_path=snakemake.output.get("smallest_budgets"),  # noqa: F821
        )
    except UserError as error:
        print(error, file=log)
        sys.exit(str(error))
