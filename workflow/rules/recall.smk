# What cells of entropy_recall take from other jobs: a tau calibrated on examples that no cell sees, and, for controls,
# the cell whose number of moments they have. Other cells take nothing.


rule calibrate:
    input:
        examples=FILES.examples("{task}"),
        manifest=FILES.manifest("{task}"),
    output:
        CALIBRATION,
    log:
        FILES.log("calibrate", "{task}"),
    conda:
        "../../envs/inference.yaml"
    threads: 4 if ON_GPU else 1
    resources:
        **GPU,
    params:
        spec=as_json(specs.calibrate(SETTINGS)) if TASKS else "{}",
    shell:
        "python -m kv_transition.worker kv_transition.studies.grid.calibrate --spec {params.spec:q} --task {wildcards.task} --threads {threads}"
        " --examples {input.examples} --manifest {input.manifest} --output {output} > {log} 2>&1"
