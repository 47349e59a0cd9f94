# Perplexity: windows of books are scored token by token with a compressed cache, for each length bin, policy and budget.

from kv_transition.studies.perplexity import specs as perplexity_specs

CORPUS = SETTINGS.perplexity.corpus
PERPLEXITY_BINS = range(len(SETTINGS.perplexity.context_tokens))
PERPLEXITY = [
    FILES.perplexity(CORPUS, *key, bin) for key in perplexity_specs.cells(SETTINGS) for bin in PERPLEXITY_BINS
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
        spec=as_json(perplexity_specs.windows(SETTINGS)),
    shell:
        "python -m kv_transition.studies.perplexity.windows --spec {params.spec:q} --output {output:q} > {log:q} 2>&1"


rule perplexity:
    input:
        FILES.windows("{corpus}", "{bin}"),
    output:
        FILES.perplexity("{corpus}", "{policy}", "{budget}", "{bin}"),
    log:
        FILES.log("perplexity", "{corpus}", "{policy}-{budget}", "bin{bin}"),
    # the longest contexts run first, as for cells
    priority: lambda wildcards: int(wildcards.bin)
    conda:
        "../../envs/inference.yaml"
    threads: 4 if ON_GPU else 1
    resources:
        **GPU,
    params:
        spec=lambda wildcards: as_json(perplexity_specs.cell(SETTINGS, wildcards.policy, wildcards.budget)),
    shell:
        "python -m kv_transition.worker kv_transition.studies.perplexity.run --spec {params.spec:q} --threads {threads}"
        " --windows {input:q} --output {output:q} > {log:q} 2>&1"


rule perplexity_stats:
    input:
        windows=PERPLEXITY,
    output:
        table=report(FILES.table("perplexity"), caption="../report/perplexity.rst", category="Tables"),
        pairs=report(FILES.table("perplexity_pairs"), caption="../report/perplexity_pairs.rst", category="Tables"),
    log:
        FILES.log("perplexity_stats"),
    conda:
        "../../envs/analysis.yaml"
    params:
        **calling("kv_transition.studies.perplexity.analysis:write_perplexity"),
        statistics=SETTINGS.statistics.model_dump(),
        policies=POLICIES,
        # the folder .snakemake, which records what is stale, can be lost
        expected={
            FILES.perplexity(CORPUS, *key, bin): digest(perplexity_specs.cell(SETTINGS, *key))
            for key in perplexity_specs.cells(SETTINGS)
            for bin in PERPLEXITY_BINS
        },
    script:
        "../../scripts/call.py"


rule perplexity_plots:
    input:
        table=rules.perplexity_stats.output.table,
        pairs=rules.perplexity_stats.output.pairs,
    output:
        **figures(("ppl_vs_compression", "ppl_vs_len", "merge_vs_drop")),
    log:
        FILES.log("perplexity_plots"),
    conda:
        "../../envs/analysis.yaml"
    params:
        **calling("kv_transition.studies.perplexity.plots:write_perplexity_plots"),
        policies=POLICIES,
        confidence=SETTINGS.statistics.confidence,
    script:
        "../../scripts/call.py"


TARGETS += [PERPLEXITY, rules.perplexity_plots.output]
TABLES |= {name: FILES.table(name) for name in ("perplexity", "perplexity_pairs")}
BEFORE_REPORT += rules.perplexity_plots.output
