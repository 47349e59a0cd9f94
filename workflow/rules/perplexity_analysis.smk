# Scored windows become perplexities with intervals, ratios to the full cache, and merging beside dropping.


rule perplexity_stats:
    input:
        PERPLEXITY,
    output:
        table=report(FILES.table("perplexity"), caption="../report/perplexity.rst", category="Tables"),
        pairs=report(FILES.table("perplexity_pairs"), caption="../report/perplexity_pairs.rst", category="Tables"),
    log:
        FILES.log("perplexity_stats"),
    conda:
        "../../envs/analysis.yaml"
    params:
        statistics=SETTINGS.statistics.model_dump(),
        policies={name: dict(options or {}) for name, options in SETTINGS.kv.policies.items()},
        # the .snakemake folder, which knows what is stale, can get lost
        expected={
            FILES.perplexity(CORPUS, *key, bin): digest(specs.perplexity(SETTINGS, *key))
            for key in specs.perplexity_cells(SETTINGS)
            for bin in PERPLEXITY_BINS
        },
        code=code_hash("kv_transition.studies.perplexity.analysis"),
    script:
        "../../scripts/perplexity_stats.py"


rule perplexity_plots:
    input:
        table=rules.perplexity_stats.output.table,
        pairs=rules.perplexity_stats.output.pairs,
    output:
        **{
            f"{figure}_{ext}": (
                report(
                    FILES.plot(figure, ext),
                    caption="../report/plot.rst",
                    category="Figures",
                    labels={"figure": figure},
                )
                if ext == "svg"
                else FILES.plot(figure, ext)
            )
            for figure in ("ppl_vs_compression", "ppl_vs_len", "merge_vs_drop")
            for ext in ("svg", "png")
        },
    log:
        FILES.log("perplexity_plots"),
    conda:
        "../../envs/analysis.yaml"
    params:
        policies={name: dict(options or {}) for name, options in SETTINGS.kv.policies.items()},
        confidence=SETTINGS.statistics.confidence,
        code=code_hash("kv_transition.studies.perplexity.plots"),
    script:
        "../../scripts/perplexity_plots.py"


# What the report shows beyond the cells: tables by name, and files to draw before it.
PERPLEXITY_TABLES = {
    "perplexity": FILES.table("perplexity"),
    "perplexity_pairs": FILES.table("perplexity_pairs"),
}
PERPLEXITY_PLOTS = list(rules.perplexity_plots.output)
