"""The section of docs/findings.md on the answers of another implementation at the same K."""

from __future__ import annotations

import json

from document import table
from findings_sections import KEPT, computed_by


def agreement() -> list[str]:
    """Answers of kvpress and of this project."""
    facts = json.loads((KEPT / "agreement" / "agreement.json").read_text(encoding="utf-8"))
    rows, apart = [], []
    for policy, found in facts["policies"].items():
        equal = sum(one["equal"] for one in found)
        both, entries = (sum(one[key] for one in found) for key in ("kept_by_both", "entries"))
        rows.append([policy, f"{equal} of {len(found)}", f"{both} of {entries}"])
        apart += [
            f"{policy} on {one['example']}, at token {one['step'] + 1}: the logits of the two tokens are "
            f"{one['logits_apart']} apart, and {one['entries'] - one['kept_by_both']} of {one['entries']} kept entries "
            "are others"
            for one in found
            if not one["equal"]
        ]
    n = len(next(iter(facts["policies"].values())))
    total = sum(int(row[1].split()[0]) for row in rows)
    return [
        "## Does another implementation say the same?",
        "",
        f"Of {n * len(rows)} answers {total} are equal to the last token to those of kvpress {facts['kvpress']} at the "
        f"same K, float32, before the question; n = {n} prompts of {facts['prompts']}, {facts['steps']} tokens each, "
        f"{facts['budget']} of the entries kept.",
        "",
        table(["policy", "equal answers", "entries kept by both"], rows),
        "",
        f"Where they differ: {'; '.join(apart) or 'nowhere'}.",
        "",
        "Entries are counted over layers, KV heads and prompts (about 1,054 tokens each). What it does not show: other "
        "tasks, lengths and budgets, after the prompt, other models.",
        "",
        f"Command: `make bench-peers`, then `python benchmarks/real_agreement.py PROMPTS --n {n}`, where PROMPTS is a "
        "file of prepared prompts (RESULTS/EXPERIMENT/data/TASK/bin1.parquet), here of "
        f"`config/experiments/real_lengths.yaml`. {computed_by(facts)}",
    ]
