# What policies would hold beside a full cache, and what each step needed. Nothing here waits for a cell.

OBSERVED = SETTINGS.observe.enabled
OBSERVATIONS = [FILES.observations(task, bin) for task in TASKS for bin in BINS] if OBSERVED else []
OBSERVATION_EXTRAS = (
    [path for task in TASKS for path in (FILES.observation_checks(task), FILES.observation_logs(task))]
    if OBSERVED
    else []
)


rule observe:
    input:
        bin=FILES.bin("{task}", "{bin}"),
        # under adaptive allocation a bin is read in shards, and the job reads what is left
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
        spec=as_json(specs.observe(SETTINGS)) if OBSERVED else "{}",
    shell:
        "python -m kv_transition.worker kv_transition.studies.recall.run --spec {params.spec:q} --threads {threads}"
        " --bin {input.bin} --output {output.steps} --layers {output.layers} > {log} 2>&1"


rule observation_checks:
    input:
        [FILES.observations("{task}", bin) for bin in BINS],
    output:
        report(FILES.observation_checks("{task}"), caption="../report/observation_checks.rst", category="Tables"),
    log:
        FILES.log("observation_checks", "{task}"),
    conda:
        "../../envs/analysis.yaml"
    params:
        code=code_hash("kv_transition.studies.recall.checks"),
    script:
        "../../scripts/observation_checks.py"


# The studies' own layout: {task}_budget_{ratio}_{timestamp}.jsonl and {task}_budget_{ratio}/logs.json with plots.
rule observation_logs:
    input:
        [FILES.observations("{task}", bin) for bin in BINS],
    output:
        directory(FILES.observation_logs("{task}")),
    log:
        FILES.log("observation_logs", "{task}"),
    conda:
        "../../envs/analysis.yaml"
    params:
        code=code_hash("kv_transition.studies.recall.step_logs"),
    script:
        "../../scripts/observation_logs.py"
