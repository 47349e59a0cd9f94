# Answers become scores, scores become estimates with intervals, estimates become a transition zone.


# The hash that each cell's rows must carry. The .snakemake folder, which knows what is stale, can get lost; a grid
# that changed has another name here, so that scoring runs again all the same and compares.
GRID = {
    files.cell(task, *key, bin): digest(cell_spec(*key))
    for files in ([FILES.shard(number) for number in range(len(SHARDS))] if ADAPTIVE else [FILES])
    for task in TASKS
    for key in specs.cells(SETTINGS)
    for bin in BINS
}


rule grid:
    output:
        FILES.file(f"grid/{digest(GRID)}.json"),
    log:
        FILES.log("grid"),
    conda:
        "../../envs/analysis.yaml"
    params:
        cells=GRID,
    script:
        "../../scripts/grid.py"


STATISTICS = SETTINGS.statistics.model_dump()


if ADAPTIVE:

    include: "adaptive.smk"

else:

    rule score:
        input:
            grid=rules.grid.output[0],
            # as a function: a named list would be hashed whole for each of its files
            cells=lambda wildcards: CELLS,
            bins=[FILES.bin(task, bin) for task in TASKS for bin in BINS],
            manifests=[FILES.manifest(task) for task in TASKS],
        output:
            report(FILES.table("scores"), caption="../report/scores.rst", category="Tables"),
        log:
            FILES.log("score"),
        conda:
            "../../envs/analysis.yaml"
        params:
            aliases=specs.aliases(SETTINGS),
            code=code_hash("kv_transition.studies.grid.score"),
        script:
            "../../scripts/score.py"


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
        statistics=STATISTICS,
        code=code_hash("kv_transition.studies.grid.analysis.aggregate"),
    script:
        "../../scripts/aggregate.py"


rule transition:
    input:
        scores=rules.score.output[0],
        bin_stats=rules.aggregate.output.bin_stats,
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
        statistics=STATISTICS,
        code=code_hash("kv_transition.studies.grid.analysis.transition"),
    script:
        "../../scripts/transition.py"
