# Examples are downloaded or generated, converted to prompts, counted and binned by length. The model then prefills each
# prompt once.
from kv_transition.studies.grid import specs as grid_specs


# examples may come from the network
localrules:
    download,


rule download:
    output:
        FILES.source("{task}"),
    log:
        FILES.log("download", "{task}"),
    conda:
        "../../envs/data.yaml"
    params:
        spec=as_json(grid_specs.download(SETTINGS)) if TASKS else "{}",
    shell:
        "python -m kv_transition.data.download --spec {params.spec:q} --task {wildcards.task}"
        " --output {output:q} > {log:q} 2>&1"


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
        spec=as_json(grid_specs.prepare(SETTINGS)) if TASKS else "{}",
        outdir=lambda wildcards, output: os.path.dirname(output.manifest),
    shell:
        "python -m kv_transition.data.prepare --spec {params.spec:q} --task {wildcards.task}"
        " --source {input:q} --outdir {params.outdir:q} > {log:q} 2>&1"


rule prefill:
    input:
        PIECES.bin("{task}", "{bin}"),
    output:
        PIECES.prefill_index("{task}", "{bin}"),
    log:
        PIECES.log("prefill", "{task}", "bin{bin}"),
    # The longest bins run first, so no job waits for them at the end.
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
        " --bin {input:q} --index {output:q} > {log:q} 2>&1"
