# Adaptive allocation: after each round, a look determines which bins get another shard of examples (docs/statistics.md).
# Shards are fixed parts of a bin's order of choice, so no look changes what ran before it.
import pyarrow.parquet


rule shard:
    input:
        FILES.bin("{task}", "{bin}"),
    output:
        PIECES.bin("{task}", "{bin}"),
    log:
        PIECES.log("shard", "{task}", "bin{bin}"),
    conda:
        "../../envs/data.yaml"
    params:
        begin=lambda wildcards: SHARDS[int(wildcards.shard)][0],
        end=lambda wildcards: SHARDS[int(wildcards.shard)][1],
        code=code_hash("kv_transition.data.shard"),
    shell:
        "python -m kv_transition.data.shard --bin {input:q} --begin {params.begin:q} --end {params.end:q}"
        " --output {output:q} > {log:q} 2>&1"


rule score_shard:
    input:
        grid=rules.grid.output[0],
        cells=[PIECES.cell("{task}", *key, "{bin}") for key in grid_specs.cells(SETTINGS)],
        bins=[PIECES.bin("{task}", "{bin}")],
        manifests=[FILES.manifest("{task}")],
    output:
        output=PIECES.bin_scores("{task}", "{bin}"),
    log:
        PIECES.log("score", "{task}", "bin{bin}"),
    conda:
        "../../envs/analysis.yaml"
    params:
        **calling("kv_transition.studies.grid.score:write_scores"),
        aliases=grid_specs.aliases(SETTINGS),
    script:
        "../../scripts/call.py"


def decided(look):
    """The rows of a look; until it is taken, an IncompleteCheckpointException tells Snakemake to take it."""
    return pyarrow.parquet.read_table(checkpoints.allocate.get(look=str(look)).output[0]).to_pylist()


def shards_at(look):
    """(task, bin, shard) of everything that has been run by a look: one shard each at the first one."""
    sizes = {(row["task"], row["bin"]): row["wanted"] for row in decided(look - 1)} if look else {}
    return [
        (task, bin, number)
        for task in TASKS
        for bin in BINS
        for number, (begin, _) in enumerate(SHARDS)
        if begin < sizes.get((task, bin), 1) or number == 0
    ]


def last_look():
    look = 0
    while any(row["wanted"] > row["n"] for row in decided(look)):
        look += 1
    return look


def scores_at(look):
    return [FILES.shard(number).bin_scores(task, bin) for task, bin, number in shards_at(look)]


checkpoint allocate:
    input:
        needs=lambda wildcards: FILES.allocation(int(wildcards.look) - 1) if int(wildcards.look) else [],
        scores=lambda wildcards: scores_at(int(wildcards.look)),
        manifests=[FILES.manifest(task) for task in TASKS],
    output:
        output=FILES.allocation("{look}"),
    log:
        FILES.log("allocate", "look{look}"),
    conda:
        "../../envs/analysis.yaml"
    params:
        **calling("kv_transition.studies.grid.analysis.looks:write_look"),
        plan=SETTINGS.adaptive.model_dump(),
        look=lambda wildcards: int(wildcards.look),
        statistics=SETTINGS.statistics.model_dump(),
    script:
        "../../scripts/call.py"


rule score:
    input:
        shards=lambda wildcards: scores_at(last_look()),
        looks=lambda wildcards: [FILES.allocation(look) for look in range(last_look() + 1)],
    output:
        scores=report(FILES.table("scores"), caption="../report/scores.rst", category="Tables"),
        allocation=report(FILES.table("allocation"), caption="../report/allocation.rst", category="Tables"),
    log:
        FILES.log("score"),
    conda:
        "../../envs/analysis.yaml"
    params:
        **calling("kv_transition.studies.grid.analysis.looks:write_published"),
    script:
        "../../scripts/call.py"


def CELLS(wildcards):
    """The cells that were run, in the place of the grid's."""
    return [
        FILES.shard(number).cell(task, *key, bin)
        for task, bin, number in shards_at(last_look())
        for key in grid_specs.cells(SETTINGS)
    ]


def STATISTICS(wildcards, input):
    """Everything is stated at the last look's confidence."""
    with open(input.scores, "rb") as scores:  # Snakemake handles a missing file, but not pyarrow's error
        return SETTINGS.statistics.model_dump() | {"confidence": float(read_metadata(scores)["confidence"])}
