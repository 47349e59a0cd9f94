"""docs/findings.md and its figures, from the tables that were kept of runs on a real language model.

python benchmarks/findings.py
"""

from __future__ import annotations

import findings_agreement as agreement
import findings_chat as chat
import findings_entropy as entropy
import findings_full_cache as full_cache
import findings_perplexity as perplexity
import findings_sections as sections
import findings_transition as transition
from document import put

PAGE = sections.ROOT / "docs" / "findings.md"
STUDIES = {
    "one_hop": full_cache.full_cache,
    "transition": transition.transition,
    "transition_tasks": transition.transition_tasks,
    "entropy": entropy.entropy,
    "entropy_heads": entropy.entropy_heads,
    "recall": perplexity.recall,
    "merging": perplexity.merging,
    "ablation": perplexity.ablation,
    "sinks": perplexity.sinks,
    "agreement": agreement.agreement,
    "rules": chat.rules,
    "memory": chat.memory,
    "chat": chat.chat,
}
"""folder below benchmarks/results/real: its section"""
NOT_RUN = {
    "one_hop": "What the model can do with its full cache: `config/experiments/real_one_hop.yaml`, for the ruler "
    "tasks `config/experiments/real_lengths.yaml`, for those of LongBench `config/experiments/real_longbench.yaml`.",
    "transition": "The transition: `make real` for a needle, two lengths and four policies; ten policies and 60 "
    "examples a bin: `config/experiments/real_transition.yaml`, at 2,048 tokens "
    "`config/experiments/real_transition_long.yaml`.",
    "transition_tasks": "The transition on other tasks: `config/experiments/real_transition_tasks.yaml`.",
    "entropy": "Entropy and recall: `config/experiments/real_entropy.yaml`.",
    "entropy_heads": "Entropy and recall in each head: `config/experiments/real_entropy_heads.yaml`.",
    "merging": "Merging: `config/experiments/real_merging.yaml` and `config/experiments/real_merging_long.yaml`.",
    "ablation": "Where merging loses: `config/experiments/real_merging_ablation.yaml`.",
    "sinks": "Sinks: `config/experiments/real_sinks.yaml`.",
    "agreement": "Agreement with kvpress: `benchmarks/real_agreement.py`.",
    "recall": "Recall at uncertain moments: `config/experiments/real_recall.yaml`.",
    "rules": "Which rules the model follows with its full cache: `config/experiments/real_rules.yaml`.",
    "memory": "Conversations on a compressed cache: `config/experiments/real_memory.yaml`.",
    "chat": "MT-bench and MT-Eval on a compressed cache: `config/experiments/real_chat.yaml`.",
}
HEAD = """# Findings on a real language model

SmolLM2-135M-Instruct, Q4_1 weights computed in float32. One model of 135M parameters: what holds here need not hold for
larger ones. Brackets are 95 % intervals. Written by `python benchmarks/findings.py` from benchmarks/results/real;
`benchmarks/keep_real.py` puts the tables of a run there. [Policies](policies.md) describes the policies,
[statistics](statistics.md) the intervals, the outcomes of a transition and Holm's adjustment; the first lines of an
experiment file describe its run and its data."""


EXCERPTS = {
    ("docs/perplexity.md", "real-sinks"): "sinks",
    ("docs/perplexity.md", "real-merging"): "ablation",
    ("docs/benchmarks.md", "real-sinks"): "sinks",
}
"""places in other pages that quote a section: its answer, its first table and what n is"""


def excerpt(name: str) -> str:
    """Return the answer of a section, its first table and the line on n."""
    lines = STUDIES[name]()
    tables = [line for line in lines if line.startswith("| ")]
    counted = [line for line in lines[3:] if line.startswith("n = ")]
    return "\n\n".join([lines[2], tables[0], *counted])


def page() -> str:
    """Return the whole page, and write the figures."""
    there = [name for name in STUDIES if (sections.KEPT / name).is_dir()]
    parts = [HEAD, *("\n".join(STUDIES[name]()) for name in there)]
    if missing := [NOT_RUN[name] for name in STUDIES if name not in there]:
        parts.append("\n".join(["## Not run", "", *(f"- {text}" for text in missing)]))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    for (path, place), name in EXCERPTS.items():
        if (sections.KEPT / name).is_dir():
            put(sections.ROOT / path, place, excerpt(name))
    put(sections.ROOT / "README.md", "real", perplexity.front())
    put(sections.ROOT / "docs" / "index.md", "real", perplexity.first_picture(""))
