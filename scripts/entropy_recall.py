"""Relate entropy to recall: correlations, means by entropy bin, verdicts."""

import sys
from contextlib import redirect_stderr

from kv_transition.analysis.entropy_recall import write_entropy_recall
from kv_transition.errors import UserError

with open(snakemake.log[0], "w", encoding="utf-8") as log, redirect_stderr(log):  # noqa: F821
    try:
        write_entropy_recall(
            list(snakemake.input),  # noqa: F821
            snakemake.output[0],  # noqa: F821
            snakemake.params.statistics,  # noqa: F821
        )
    except UserError as error:
        print(error, file=log)
        sys.exit(str(error))
