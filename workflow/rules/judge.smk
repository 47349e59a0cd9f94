# A language model judges the answers of conversations, in addition to the rules.


# This job needs the network and the API key, so it runs on the machine that runs Snakemake.
localrules:
    judge,


rule judge:
    input:
        CHATS,
    output:
        report(FILES.table("judge"), caption="../report/judge.rst", category="Tables"),
    log:
        FILES.log("judge"),
    conda:
        "../../envs/analysis.yaml"
    params:
        spec=as_json(chat_specs.judge(SETTINGS)),
        # stores every verdict, so a rerun requests only the missing ones
        store=FILES.file("chat/judge.sqlite"),
    shell:
        "python -m kv_transition.studies.chat.judge --spec {params.spec:q} --store {params.store:q}"
        " --output {output:q} {input:q} > {log:q} 2>&1"
