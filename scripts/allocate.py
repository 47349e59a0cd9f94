"""Take a look at the experiment: which bins need more examples."""

import sys
from contextlib import redirect_stderr

from kv_transition.analysis.looks import write_look
from kv_transition.errors import UserError

with open(snakemake.log[0], "w", encoding="utf-8") as log, redirect_stderr(log):  # noqa: F821
    try:
        write_look(
            list(snakemake.input.scores),  # noqa: F821
            list(snakemake.input.manifests),  # noqa: F821
            snakemake.output[0],  # noqa: F821
            snakemake.params.plan,  # noqa: F821
            snakemake.params.statistics,  # noqa: F821
            int(snakemake.wildcards.look),  # noqa: F821
        )
    except UserError as error:
        print(error, file=log)
        sys.exit(str(error))
