"""Write the CSV tables, summary.json, matched_budget.json and the SQLite database."""

from kv_transition.outputs.exports import write_exports
from kv_transition.outputs.sqlite import write_sqlite
from kv_transition.script import logged

with logged(snakemake.log[0]):
    names = ("scores", "bin_stats", "comparisons", "transition")
    tables = {name: path for name in names if (path := snakemake.input.get(name))}
    extra = dict(snakemake.params.extra)
    write_exports(
        tables=tables,
        config=snakemake.input.config,
        csv_dir=snakemake.output.csv,
        summary_json=snakemake.output.get("summary"),
        card_json=snakemake.output.get("card"),
        extra=extra,
    )
    if sqlite := snakemake.output.get("sqlite"):
        if tables:
            extra["comparisons"] = tables.pop("comparisons")
        write_sqlite(
            **tables,
            output=sqlite,
            config=snakemake.input.config,
            manifests=list(snakemake.input.manifests),
            extra=extra,
        )
