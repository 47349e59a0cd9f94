# Text scored token by token from a compressed cache: windows of books, a length bin each, under every policy and budget.

CORPUS = SETTINGS.perplexity.corpus
PERPLEXITY_BINS = range(len(SETTINGS.perplexity.context_tokens))
PERPLEXITY = [
    FILES.perplexity(CORPUS, *key, bin) for key in specs.perplexity_cells(SETTINGS) for bin in PERPLEXITY_BINS
]


wildcard_constraints:
    corpus=paths_module.CORPUS,


# books may come from the network
localrules:
    perplexity_windows,


rule perplexity_windows:
    output:
        [FILES.windows(CORPUS, bin) for bin in PERPLEXITY_BINS],
    log:
        FILES.log("perplexity_windows", CORPUS),
    conda:
        "../../envs/data.yaml"
    params:
        spec=as_json(specs.windows(SETTINGS)),
    shell:
        "python -m kv_transition.studies.perplexity.windows --spec {params.spec:q} --output {output} > {log} 2>&1"


rule perplexity:
    input:
        FILES.windows("{corpus}", "{bin}"),
    output:
        FILES.perplexity("{corpus}", "{policy}", "{budget}", "{bin}"),
    log:
        FILES.log("perplexity", "{corpus}", "{policy}-{budget}", "bin{bin}"),
    # the longest contexts first, as for cells
    priority: lambda wildcards: int(wildcards.bin)
    conda:
        "../../envs/inference.yaml"
    threads: 4 if ON_GPU else 1
    resources:
        **GPU,
    params:
        spec=lambda wildcards: as_json(specs.perplexity(SETTINGS, wildcards.policy, wildcards.budget)),
    shell:
        "python -m kv_transition.worker kv_transition.studies.perplexity.run --spec {params.spec:q} --threads {threads}"
        " --windows {input} --output {output} > {log} 2>&1"
