# A language model judges the answers of conversations beside the rules.


# It is elsewhere, so this waits for the network: it runs where snakemake runs, which has the key.
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
        # verdicts stay here whatever becomes of the output, so that a rerun asks only for those that are missing
        store=FILES.file("chat/judge.sqlite"),
    shell:
        "python -m kv_transition.studies.chat.judge --spec {params.spec:q} --store {params.store:q}"
        " --output {output:q} {input:q} > {log:q} 2>&1"
