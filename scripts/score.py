"""Score all answers of the experiment."""

import json
import sys
from contextlib import redirect_stderr
from pathlib import Path

from kv_transition.errors import UserError
from kv_transition.eval.score import score_cells

with open(snakemake.log[0], "w", encoding="utf-8") as log, redirect_stderr(log):  # noqa: F821
    try:
        score_cells(
            cells=snakemake.input.cells,  # noqa: F821
            bins=snakemake.input.bins,  # noqa: F821
            manifests=snakemake.input.manifests,  # noqa: F821
            expected=json.loads(Path(snakemake.input.grid).read_text(encoding="utf-8")),  # noqa: F821
            aliases=snakemake.params.aliases,  # noqa: F821
            output=snakemake.output[0],  # noqa: F821
        )
    except UserError as error:
        print(error, file=log)
        sys.exit(str(error))
