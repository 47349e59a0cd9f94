# Conversations: each runs turn by turn on one growing cache, under every policy and budget.
from kv_transition.studies.chat import specs as chat_specs

CHAT_SET = SETTINGS.chat.set
CONVERSATIONS = FILES.conversations(CHAT_SET)
CHATS = [FILES.chat(CHAT_SET, *key) for key in chat_specs.cells(SETTINGS)]
CHAT_LAYERS = [FILES.chat_layers(CHAT_SET, *key) for key in chat_specs.cells(SETTINGS)]


rule conversations:
    output:
        CONVERSATIONS,
    log:
        FILES.log("conversations", CHAT_SET),
    conda:
        "../../envs/data.yaml"
    params:
        spec=as_json(chat_specs.conversations(SETTINGS)),
    shell:
        "python -m kv_transition.studies.chat.multiturn --spec {params.spec:q} --output {output:q} > {log:q} 2>&1"


rule chat:
    input:
        CONVERSATIONS,
    output:
        turns=FILES.chat(CHAT_SET, "{policy}", "{budget}"),
        layers=FILES.chat_layers(CHAT_SET, "{policy}", "{budget}"),
    log:
        FILES.log("chat", CHAT_SET, "{policy}-{budget}"),
    conda:
        "../../envs/inference.yaml"
    threads: 4 if ON_GPU else 1
    resources:
        **GPU,
    params:
        spec=lambda wildcards: as_json(chat_specs.cell(SETTINGS, wildcards.policy, wildcards.budget)),
    shell:
        "python -m kv_transition.worker kv_transition.studies.chat.run --spec {params.spec:q} --threads {threads}"
        " --conversations {input:q} --output {output.turns:q} --layers {output.layers:q} > {log:q} 2>&1"


JUDGED = SETTINGS.chat.judge is not None

if JUDGED:

    include: "judge.smk"


rule chat_verdicts:
    input:
        **({"judge": rules.judge.output[0]} if JUDGED else {}),
        chat=CHATS,
    output:
        output=report(FILES.table("chat_verdicts"), caption="../report/chat_verdicts.rst", category="Tables"),
    log:
        FILES.log("chat_verdicts"),
    conda:
        "../../envs/analysis.yaml"
    params:
        **calling("kv_transition.studies.chat.verdicts:write_verdicts"),
    script:
        "../../scripts/call.py"


rule retention:
    input:
        verdicts=rules.chat_verdicts.output[0],
        chat=CHATS,
    output:
        output=report(FILES.table("retention"), caption="../report/retention.rst", category="Tables"),
    log:
        FILES.log("retention"),
    conda:
        "../../envs/analysis.yaml"
    params:
        **calling("kv_transition.studies.chat.analysis:write_retention"),
        statistics=SETTINGS.statistics.model_dump(),
    script:
        "../../scripts/call.py"


rule memory_table:
    input:
        verdicts=rules.chat_verdicts.output[0],
        chat=CHATS,
        layers=CHAT_LAYERS,
    output:
        table=report(FILES.table("memory_table"), caption="../report/memory_table.rst", category="Tables"),
        cache=report(FILES.table("cache_anatomy"), caption="../report/cache_anatomy.rst", category="Tables"),
    log:
        FILES.log("memory_table"),
    conda:
        "../../envs/analysis.yaml"
    params:
        **calling("kv_transition.studies.chat.memory_table:write_memory_table"),
        statistics=SETTINGS.statistics.model_dump(),
    script:
        "../../scripts/call.py"


rule retention_plots:
    input:
        table=rules.retention.output[0],
    output:
        **figures(("retention", "survival", "cache_size", "conflicts")),
    log:
        FILES.log("retention_plots"),
    conda:
        "../../envs/analysis.yaml"
    params:
        **calling("kv_transition.studies.chat.plots:write_retention_plots"),
        confidence=SETTINGS.statistics.confidence,
    script:
        "../../scripts/call.py"


TABLES |= {name: FILES.table(name) for name in ("chat_verdicts", "retention", "memory_table", "cache_anatomy")}
TARGETS += [CHATS, list(TABLES.values()), rules.retention_plots.output]
BEFORE_REPORT += rules.retention_plots.output
