# Tables become pictures, pictures and tables become a report.

FIGURES = ["acc_vs_len", "std_vs_len", "failrate_vs_len", "latency_vs_len", "failures", "front", "differences"]
# What the analysis makes beside the three tables that every report needs.
EXTRA = {
    name: str(path)
    for outputs in ((rules.aggregate.output, rules.transition.output) if TASKS else ())
    for name, path in outputs.items()
    if name not in ("bin_stats", "comparisons", "transition")
} | RECALL_TABLES
EXTRA |= PERPLEXITY_TABLES
EXTRA |= MEMORY_TABLES
if ADAPTIVE:
    EXTRA["allocation"] = FILES.table("allocation")
# What came of the tasks' answers, in an experiment that has tasks.
ANSWERED = (
    {
        "scores": rules.score.output[0],
        "bin_stats": rules.aggregate.output.bin_stats,
        "comparisons": rules.aggregate.output.comparisons,
        "transition": rules.transition.output.transition,
    }
    if TASKS
    else {}
)


rule experiment:
    output:
        FILES.file("config.yaml"),
    log:
        FILES.log("experiment"),
    conda:
        "../../envs/analysis.yaml"
    params:
        resolved=specs.resolved(SETTINGS),
    script:
        "../../scripts/experiment.py"


rule plots:
    input:
        scores=rules.score.output[0],
        bin_stats=rules.aggregate.output.bin_stats,
        comparisons=rules.aggregate.output.comparisons,
        transition=rules.transition.output.transition,
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
            for figure in FIGURES
            for ext in ("svg", "png")
        },
        interactive=report(
            FILES.plot("interactive", "html"),
            caption="../report/plot.rst",
            category="Figures",
            labels={"figure": "interactive"},
        ),
    log:
        FILES.log("plots"),
    conda:
        "../../envs/analysis.yaml"
    params:
        code=code_hash("kv_transition.studies.grid.plots"),
    script:
        "../../scripts/plots.py"


rule report:
    input:
        **ANSWERED,
        config=rules.experiment.output[0],
        manifests=[FILES.manifest(task) for task in TASKS],
        extra=list(EXTRA.values()),
        plots=rules.plots.output if TASKS else [],
        recall=RECALL_OUTPUTS,
        perplexity=PERPLEXITY_PLOTS,
        memory=MEMORY_PLOTS,
    output:
        md=FILES.file("report.md"),
        html=report(FILES.file("report.html"), caption="../report/report.rst", category="Report"),
    log:
        FILES.log("report"),
    conda:
        "../../envs/analysis.yaml"
    params:
        title=SETTINGS.report.title or SETTINGS.experiment,
        extra=EXTRA,
        code=code_hash("kv_transition.outputs.build", *registry.modules("report")),
        templates=[content_digest(folder) for folder in template_folders()],
    script:
        "../../scripts/report.py"


rule exports:
    input:
        **ANSWERED,
        config=rules.experiment.output[0],
        manifests=[FILES.manifest(task) for task in TASKS],
        examples=[FILES.examples(task) for task in TASKS],
        bins=[FILES.bin(task, bin) for task in TASKS for bin in BINS],
        extra=list(EXTRA.values()),
    output:
        **(
            {"sqlite": report(FILES.file("kv_transition.sqlite"), caption="../report/sqlite.rst", category="Exports")}
            if SETTINGS.report.sqlite
            else {}
        ),
        **(
            {
                "summary": report(FILES.file("summary.json"), caption="../report/summary.rst", category="Exports"),
                "card": report(FILES.file("matched_budget.json"), caption="../report/card.rst", category="Exports"),
            }
            if TASKS
            else {}
        ),
        csv=directory(FILES.file("tables")),
    log:
        FILES.log("exports"),
    conda:
        "../../envs/analysis.yaml"
    params:
        extra=EXTRA,
        code=code_hash("kv_transition.outputs.exports", "kv_transition.outputs.sqlite"),
    script:
        "../../scripts/exports.py"
