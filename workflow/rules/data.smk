# Examples: fetched or generated, made into prompts, counted, binned by length.


rule download:
    output:
        FILES.source("{task}"),
    log:
        FILES.log("download", "{task}"),
    conda:
        "../../envs/data.yaml"
    params:
        spec=as_json(specs.download(SETTINGS)) if TASKS else "{}",
    shell:
        "python -m kv_transition.data.download --spec {params.spec:q} --task {wildcards.task}"
        " --output {output} > {log} 2>&1"


rule prepare:
    input:
        FILES.source("{task}"),
    output:
        FILES.examples("{task}"),
        [FILES.bin("{task}", bin) for bin in BINS],
        manifest=FILES.manifest("{task}"),
    log:
        FILES.log("prepare", "{task}"),
    conda:
        "../../envs/data.yaml"
    params:
        spec=as_json(specs.prepare(SETTINGS)) if TASKS else "{}",
        outdir=lambda wildcards, output: os.path.dirname(output.manifest),
    shell:
        "python -m kv_transition.data.prepare --spec {params.spec:q} --task {wildcards.task}"
        " --source {input} --outdir {params.outdir} > {log} 2>&1"
