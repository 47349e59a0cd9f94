"""Look for what would make the observations of a task doubtful."""

import sys
from contextlib import redirect_stderr

from kv_transition.analysis.observation_checks import write_checks
from kv_transition.errors import UserError

with open(snakemake.log[0], "w", encoding="utf-8") as log, redirect_stderr(log):  # noqa: F821
    try:
        write_checks(list(snakemake.input), snakemake.output[0])  # noqa: F821
    except UserError as error:
        print(error, file=log)
        sys.exit(str(error))
