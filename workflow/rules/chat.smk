# Conversations, played turn by turn on one growing cache under every policy and budget.

CHAT_SET = SETTINGS.chat.set
CONVERSATIONS = FILES.conversations(CHAT_SET)
CHATS = [FILES.chat(CHAT_SET, *key) for key in specs.chat_cells(SETTINGS)]
CHAT_LAYERS = [FILES.chat_layers(CHAT_SET, *key) for key in specs.chat_cells(SETTINGS)]


rule conversations:
    output:
        CONVERSATIONS,
    log:
        FILES.log("conversations", CHAT_SET),
    conda:
        "../../envs/data.yaml"
    params:
        spec=as_json(specs.conversations(SETTINGS)),
    shell:
        "python -m kv_transition.studies.chat.multiturn --spec {params.spec:q} --output {output} > {log} 2>&1"


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
        spec=lambda wildcards: as_json(specs.chat(SETTINGS, wildcards.policy, wildcards.budget)),
    shell:
        "python -m kv_transition.worker kv_transition.studies.chat.run --spec {params.spec:q} --threads {threads}"
        " --conversations {input} --output {output.turns} --layers {output.layers} > {log} 2>&1"
