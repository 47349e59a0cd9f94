# Tasks of lm-evaluation-harness under every policy, budget and mode.

from kv_transition.studies.harness import study as harness_study

HARNESS = {FILES.harness(*key): key for key in harness_study.cells(SETTINGS)}


rule harness:
    output:
        FILES.harness("{mode}", "{policy}", "{budget}"),
    log:
        FILES.log("harness", "{mode}", "{policy}-{budget}"),
    conda:
        "../../envs/harness.yaml"
    threads: 4 if ON_GPU else 1
    resources:
        **GPU,
    params:
        spec=lambda wildcards: as_json(harness_study.spec(SETTINGS, wildcards.mode, wildcards.policy, wildcards.budget)),
    shell:
        "python -m kv_transition.studies.harness.run --spec {params.spec:q} --threads {threads}"
        " --output {output:q} > {log:q} 2>&1"


rule harness_table:
    input:
        measured=list(HARNESS),
    output:
        output=report(FILES.table("harness"), caption="../report/harness.rst", category="Tables"),
    log:
        FILES.log("harness_table"),
    conda:
        "../../envs/analysis.yaml"
    params:
        **calling("kv_transition.studies.harness.report:write_harness"),
        confidence=SETTINGS.statistics.confidence,
        # the folder .snakemake, which records what is stale, can be lost
        expected={path: digest(harness_study.spec(SETTINGS, *key)) for path, key in HARNESS.items()},
    script:
        "../../scripts/call.py"


rule harness_plots:
    input:
        table=rules.harness_table.output.output,
    output:
        **figures(("harness_scores",)),
    log:
        FILES.log("harness_plots"),
    conda:
        "../../envs/analysis.yaml"
    params:
        **calling("kv_transition.studies.harness.plots:write_harness_plots"),
        confidence=SETTINGS.statistics.confidence,
    script:
        "../../scripts/call.py"


TARGETS += [list(HARNESS), rules.harness_plots.output]
TABLES["harness"] = FILES.table("harness")
BEFORE_REPORT += rules.harness_plots.output
