# The model reads each prompt once; every cell then forgets in its own way and answers.


rule prefill:
    input:
        FILES.bin("{task}", "{bin}"),
    output:
        FILES.prefill_index("{task}", "{bin}"),
    log:
        FILES.log("prefill", "{task}", "bin{bin}"),
    # The longest bins first: they take longest, and nothing then waits for them at the end.
    priority: lambda wildcards: 100 + int(wildcards.bin)
    conda:
        "../../envs/inference.yaml"
    threads: 4 if ON_GPU else 1
    resources:
        **GPU,
    params:
        spec=as_json(specs.prefill(SETTINGS)),
    shell:
        "python -m kv_transition.run.prefill --spec {params.spec:q} --threads {threads}"
        " --bin {input} --index {output} > {log} 2>&1"


rule cell:
    input:
        bin=FILES.bin("{task}", "{bin}"),
        index=FILES.prefill_index("{task}", "{bin}"),
    output:
        FILES.cell("{task}", "{mode}", "{policy}", "{budget}", "{bin}"),
    log:
        FILES.log("cell", "{task}", "{mode}", "{policy}-{budget}", "bin{bin}"),
    priority: lambda wildcards: int(wildcards.bin)
    conda:
        "../../envs/inference.yaml"
    threads: 4 if ON_GPU else 1
    resources:
        **GPU,
    params:
        spec=lambda wildcards: as_json(cell_spec(wildcards.mode, wildcards.policy, wildcards.budget)),
    shell:
        "python -m kv_transition.run.cell --spec {params.spec:q} --threads {threads}"
        " --bin {input.bin} --output {output} > {log} 2>&1"
