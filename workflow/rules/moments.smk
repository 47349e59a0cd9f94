# Does recalling at steps chosen by entropy help? Compares answers of entropy_recall with its controls.


rule recall_moments:
    input:
        scores=rules.score.output[0],
    output:
        **figures(["recall_moments"]),
        table=report(FILES.table("recall_moments"), caption="../report/recall_moments.rst", category="Tables"),
    log:
        FILES.log("recall_moments"),
    conda:
        "../../envs/analysis.yaml"
    params:
        **calling("kv_transition.studies.recall.plots:write_recalling"),
        statistics=STATISTICS,
        policies=POLICIES,
    script:
        "../../scripts/call.py"


TARGETS += rules.recall_moments.output
TABLES["recall_moments"] = FILES.table("recall_moments")
BEFORE_REPORT += rules.recall_moments.output
