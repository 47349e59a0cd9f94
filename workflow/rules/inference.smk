# The model reads each prompt once; every cell then forgets in its own way and answers.


rule prefill:
    input:
        PIECES.bin("{task}", "{bin}"),
    output:
        PIECES.prefill_index("{task}", "{bin}"),
    log:
        PIECES.log("prefill", "{task}", "bin{bin}"),
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
        "python -m kv_transition.worker kv_transition.run.prefill --spec {params.spec:q} --threads {threads}"
        " --bin {input} --index {output} > {log} 2>&1"


rule cell:
    input:
        bin=PIECES.bin("{task}", "{bin}"),
        index=[] if REMOTE else PIECES.prefill_index("{task}", "{bin}"),
        calibration=calibration_of,
        treated=treated_of,
    output:
        PIECES.cell("{task}", "{mode}", "{policy}", "{budget}", "{bin}"),
    log:
        PIECES.log("cell", "{task}", "{mode}", "{policy}-{budget}", "bin{bin}"),
    priority: lambda wildcards: int(wildcards.bin)
    conda:
        "../../envs/inference.yaml"
    threads: 4 if ON_GPU else 1
    resources:
        **GPU,
        endpoint=int(REMOTE),
    params:
        spec=lambda wildcards: as_json(cell_spec(wildcards.mode, wildcards.policy, wildcards.budget)),
    shell:
        (
            "python -m kv_transition.studies.grid.remote"
            if REMOTE
            else "python -m kv_transition.worker kv_transition.studies.grid.run"
        )
        + " --spec {params.spec:q} --threads {threads}"
        " --bin {input.bin} --output {output} --calibration {input.calibration} --treated {input.treated}"
        " > {log} 2>&1"
