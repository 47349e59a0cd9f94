# Answers of conversations become verdicts, by rule and by judge; verdicts become retention, table 1 and figures.

JUDGED = SETTINGS.chat.judge is not None

if JUDGED:

    include: "judge.smk"


rule chat_verdicts:
    input:
        chat=CHATS,
        judge=rules.judge.output if JUDGED else [],
    output:
        report(FILES.table("chat_verdicts"), caption="../report/chat_verdicts.rst", category="Tables"),
    log:
        FILES.log("chat_verdicts"),
    conda:
        "../../envs/analysis.yaml"
    params:
        code=code_hash("kv_transition.studies.chat.verdicts"),
    script:
        "../../scripts/chat_verdicts.py"


rule retention:
    input:
        verdicts=rules.chat_verdicts.output[0],
        chat=CHATS,
    output:
        report(FILES.table("retention"), caption="../report/retention.rst", category="Tables"),
    log:
        FILES.log("retention"),
    conda:
        "../../envs/analysis.yaml"
    params:
        statistics=SETTINGS.statistics.model_dump(),
        code=code_hash("kv_transition.studies.chat.analysis"),
    script:
        "../../scripts/retention.py"


rule memory_table:
    input:
        verdicts=rules.chat_verdicts.output[0],
        chat=CHATS,
        layers=CHAT_LAYERS,
    output:
        table=report(FILES.table("memory_table"), caption="../report/memory_table.rst", category="Tables"),
        cache=report(FILES.table("cache_anatomy"), caption="../report/cache_anatomy.rst", category="Tables"),
    log:
        FILES.log("memory_table"),
    conda:
        "../../envs/analysis.yaml"
    params:
        statistics=SETTINGS.statistics.model_dump(),
        code=code_hash("kv_transition.studies.chat.memory_table"),
    script:
        "../../scripts/memory_table.py"


rule retention_plots:
    input:
        rules.retention.output[0],
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
            for figure in ("retention", "survival", "cache_size", "conflicts")
            for ext in ("svg", "png")
        },
    log:
        FILES.log("retention_plots"),
    conda:
        "../../envs/analysis.yaml"
    params:
        confidence=SETTINGS.statistics.confidence,
        code=code_hash("kv_transition.studies.chat.plots"),
    script:
        "../../scripts/retention_plots.py"


# What the report shows beyond the cells: tables by name, and files to draw before it.
MEMORY_TABLES = {name: FILES.table(name) for name in ("chat_verdicts", "retention", "memory_table", "cache_anatomy")}
MEMORY_PLOTS = list(rules.retention_plots.output)
