# Does entropy tell when a cache fails? From the observed steps; and from the scores, whether recalling then helps.

RECALLS = any((options or {}).get("kind", name) == "entropy_recall" for name, options in SETTINGS.kv.policies.items())


rule entropy_recall:
    input:
        OBSERVATIONS,
    output:
        report(FILES.table("entropy_recall"), caption="../report/entropy_recall.rst", category="Tables"),
    log:
        FILES.log("entropy_recall"),
    conda:
        "../../envs/analysis.yaml"
    params:
        statistics=SETTINGS.statistics.model_dump(),
        code=code_hash("kv_transition.studies.recall.analysis"),
    script:
        "../../scripts/entropy_recall.py"


rule entropy_recall_plots:
    input:
        table=rules.entropy_recall.output[0],
        observations=OBSERVATIONS,
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
            for figure in ("entropy_bins", "entropy_scatter")
            for ext in ("svg", "png")
        },
    log:
        FILES.log("entropy_recall_plots"),
    conda:
        "../../envs/analysis.yaml"
    params:
        confidence=SETTINGS.statistics.confidence,
        code=code_hash("kv_transition.studies.recall.plots"),
    script:
        "../../scripts/entropy_recall_plots.py"


rule recall_moments:
    input:
        scores=rules.score.output[0],
    output:
        table=report(FILES.table("recall_moments"), caption="../report/recall_moments.rst", category="Tables"),
        recall_moments_svg=report(
            FILES.plot("recall_moments", "svg"),
            caption="../report/plot.rst",
            category="Figures",
            labels={"figure": "recall_moments"},
        ),
        recall_moments_png=FILES.plot("recall_moments", "png"),
    log:
        FILES.log("recall_moments"),
    conda:
        "../../envs/analysis.yaml"
    params:
        statistics=STATISTICS,
        policies={name: dict(options or {}) for name, options in SETTINGS.kv.policies.items()},
        code=code_hash("kv_transition.studies.recall.moments", "kv_transition.studies.recall.plots"),
    script:
        "../../scripts/recall_moments.py"


# What the report shows beyond the cells: tables by name, and files to draw before it.
RECALL_TABLES = ({"entropy_recall": FILES.table("entropy_recall")} if OBSERVED else {}) | (
    {"recall_moments": FILES.table("recall_moments")} if RECALLS else {}
)
RECALL_OUTPUTS = ([*rules.entropy_recall.output, *rules.entropy_recall_plots.output] if OBSERVED else []) + (
    list(rules.recall_moments.output) if RECALLS else []
)
