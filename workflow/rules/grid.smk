# The grid: every cell compresses the cache and answers. The answers give scores, estimates and the transition zone.


include: "grid_cells.smk"


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
        spec=as_json(grid_specs.calibrate(SETTINGS)) if TASKS else "{}",
    shell:
        "python -m kv_transition.worker kv_transition.studies.grid.calibrate --spec {params.spec:q}"
        " --task {wildcards.task} --threads {threads} --examples {input.examples:q} --manifest {input.manifest:q} --output {output:q} > {log:q} 2>&1"


rule cell:
    input:
        bin=PIECES.bin("{task}", "{bin}"),
        index=[] if REMOTE else PIECES.prefill_index("{task}", "{bin}"),
        calibration=calibration_of if RECALLING else [],
        treated=treated_of if RECALLING else [],
    output:
        PIECES.cell("{task}", "{mode}", "{policy}", "{budget}", "{bin}"),
    log:
        PIECES.log("cell", "{task}", "{mode}", "{policy}-{budget}", "bin{bin}"),
    priority: longest_first
    conda:
        "../../envs/inference.yaml"
    threads: 4 if ON_GPU else 1
    resources:
        **GPU,
        endpoint=int(REMOTE),
    params:
        spec=spec_of_cell,
    shell:
        (
            "python -m kv_transition.studies.grid.remote"
            if REMOTE
            else "python -m kv_transition.worker kv_transition.studies.grid.run"
        )
        + " --spec {params.spec:q} --threads {threads}"
        " --bin {input.bin:q} --output {output:q} --calibration {input.calibration:q} --treated {input.treated:q}"
        " > {log:q} 2>&1"


localrules:
    grid,


# The hash that each cell's rows must have. The folder .snakemake, which records what is stale, can be lost. The name of
# this file changes with the grid, so scoring still runs again and compares the hashes.
DIGESTS = {key: digest(cell_spec(*key)) for key in grid_specs.cells(SETTINGS)}
GRID = {
    files.cell(task, *key, bin): expected
    for files in ([FILES.shard(number) for number in range(len(SHARDS))] if ADAPTIVE else [FILES])
    for task in TASKS
    for key, expected in DIGESTS.items()
    for bin in BINS
}


rule grid:
    output:
        path=FILES.file(f"grid/{digest(GRID)}.json"),
    log:
        FILES.log("grid"),
    conda:
        "../../envs/analysis.yaml"
    params:
        **calling("kv_transition.provenance:write_json"),
        value=GRID,
    script:
        "../../scripts/call.py"


STATISTICS = SETTINGS.statistics.model_dump()


if ADAPTIVE:

    include: "adaptive.smk"

else:

    rule score:
        input:
            grid=rules.grid.output[0],
            # a function, because Snakemake would hash a named list once for each of its files
            cells=lambda wildcards: CELLS,
            bins=[FILES.bin(task, bin) for task in TASKS for bin in BINS],
            manifests=[FILES.manifest(task) for task in TASKS],
        output:
            output=report(FILES.table("scores"), caption="../report/scores.rst", category="Tables"),
        log:
            FILES.log("score"),
        conda:
            "../../envs/analysis.yaml"
        params:
            **calling("kv_transition.studies.grid.score:write_scores"),
            aliases=grid_specs.aliases(SETTINGS),
        script:
            "../../scripts/call.py"


rule aggregate:
    input:
        scores=rules.score.output[0],
    output:
        bin_stats=report(FILES.table("bin_stats"), caption="../report/bin_stats.rst", category="Tables"),
        comparisons=report(FILES.table("comparisons"), caption="../report/comparisons.rst", category="Tables"),
        pairs=report(FILES.table("pairs"), caption="../report/pairs.rst", category="Tables"),
        noninferiority=report(FILES.table("noninferiority"), caption="../report/noninferiority.rst", category="Tables"),
        smallest_budgets=report(
            FILES.table("smallest_budgets"), caption="../report/smallest_budgets.rst", category="Tables"
        ),
    log:
        FILES.log("aggregate"),
    conda:
        "../../envs/analysis.yaml"
    params:
        **calling("kv_transition.studies.grid.analysis.aggregate:write_aggregates"),
        statistics=STATISTICS,
    script:
        "../../scripts/call.py"


rule transition:
    input:
        scores=rules.score.output[0],
        comparisons=rules.aggregate.output.comparisons,
        noninferiority=rules.aggregate.output.noninferiority,
    output:
        transition=report(FILES.table("transition"), caption="../report/transition.rst", category="Tables"),
        budget_transition=report(
            FILES.table("budget_transition"), caption="../report/budget_transition.rst", category="Tables"
        ),
    log:
        FILES.log("transition"),
    conda:
        "../../envs/analysis.yaml"
    params:
        **calling("kv_transition.studies.grid.analysis.transition:write_transition"),
        statistics=STATISTICS,
    script:
        "../../scripts/call.py"


GRID_FIGURES = [
    *("acc_vs_len", "std_vs_len", "failrate_vs_len", "unknown_vs_len", "broken_vs_len", "latency_vs_len"),
    *("failures", "front", "differences"),
]
if SETTINGS.decoding.compress_every is not None:
    GRID_FIGURES.append("entries_over_steps")


rule plots:
    input:
        scores=rules.score.output[0],
        bin_stats=rules.aggregate.output.bin_stats,
        comparisons=rules.aggregate.output.comparisons,
        transition=rules.transition.output.transition,
    output:
        **figures(GRID_FIGURES),
        interactive=in_report("interactive", "html"),
    log:
        FILES.log("plots"),
    conda:
        "../../envs/analysis.yaml"
    params:
        **calling("kv_transition.studies.grid.plots:write_plots"),
    script:
        "../../scripts/call.py"


TARGETS += [CELLS, rules.grid.output, rules.score.output, rules.aggregate.output, rules.transition.output]
TARGETS += [rules.plots.output]
TABLES |= {
    name: str(path)
    for outputs in (rules.aggregate.output, rules.transition.output)
    for name, path in outputs.items()
    if name not in ("bin_stats", "comparisons", "transition")
}
if ADAPTIVE:
    TABLES["allocation"] = FILES.table("allocation")
BEFORE_REPORT += rules.plots.output
if any(options.get("kind", name) == specs.RECALL for name, options in POLICIES.items()):

    include: "moments.smk"
