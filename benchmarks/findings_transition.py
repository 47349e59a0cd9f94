"""The section of docs/findings.md on the grid: a needle under ten policies, by budget, length and mode."""

from __future__ import annotations

from collections import Counter

import findings_figures as figures
import polars as pl
from document import table
from findings_sections import IMAGES, Row, ending, interval, kept, picture, there

from kv_transition import labels


def transition() -> list[str]:
    """Where answers break under eviction, and which policy holds longest."""
    stats = _stats()
    score = _of(stats, "score_mean")
    failures = _of(stats, "failure_rate")
    footprint = _of(stats, "footprint")
    cells = [key for key in score if key[1] != "full" and key[2] != "r1"]
    n = min(row["n"] for row in score.values())
    settings = sorted({(mode, bin_) for mode, _, _, bin_ in cells})
    tokens = {bin_: score[key]["token_max"] for key in score for bin_ in [key[3]]}
    for mode, bin_ in settings:
        rows = [
            score[key] | {"kept": 100 * footprint[key]["estimate"], "policy": key[1]}
            for key in sorted(cells) if (key[0], key[3]) == (mode, bin_)
        ]  # fmt: skip
        best = {p: max(r["estimate"] for r in rows if r["policy"] == p) for p in {r["policy"] for r in rows}}
        figures.lines(
            [r | {"low": r["ci_low"], "high": r["ci_high"]}
             for r in sorted(rows, key=lambda r, best=best: (-best[r["policy"]], r["policy"]))],
            "kept", "estimate", "policy", titles=("% of the full cache's bytes, mean over the answer", "mean score"),
            head=(f"A needle, compressed {labels.mode(mode)}: {tokens[bin_]:,} tokens",
                  f"SmolLM2-135M-Instruct, niah_single, n = {n} a point, 95 % intervals"),
            output=IMAGES / f"{_image(mode, bin_)}.svg",
        )  # fmt: skip
    pictures = []
    for mode, bin_ in settings:
        pictures += picture(_image(mode, bin_), f"score by share kept, {labels.mode(mode)}, {tokens[bin_]} tokens")[1:]
    below = [key for key in cells if score[key]["ci_high"] < score[_full(key)]["ci_low"]]
    broken = [key for key in cells if failures[key]["ci_low"] > failures[_full(key)]["ci_high"]]
    early = [key for key in broken if key not in below]
    tables = []
    for mode, bin_ in settings:
        own = [key for key in cells if (key[0], key[3]) == (mode, bin_)]
        budgets = sorted({key[2] for key in own}, key=labels.budget_order)
        policies = sorted({key[1] for key in own})
        full = score[mode, "full", "r1", bin_]
        tables += [
            "",
            f"Mean score, compressed {labels.mode(mode)}, {tokens[bin_]:,} tokens, n = {n}; full cache {_cell(full)}:",
            "",
            table(
                ["policy", *(f"{labels.budget(b)} kept" for b in budgets)],
                [[p, *(_cell(score.get((mode, p, b, bin_))) for b in budgets)] for p in policies],
            ),
        ]
    order = "rise before the mean falls" if early else "do not rise before the mean falls"
    lines = [
        "## Where does the answer break, and which policy holds longest?",
        "",
        f"Of {len(cells)} cells (policy, budget, mode, length) {len(below)} are below the full cache's score, their "
        f"intervals apart. {_leaders(cells, score)}",
        "",
        f"Failures (answers that are broken, empty or an abstention) {order} on this task: they are above the full "
        f"cache's, intervals apart, in {len(broken)} cells, in {len(early)} of these while the mean is not below.",
        "",
        *pictures[:-1],
        "",
        f"The {len(cells) - len(below)} cells whose interval is not below the full cache's:",
        "",
        _held([key for key in cells if key not in below], tokens),
        *tables,
        "",
        "By the definition of docs/statistics.md: "
        + ", ".join(f"{count} {outcome}" for outcome, count in _outcomes().most_common())
        + " (policy, budget and mode over the first two lengths).",
    ]
    return lines + ending(
        "other tasks, models and lengths; with so few lengths a zone is located along budgets, not along lengths. "
        "Policies are compared at equal budgets; the figures' axis is what they really held.",
        *there(*RUNS),
    )


Key = tuple[str, str, str, int]

RUNS = ("transition", "transition_long")
"""kept runs of the same grid, in the order of their lengths"""


def _stats() -> pl.DataFrame:
    """Return the estimates of all runs; the bins of a run follow those of the runs before it."""
    found: list[pl.DataFrame] = []
    for name in there(*RUNS):
        before = sum(part["bin"].n_unique() for part in found)
        found.append(kept(name, "bin_stats").with_columns(pl.col("bin") + before))
    return pl.concat(found)


def _of(stats: pl.DataFrame, statistic: str) -> dict[Key, Row]:
    """Return the rows of a statistic by mode, policy, budget and bin; budgets that keep everything are left out."""
    rows = stats.filter(statistic=statistic).to_dicts()
    return {(r["mode"], r["policy"], r["budget"], r["bin"]): r for r in rows}


def _full(key: Key) -> Key:
    return (key[0], "full", "r1", key[3])


def _image(mode: str, bin_: int) -> str:
    return f"real_transition_{mode}_{bin_}"


def _cell(row: Row | None) -> str:
    return "–" if row is None else interval(row["estimate"], row["ci_low"], row["ci_high"], 2)


def _leaders(cells: list[Key], score: dict[Key, Row]) -> str:
    """Return which policies are best, where their interval is above that of every other."""
    found: Counter[tuple[str, str]] = Counter()
    settings = {(mode, budget, bin_) for mode, _, budget, bin_ in cells}
    for mode, budget, bin_ in settings:
        rows = sorted(
            (score[key] for key in cells if (key[0], key[2], key[3]) == (mode, budget, bin_)),
            key=lambda row: -row["estimate"],
        )
        if len(rows) > 1 and rows[0]["ci_low"] > max(row["ci_high"] for row in rows[1:]):
            found[rows[0]["policy"], mode] += 1
    if not found:
        return f"In none of {len(settings)} settings (mode, budget, length) is one policy's interval above all others'."
    each = ", ".join(f"{policy} {labels.mode(mode)} in {n}" for (policy, mode), n in found.most_common())
    return (
        f"One policy's interval is above all others' in {found.total()} of {len(settings)} settings (mode, budget, "
        f"length): {each}."
    )


def _held(cells: list[Key], tokens: dict[int, int]) -> str:
    """Return a table of the policies of the cells by mode, length and budget."""
    policies: dict[tuple[str, int, str], list[str]] = {}
    for mode, policy, budget, bin_ in sorted(cells, key=lambda k: (k[0], k[3], labels.budget_order(k[2]), k[1])):
        policies.setdefault((mode, bin_, budget), []).append(policy)
    rows = [
        [labels.mode(mode), f"{tokens[bin_]:,}", labels.budget(budget), ", ".join(names)]
        for (mode, bin_, budget), names in policies.items()
    ]
    return table(["compressed", "tokens", "kept", "policies"], rows)


def _outcomes() -> Counter[str]:
    found = kept("transition", "transition").filter(detector="definition")
    return Counter(found["outcome"].to_list())
