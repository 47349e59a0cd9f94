"""Write report.md and report.html."""

from pathlib import Path

from kv_transition.outputs.build import build_report
from kv_transition.script import logged

with logged(snakemake.log[0]):
    names = ("scores", "bin_stats", "comparisons", "transition")
    build_report(
        **{name: snakemake.input.get(name) for name in names},
        manifests=list(snakemake.input.manifests),
        config=snakemake.input.config,
        plots_dir=str(Path(snakemake.output.html).parent / "plots"),
        output_md=snakemake.output.md,
        output_html=snakemake.output.html,
        title=snakemake.params.title,
        extra=snakemake.params.extra,
    )
