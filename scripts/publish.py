"""Join the scores of all shards, and all looks, into one table each."""

import sys
from contextlib import redirect_stderr

from kv_transition.analysis.looks import write_published
from kv_transition.errors import UserError

with open(snakemake.log[0], "w", encoding="utf-8") as log, redirect_stderr(log):  # noqa: F821
    try:
        write_published(
            list(snakemake.input.shards),  # noqa: F821
            list(snakemake.input.looks),  # noqa: F821
            snakemake.output.scores,  # noqa: F821
            snakemake.output.allocation,  # noqa: F821
        )
    except UserError as error:
        print(error, file=log)
        sys.exit(str(error))
