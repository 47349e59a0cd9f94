"""Draw entropy against recall."""

import sys
from contextlib import redirect_stderr

from kv_transition.analysis.entropy_recall_plots import write_entropy_recall_plots
from kv_transition.errors import UserError

with open(snakemake.log[0], "w", encoding="utf-8") as log, redirect_stderr(log):  # noqa: F821
    try:
        write_entropy_recall_plots(
            snakemake.input.table,  # noqa: F821
            list(snakemake.input.observations),  # noqa: F821
            snakemake.params.confidence,  # noqa: F821
            dict(snakemake.output.items()),  # noqa: F821
        )
    except UserError as error:
        print(error, file=log)
        sys.exit(str(error))
