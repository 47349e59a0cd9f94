"""Write the CSV tables, summary.json, matched_budget.json and the SQLite database."""

import sys
from contextlib import redirect_stderr

from kv_transition.errors import UserError
from kv_transition.report.exports import write_exports
from kv_transition.report.sqlite import write_sqlite

with open(snakemake.log[0], "w", encoding="utf-8") as log, redirect_stderr(log):  # noqa: F821
    names = ("scores", "bin_stats", "comparisons", "transition")
    tables = {name: path for name in names if (path := snakemake.input.get(name))}  # noqa: F821
    extra = dict(snakemake.params.extra)  # noqa: F821
    try:
        write_exports(
            tables=tables,
            config=snakemake.input.config,  # noqa: F821
            csv_dir=snakemake.output.csv,  # noqa: F821
            summary_json=snakemake.output.get("summary"),  # noqa: F821
            card_json=snakemake.output.get("card"),  # noqa: F821
            extra=extra,
        )
        if sqlite := snakemake.output.get("sqlite"):  # noqa: F821
            if tables:
                extra["comparisons"] = tables.pop("comparisons")
            write_sqlite(
                **tables,
                output=sqlite,
                config=snakemake.input.config,  # noqa: F821
                manifests=list(snakemake.input.manifests),  # noqa: F821
                extra=extra,
            )
    except UserError as error:
        print(error, file=log)
        sys.exit(str(error))
