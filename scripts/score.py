"""Score all answers of the experiment."""

import json
from pathlib import Path

from kv_transition.script import logged
from kv_transition.studies.grid.score import score_cells

with logged(snakemake.log[0]):
    score_cells(
        cells=snakemake.input.cells,
        bins=snakemake.input.bins,
        manifests=snakemake.input.manifests,
        expected=json.loads(Path(snakemake.input.grid).read_text(encoding="utf-8")),
        aliases=snakemake.params.aliases,
        output=snakemake.output[0],
    )
