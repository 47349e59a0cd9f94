"""Write report.md and report.html."""

import sys
from contextlib import redirect_stderr
from pathlib import Path

from kv_transition.errors import UserError
from kv_transition.report.build import build_report

with open(snakemake.log[0], "w", encoding="utf-8") as log, redirect_stderr(log):  # noqa: F821
    names = ("scores", "bin_stats", "comparisons", "transition")
    try:
        build_report(
            **{name: snakemake.input.get(name) for name in names},  # noqa: F821
            manifests=list(snakemake.input.manifests),  # noqa: F821
            config=snakemake.input.config,  # noqa: F821
            plots_dir=str(Path(snakemake.output.html).parent / "plots"),  # noqa: F821
            output_md=snakemake.output.md,  # noqa: F821
            output_html=snakemake.output.html,  # noqa: F821
            title=snakemake.params.title,  # noqa: F821
            extra=snakemake.params.extra,  # noqa: F821
        )
    except UserError as error:
        print(error, file=log)
        sys.exit(str(error))
