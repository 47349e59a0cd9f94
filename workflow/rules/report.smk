# The report, and files for other programs, from tables and figures.

# Files about answers, if the experiment has tasks.
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


localrules:
    experiment,


rule experiment:
    output:
        output=FILES.file("config.yaml"),
    log:
        FILES.log("experiment"),
    conda:
        "../../envs/analysis.yaml"
    params:
        **calling("kv_transition.outputs.resolved:write_resolved"),
        resolved=specs.resolved(SETTINGS),
    script:
        "../../scripts/call.py"


rule report:
    input:
        **ANSWERED,
        config=rules.experiment.output[0],
        manifests=[FILES.manifest(task) for task in TASKS],
        needs=[*TABLES.values(), *BEFORE_REPORT],
    output:
        output_md=FILES.file("report.md"),
        output_html=report(FILES.file("report.html"), caption="../report/report.rst", category="Report"),
    log:
        FILES.log("report"),
    conda:
        "../../envs/analysis.yaml"
    params:
        **calling("kv_transition.outputs.build:build_report", *registry.modules("report")),
        plots_dir=lambda wildcards, output: os.path.join(os.path.dirname(output.output_html), "plots"),
        title=SETTINGS.report.title or SETTINGS.experiment,
        extra=TABLES,
        templates=[content_digest(folder) for folder in template_folders()],
    script:
        "../../scripts/call.py"


rule exports:
    input:
        **ANSWERED,
        config=rules.experiment.output[0],
        manifests=[FILES.manifest(task) for task in TASKS],
        needs=[
            *TABLES.values(),
            *(FILES.examples(task) for task in TASKS),
            *(FILES.bin(task, bin) for task in TASKS for bin in BINS),
        ],
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
        **calling("kv_transition.outputs.exports:write_all"),
        extra=TABLES,
    script:
        "../../scripts/call.py"
