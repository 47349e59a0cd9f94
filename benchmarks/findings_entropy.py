"""The sections of docs/findings.md on the entropy of a token and the recall of the step that made it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import findings_figures as figures
import polars as pl
from document import table
from findings_sections import IMAGES, Row, ending, interval, kept, mean, picture

TEXTS = {"one_hop": "HotpotQA, one hop", "musique": "MuSiQue, cut down", "pg19": "PG-19"}
"""names of tasks that a reader knows"""


def entropy() -> list[str]:
    """Entropy and recall."""
    found = kept("entropy", "entropy_recall").filter(pl.col("policy") != "oracle", granularity="global", memory="ideal")
    cells = {
        key: {row["statistic"]: row for row in rows.to_dicts()}
        for key, rows in found.group_by("task", "policy", "budget")
    }
    verdicts = Counter(found.filter(statistic="verdict_controlled")["outcome"])
    counted = found.filter(statistic="pearson").group_by("task").agg(pl.col("n", "steps").max()).sort("task").to_dicts()
    texts, steps = (sum(row[name] for row in counted) for name in ("n", "steps"))
    keys = sorted(key for key in cells if key[2] == "r0.2")
    points = [
        {"cell": f"{TEXTS.get(task, task)}: {policy}", "entropy": f"{part} entropy", "recall": row["estimate"],
         "low": row["ci_low"], "high": row["ci_high"]}
        for task, policy, budget in keys for part in ("low", "medium", "high")
        if (row := cells[task, policy, budget].get(f"recall_{part}")) and row["estimate"] is not None
    ]  # fmt: skip
    figures.dots(
        points, "cell", "recall", group="entropy", title="mean recall, 95 % interval",
        head=("Recall of what a step needs, by its token's entropy", f"20 % held, n = {texts} texts, {steps} steps"),
        output=IMAGES / "real_entropy.svg", reference=0.2,
    )  # fmt: skip
    down = [key for key in keys if (t := cells[key].get("trend")) and t["ci_high"] is not None and t["ci_high"] < 0]
    counts = ", ".join(f"{count} {outcome}" for outcome, count in verdicts.most_common())
    confirmed, total = verdicts["confirmed"], verdicts.total()
    if not confirmed:
        answer = "Not as the study expects" if verdicts["not confirmed"] == total else "Not shown"
    else:
        answer = "Yes" if confirmed == total else "In part"
    lines = [
        "## Does entropy tell that a needed entry is missing?",
        "",
        f"{answer}. The study expects a recall of at least 0.8 at low entropy and below 0.5 at high entropy. Over all "
        f"texts, policies and budgets this is: {counts} (controlled for step, length and kind of prompt). At 20 % "
        f"held, recall falls as entropy rises in {len(down)} of {len(keys)} cases (the interval of the trend is below "
        "0).",
        *picture("real_entropy", "mean recall by entropy bin and policy"),
        table(
            ["text", "policy", "recall, low entropy", "medium", "high", "Pearson r", "verdict"],
            [[TEXTS.get(key[0], key[0]), key[1],
              *(_statistic(cells[key], part) for part in ("recall_low", "recall_medium", "recall_high", "pearson")),
              (cells[key].get("verdict_controlled") or {}).get("outcome") or "n/a"] for key in keys],
        ),
        "",
        "20 % held; " + "; ".join(f"{TEXTS.get(r['task'], r['task'])}: n = {r['n']} texts, {r['steps']} steps"
                                  for r in counted)
        + ". The question and the continuation of a text belong to one text; global sets, ideal memory "
        "(docs/observation.md).",
    ]  # fmt: skip
    return lines + ending(
        "longer texts; other models. Passages of PG-19 are of ten books, and two of one book count as independent.",
        "entropy",
    )


def entropy_heads() -> list[str]:
    """Entropy and recall in each head, for both memories, and the entropy gap."""
    found = kept("entropy_heads", "entropy_recall").filter(pl.col("policy") != "oracle", granularity="per_head")
    cells = {
        key: {row["statistic"]: row for row in rows.to_dicts()}
        for key, rows in found.group_by("policy", "budget", "memory")
    }
    verdicts = Counter(found.filter(statistic="verdict_controlled")["outcome"])
    counted = found.filter(statistic="pearson")
    texts, steps = counted["n"].max(), counted["steps"].max()
    keys = sorted(key for key in cells if key[1] == "r0.2")
    gaps = _gaps(kept("entropy_heads", "observations").filter(granularity="per_head"))
    figures.lines(
        [{name: row[name] for name in ("held", "value", "low", "high")}
         | {"cell": f"{row['policy']}, {row['memory']}"} for row in gaps], "held", "value", "cell",
        titles=("% of the entries held", "entropy gap in nats, mean over steps"), output=IMAGES / "real_gap.svg",
        head=("How far a step's prediction moves without the evicted entries", f"per head, n = {texts} texts"),
    )  # fmt: skip
    counts = ", ".join(f"{count} {outcome}" for outcome, count in verdicts.most_common())
    confirmed, total = verdicts["confirmed"], verdicts.total()
    answer = "Not as the study expects" if not confirmed else "Yes" if confirmed == total else "In part"
    return [
        "## And in each head, or when nothing comes back?",
        "",
        f"{answer}: with sets for each head, over all policies, budgets and memories the verdicts are: {counts} "
        "(controlled for step and length).",
        *picture("real_gap", "entropy gap by the share of entries held"),
        table(
            ["policy", "memory", "recall, low entropy", "medium", "high", "Pearson r", "verdict",
             "entropy gap in nats: low entropy", "high entropy"],
            [[key[0], key[2],
              *(_statistic(cells[key], part) for part in ("recall_low", "recall_medium", "recall_high", "pearson")),
              (cells[key].get("verdict_controlled") or {}).get("outcome") or "n/a",
              *_gap_cells(gaps, key)] for key in keys],
        ),
        "",
        f"20 % held; n = {texts} continuations of PG-19, {steps} steps; the entropy gap is measured at every eighth "
        "step: KL divergence of the prediction with the held entries only from that with all (docs/observation.md). "
        "Low and high entropy: the lower and upper third of the measured steps. `irreversible`: an evicted entry never "
        "returns.",
        *ending(
            "questions, global sets (above), longer texts; other models. Passages are of ten books, and two of one "
            "book count as independent.",
            "entropy_heads",
        ),
    ]  # fmt: skip


def _gaps(observed: pl.DataFrame) -> list[Row]:
    """Return the mean entropy gap by policy, memory and budget: over all steps, and in the thirds of low and high
    entropy.
    """
    measured = observed.filter(pl.col("entropy_gap").is_not_null(), pl.col("policy") != "oracle")
    low, high = (measured["entropy"].quantile(share) for share in (1 / 3, 2 / 3))
    rows = []
    for (policy, memory, budget), own in sorted(measured.group_by("policy", "memory", "budget")):
        overall = mean(own["entropy_gap"], own["example_id"])
        thirds = own.filter(pl.col("entropy") <= low), own.filter(pl.col("entropy") >= high)
        rows.append({
            "policy": policy, "memory": memory, "budget": budget, "held": 100 * float(str(budget)[1:]),
            "value": overall.value, "low": overall.low, "high": overall.high,
            "thirds": [mean(third["entropy_gap"], third["example_id"]) for third in thirds],
        })  # fmt: skip
    return rows


def _gap_cells(gaps: Sequence[Row], key: tuple[str, str, str]) -> list[str]:
    row = next(r for r in gaps if (r["policy"], r["budget"], r["memory"]) == key)
    return [interval(found.value, found.low, found.high, 2) for found in row["thirds"]]


def _statistic(found: dict[str, Row], name: str) -> str:
    row = found.get(name)
    if row is None or row["estimate"] is None:
        return "–"
    return interval(row["estimate"], row["ci_low"], row["ci_high"], 2)
