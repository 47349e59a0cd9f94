"""Write the CSV tables, summary.json, matched_budget.json and the SQLite database."""

import sys
from contextlib import redirect_stderr

from kv_transition.errors import UserError
from kv_transition.report.exports import write_exports
from kv_transition.report.sqlite import write_sqlite

with open(snakemake.log[0], "w", encoding="utf-8") as log, redirect_stderr(log):  # noqa: F821
    tables = {name: snakemake.input[name] for name in ("scores", "bin_stats", "comparisons", "transition")}  # noqa: F821
    extra = snakemake.params.extra  # noqa: F821
    try:
        write_exports(
            **tables,
            config=snakemake.input.config,  # noqa: F821
            csv_dir=snakemake.output.csv,  # noqa: F821
            summary_json=snakemake.output.summary,  # noqa: F821
            card_json=snakemake.output.card,  # noqa: F821
            extra=extra,
        )
        if sqlite := snakemake.output.get("sqlite"):  # noqa: F821
            comparisons = tables.pop("comparisons")
            write_sqlite(
                **tables,
                output=sqlite,
                config=snakemake.input.config,  # noqa: F821
                manifests=list(snakemake.input.manifests),  # noqa: F821
                extra={"comparisons": comparisons, **extra},
            )
    except UserError as error:
        print(error, file=log)
        sys.exit(str(error))
