# Which entries would each policy keep, and which entries does each step need? Does entropy show when a cache fails?
from kv_transition.studies.recall import specs as recall_specs

OBSERVATIONS = [FILES.observations(task, bin) for task in TASKS for bin in BINS]


rule observe:
    input:
        bin=FILES.bin("{task}", "{bin}"),
        # with adaptive allocation a bin is prefilled in shards, and this job prefills the rest
        index=[] if ADAPTIVE else FILES.prefill_index("{task}", "{bin}"),
    output:
        steps=FILES.observations("{task}", "{bin}"),
        layers=FILES.observation_layers("{task}", "{bin}"),
    log:
        FILES.log("observe", "{task}", "bin{bin}"),
    priority: lambda wildcards: int(wildcards.bin)
    conda:
        "../../envs/inference.yaml"
    threads: 4 if ON_GPU else 1
    resources:
        **GPU,
    params:
        spec=as_json(recall_specs.observe(SETTINGS)),
    shell:
        "python -m kv_transition.worker kv_transition.studies.recall.run --spec {params.spec:q} --threads {threads}"
        " --bin {input.bin:q} --output {output.steps:q} --layers {output.layers:q} > {log:q} 2>&1"


rule observation_checks:
    input:
        observations=[FILES.observations("{task}", bin) for bin in BINS],
    output:
        output=report(FILES.observation_checks("{task}"), caption="../report/observation_checks.rst", category="Tables"),
    log:
        FILES.log("observation_checks", "{task}"),
    conda:
        "../../envs/analysis.yaml"
    params:
        **calling("kv_transition.studies.recall.checks:write_checks"),
    script:
        "../../scripts/call.py"


rule entropy_recall:
    input:
        observations=OBSERVATIONS,
    output:
        output=report(FILES.table("entropy_recall"), caption="../report/entropy_recall.rst", category="Tables"),
    log:
        FILES.log("entropy_recall"),
    conda:
        "../../envs/analysis.yaml"
    params:
        **calling("kv_transition.studies.recall.analysis:write_entropy_recall"),
        statistics=SETTINGS.statistics.model_dump(),
    script:
        "../../scripts/call.py"


# Figures, and the layout of the original study: {task}_budget_{ratio}_{timestamp}.jsonl, and {task}_budget_{ratio}/ with
# logs.json and plots. One job draws everything, because drawing takes half a second to start.
rule entropy_recall_plots:
    input:
        table=rules.entropy_recall.output[0],
        observations=OBSERVATIONS,
    output:
        **figures(("entropy_bins", "entropy_scatter")),
        logs=[directory(FILES.observation_logs(task)) for task in TASKS],
    log:
        FILES.log("entropy_recall_plots"),
    conda:
        "../../envs/analysis.yaml"
    params:
        **calling("kv_transition.studies.recall.plots:write_entropy_recall_plots"),
        confidence=SETTINGS.statistics.confidence,
    script:
        "../../scripts/call.py"


TARGETS += [OBSERVATIONS, rules.entropy_recall.output, rules.entropy_recall_plots.output]
TARGETS += [FILES.observation_checks(task) for task in TASKS]
TABLES["entropy_recall"] = FILES.table("entropy_recall")
BEFORE_REPORT += rules.entropy_recall_plots.output
