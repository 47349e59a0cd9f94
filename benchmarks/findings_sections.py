"""The sections of docs/findings.md, each from the tables that were kept of one experiment on a real language model.

Every number is read from benchmarks/results/real; every answer is chosen by what the intervals carry.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import findings_figures as figures
import polars as pl
from document import table

from kv_transition import labels
from kv_transition.stats.examples import Statistics
from kv_transition.studies.perplexity.analysis import share

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "benchmarks" / "results" / "real"
IMAGES = ROOT / "docs" / "images"
SETS = {"books": "perplexity.path=BOOKS", "records": "dataset.path=DATA"}
Row = dict[str, Any]


def kept(name: str, what: str) -> pl.DataFrame:
    return pl.read_parquet(KEPT / name / f"{what}.parquet")


def run(name: str) -> Row:
    return json.loads((KEPT / name / "run.json").read_text(encoding="utf-8"))


def interval(value: float, low: float | None, high: float | None, digits: int = 3) -> str:
    if low is None or high is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def ending(name: str, not_shown: str, given: str | None = None) -> list[str]:
    """What the study does not show, its command, what it took and at which commit it was run."""
    facts = run(name)
    assignment = f" --config set='{SETS[given]}'" if given else ""
    versions = facts["package_versions"]
    took = facts.get("took") or f"{facts['processor_s'] / 60:.0f} minutes of processor time"
    made = f"torch {versions['torch']}, transformers {versions['transformers']}"
    return [
        "",
        f"What it does not show: {not_shown}",
        "",
        f"Command: `snakemake --cores 1 --configfile config/experiments/{facts['experiment']}.yaml{assignment}`; "
        f"{took}. Commit {facts['git_commit'][:12]}, {made}.",
    ]


def picture(name: str, text: str) -> list[str]:
    return ["", f"![{text}](images/{name}.svg)", ""]


# ----------------------------------------------------------------------------------------------------
# Study 1


def full_cache() -> list[str]:
    """What the model can do before anything is evicted."""
    rows: list[Row] = []
    for name in ("lengths", "one_hop", "transition"):
        if (KEPT / name).is_dir():
            found = kept(name, "bin_stats").filter(policy="full", statistic="score_mean", mode="after_prompt")
            rows += found.sort("task", "bin").to_dicts()
    best: dict[tuple[str, int], Row] = {}
    for row in rows:  # the same task was run with more examples as well
        key = (row["task"], row["token_max"])
        best[key] = max(row, best.get(key, row), key=lambda r: r["n"])
    chosen = sorted(best.values(), key=lambda r: (r["task"], r["token_max"]))
    good = sorted({r["task"] for r in chosen if all(o["estimate"] >= 0.5 for o in chosen if o["task"] == r["task"])})
    weak = sorted({r["task"] for r in chosen} - set(good))
    figures.dots(
        [r | {"label": f"{r['task']}, {r['token_max']} tokens", "low": r["ci_low"], "high": r["ci_high"]}
         for r in chosen],
        "label", "estimate", title="mean score, 95 % interval", output=IMAGES / "real_full_cache.svg", reference=0.5,
        head=("What the model can do with its full cache", "SmolLM2-135M-Instruct, nothing evicted"),
    )  # fmt: skip
    lines = [
        "## What can the model do at all?",
        "",
        f"At the lengths that were run its mean score is 0.5 or more on {_listed(good)}, and lower on {_listed(weak)}. "
        "A score says what eviction costs only on a task that the model can do.",
        *picture("real_full_cache", "mean score of the full cache by task and length"),
        table(
            ["task", "tokens", "n", "mean score [95 %]"],
            [[r["task"], str(r["token_max"]), str(r["n"]), interval(r["estimate"], r["ci_low"], r["ci_high"], 2)]
             for r in chosen],
        ),
        "",
        "`one_hop`: questions of HotpotQA with the one paragraph that holds the answer among distractors (F1); "
        "`key_value`: copying a number from a list (F1)."
        + (" The others are this project's ruler tasks." if len({r["task"] for r in chosen}) > 2 else ""),
    ]  # fmt: skip
    return lines + ending(
        "one_hop",
        "lengths beyond 1,024 tokens, this project's ruler tasks (`real_lengths.yaml`), LongBench's tasks (almost all "
        "of the texts at hand are longer than 2,000 tokens); with so few examples, any difference that the intervals "
        "do not show.",
        "records",
    )


def transition() -> list[str]:
    """The grid on the needle."""
    stats = kept("transition", "bin_stats").filter(statistic="score_mean")
    cells = stats.filter(pl.col("policy") != "full").sort(
        "mode", "budget", "bin", "policy", descending=[False, True] + [False] * 2
    )
    full = stats.filter(policy="full")
    n = int(stats["n"].min())
    table_rows, best_rows = [], []
    for (mode, budget, b), group in cells.group_by("mode", "budget", "bin", maintain_order=True):
        rows = group.sort("estimate", descending=True).to_dicts()
        first, second = rows[0], rows[1]
        best_rows.append((mode, budget, b, first, second))
        for row in sorted(rows, key=lambda r: -r["estimate"]):
            table_rows.append([labels.mode(mode), labels.budget(budget), str(row["token_max"]), row["policy"],
                               interval(row["estimate"], row["ci_low"], row["ci_high"], 2)])  # fmt: skip
    apart = [one for one in best_rows if one[3]["ci_low"] > one[4]["ci_high"]]
    below = sum(_below(row, full) for row in cells.to_dicts())
    of_full = ", ".join(f"{r['estimate']:.2f} at {r['token_max']}" for r in full.filter(mode="after_prompt").to_dicts())
    figures.dots(
        [r | {"label": f"{labels.mode(r['mode'])}, {labels.budget(r['budget'])}, {r['token_max']} tokens",
              "low": r["ci_low"], "high": r["ci_high"]} for r in cells.to_dicts()],
        "label", "estimate", group="policy", title="mean score, 95 % interval", output=IMAGES / "real_transition.svg",
        head=("A needle under eviction", f"niah_single, n = {n} a row; full cache after the prompt: {of_full}"),
    )  # fmt: skip
    leaders = "; ".join(
        f"{first['policy']} {labels.mode(mode)} at {labels.budget(budget)} and {first['token_max']} tokens"
        for mode, budget, _, first, _ in apart
    )
    outcomes = kept("transition", "transition").filter(detector="definition")
    counted = outcomes.group_by("outcome").len().sort("len", descending=True).to_dicts()
    lines = [
        "## Where does the answer break, and which policy holds longest?",
        "",
        f"Of {cells.height} cells (policy, budget, mode, length) {below} are below the full cache's score, "
        f"their intervals "
        f"apart. "
        + (f"A single policy is best, its interval above the second's, in {len(apart)} of {len(best_rows)} settings: "
           f"{leaders}." if apart else "In no setting is one policy's interval above all others'."),
        *picture("real_transition", "mean score of policies on the needle task"),
        table(["compressed", "kept", "tokens", "policy", f"mean score [95 %], n = {n}"], table_rows),
        "",
        "Transition zones by the definition in docs/statistics.md: "
        + ", ".join(f"{r['len']} {r['outcome']}" for r in counted) + " (policy, budget and mode).",
    ]  # fmt: skip
    return lines + ending(
        "transition",
        "more than two lengths, so that a zone can hardly be located; tova, pyramidkv, adakv, "
        "expected_attention, keydiff, "
        "knorm; budgets of 10 %, 128 and 512 tokens; other tasks.",
    )


def _below(row: Row, full: pl.DataFrame) -> bool:
    own = full.filter(mode=row["mode"], bin=row["bin"]).to_dicts()[0]
    return row["ci_high"] < own["ci_low"]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "no task"


# ----------------------------------------------------------------------------------------------------
# Study 2


def entropy() -> list[str]:
    """Entropy and recall."""
    found = kept("entropy", "entropy_recall").filter(pl.col("policy") != "oracle", granularity="global", memory="ideal")
    r = {key: {row["statistic"]: row for row in rows.to_dicts()} for key, rows in found.group_by("policy", "budget")}
    verdicts = found.filter(statistic="verdict_controlled")["outcome"].value_counts().sort("count", descending=True)
    n = int(found.filter(statistic="pearson")["n"].max())
    steps = int(found.filter(statistic="pearson")["steps"].max())
    keys = sorted((key for key in r if key[1] == "r0.2"), key=lambda key: key[0])
    points = []
    for policy, budget in keys:
        for part in ("low", "medium", "high"):
            row = r[policy, budget].get(f"recall_{part}")
            if row and row["estimate"] is not None:
                points.append({"policy": policy, "entropy": f"{part} entropy", "recall": row["estimate"],
                               "low": row["ci_low"], "high": row["ci_high"]})  # fmt: skip
    figures.dots(
        points, "policy", "recall", group="entropy", title="mean recall, 95 % interval",
        head=("Recall of what a step needs, by the entropy of its token", f"20 % held, n = {n} texts, {steps} steps"),
        output=IMAGES / "real_entropy.svg", reference=0.2,
    )  # fmt: skip
    down = [key[0] for key in keys if (t := r[key].get("trend")) and t["ci_high"] is not None and t["ci_high"] < 0]
    counts = ", ".join(f"{row['count']} {row['outcome']}" for row in verdicts.to_dicts())
    confirmed = verdicts.filter(outcome="confirmed")["count"].sum()
    refused = verdicts.filter(outcome="not confirmed")["count"].sum()
    answer = (
        "No" if refused == verdicts["count"].sum() else "Yes" if confirmed == verdicts["count"].sum() else "In part"
    )
    lines = [
        "## Does entropy tell that a needed entry is missing?",
        "",
        f"{answer}: that recall is at least 0.8 at low entropy and below 0.5 at high is, over all policies and "
        f"budgets: {counts} (step, length and kind of prompt controlled). At 20 % held recall falls from one entropy "
        f"bin to the next, the interval of the trend below 0, for {len(down)} of {len(keys)} policies.",
        *picture("real_entropy", "mean recall by entropy bin and policy"),
        table(
            ["policy", "recall, low entropy", "medium", "high", "Pearson r", "verdict"],
            [[policy, *(_statistic(r[policy, b], part) for part in ("recall_low", "recall_medium", "recall_high",
                                                                    "pearson")),
              (r[policy, b].get("verdict_controlled") or {}).get("outcome") or "n/a"] for policy, b in keys],
        ),
        "",
        f"20 % held, n = {n} texts (questions and continuations of the same paragraphs are of one text), "
        f"{steps} steps; "
        "global sets, ideal memory (docs/observation.md).",
    ]  # fmt: skip
    return lines + ending(
        "entropy",
        "whether acting on entropy helps (entropy_recall was not run), PG-19 and MuSiQue, sets for each head, "
        "the entropy "
        "gap, and with so few texts anything that is called undecided.",
        "records",
    )


def _statistic(found: dict[str, Row], name: str) -> str:
    row = found.get(name)
    if row is None or row["estimate"] is None:
        return "–"
    return interval(row["estimate"], row["ci_low"], row["ci_high"], 2)


# ----------------------------------------------------------------------------------------------------
# Study 3


def merging() -> list[str]:
    """Merging against dropping."""
    found = kept("merging", "perplexity").filter(pl.col("bin").is_null())
    pairs = kept("merging", "perplexity_pairs").filter(pl.col("bin").is_null())
    rows = found.sort("compression", "policy").to_dicts()
    worse, better = pairs.filter(pl.col("ratio_low") > 1).height, pairs.filter(pl.col("ratio_high") < 1).height
    adjusted = pairs.filter((pl.col("ratio_low") > 1) & (pl.col("p_holm") < 0.05)).height
    answer = "No" if better == 0 and worse else "Yes" if better and not worse else "Undecided"
    shown = found.filter(pl.col("policy").is_in(["entropy_merge", "entropy_drop", "merge_bias", "snapkv", "random"]))
    figures.lines(
        [r | {"gone": 100 * r["compression"], "low": r["ratio_low"], "high": r["ratio_high"]}
         for r in shown.sort("policy", "compression").to_dicts()],
        "gone", "ratio", "policy", titles=("% of the cache's bytes gone", "perplexity over the full cache's"), log=True,
        head=("What is lost by merging, dropping and others",
              f"SmolLM2-135M-Instruct, PG-19, n = {rows[0]['n']} windows of {rows[0]['clusters']} books"),
        output=IMAGES / "real_merging.svg", reference=1,
    )  # fmt: skip
    lines = [
        "## Does merging keep more than dropping?",
        "",
        f"{answer}: of {pairs.height} comparisons of merging with dropping the same spans, merging is better in "
        f"{better} "
        f"and worse in {worse} ({adjusted} after Holm); the intervals of the others hold 1. n = {rows[0]['n']} "
        f"windows of {rows[0]['clusters']} "
        "books, exploratory; contexts of 1,024 and 2,048 tokens, 128 scored after each.",
        *picture("real_merging", "perplexity over the full cache's by compression"),
        table(
            ["policy", "gone", "perplexity", "over the full cache's"],
            [[r["policy"], f"{100 * r['compression']:.1f} %", f"{r['perplexity']:.2f}", _ratio(r)] for r in rows],
        ),
        "",
        table(
            ["merging", "gone", "over dropping's perplexity", "p (Holm)"],
            [[r["policy"], f"{100 * r['compression']:.1f} %", _ratio(r), f"{r['p_holm']:.3f}"]
             for r in pairs.sort("policy", "compression").to_dicts()],
        ),
    ]  # fmt: skip
    return lines + ending(
        "merging",
        "other models or texts, contexts beyond 2,048 tokens, h2o, more than the ten books at hand. The weights "
        "were those "
        "of the GGUF file, dequantized to a folder before.",
        "books",
    )


def front() -> str:
    """Return the README's first picture and table: what is lost on a language model at three budgets."""
    found = kept("merging", "perplexity").filter(pl.col("bin").is_null(), pl.col("budget") != "r1")
    cells = {(r["policy"], r["budget"]): r for r in found.to_dicts()}
    budgets = sorted({budget for _, budget in cells}, key=labels.budget_order)
    shown = ["snapkv", "entropy_drop", "entropy_merge", "random"]
    first = cells[shown[0], budgets[0]]
    lines = [
        "![Perplexity over the full cache's by the share of the cache that is gone](docs/images/real_merging.svg)",
        "",
        "*SmolLM2-135M-Instruct, a language model of 135M parameters, on PG-19: perplexity over the full cache's, 95 % "
        f"intervals, n = {first['n']} windows of {first['clusters']} books, exploratory "
        "([findings](docs/findings.md)).*",
        "",
        table(
            ["policy", *(f"{labels.budget(b)} kept" for b in budgets)],
            [[f"`{policy}`", *(_ratio(cells[policy, b]) for b in budgets)] for policy in shown],
        ),
    ]
    return "\n".join(lines)


def _ratio(row: Row) -> str:
    return "1" if row["ratio_low"] is None else interval(row["ratio"], row["ratio_low"], row["ratio_high"])


VARIANTS = {
    "entropy_merge": "keys and values, all layers",
    "merge_keys": "keys only",
    "merge_values": "values only",
    "merge_values_bias": "values only, with log m",
    "merge_low_layers": "both, layers 0 to 9",
    "merge_middle_layers": "both, layers 10 to 19",
    "merge_high_layers": "both, layers 20 to 29",
}


def ablation() -> list[str]:
    """Where merging loses."""
    windows = kept("ablation", "windows")
    there = windows.filter(pl.col("policy").is_in(list(VARIANTS))).select("policy", "budget").unique().to_dicts()
    rows = []
    for cell in sorted(there, key=lambda c: (-float(c["budget"][1:]), list(VARIANTS).index(c["policy"]))):
        own = windows.filter(budget=cell["budget"])
        ratio, low, high = over(own, cell["policy"], "entropy_drop")
        kept_label = f"{labels.budget(cell['budget'])} kept"
        rows.append({"variant": VARIANTS[cell["policy"]], "kept": kept_label, "ratio": ratio, "low": low, "high": high})
    n, books = windows.filter(policy="full").height, windows["book_id"].n_unique()
    figures.dots(
        rows, "variant", "ratio", group="kept", title="perplexity over dropping's, 95 % interval", reference=1,
        head=("Where merging loses", f"what is averaged; n = {n} windows of {books} books"),
        output=IMAGES / "real_ablation.svg",
    )  # fmt: skip
    worse = [f"{r['variant']} ({r['kept']})" for r in rows if r["low"] > 1]
    better = [f"{r['variant']} ({r['kept']})" for r in rows if r["high"] < 1]
    open_ = [f"{r['variant']} ({r['kept']})" for r in rows if r["low"] <= 1 <= r["high"]]
    lines = [
        "## Where does merging lose?",
        "",
        "Averaging is worse than dropping, the interval of the ratio above 1, with: "
        f"{'; '.join(worse) or 'no variant'}. "
        f"It is better with: {'; '.join(better) or 'no variant'}; undecided: {'; '.join(open_) or 'none'}.",
        *picture("real_ablation", "perplexity of variants of merging over dropping's"),
        table(
            ["what is averaged", "kept", "over dropping's perplexity"],
            [[r["variant"], r["kept"], interval(r["ratio"], r["low"], r["high"])] for r in rows],
        ),
        "",
        f"n = {n} windows of {books} books, exploratory, intervals not adjusted; context of 1,024 tokens, 128 scored. "
        "What is not averaged, and every span of the other layers, is the entry that received most attention, so that "
        "the footprint is the same.",
    ]
    not_shown = "longer contexts, other spans and budgets, other models, and variants that are not in the table."
    return lines + ending("ablation", not_shown, "books")


def sinks() -> list[str]:
    """Attention sinks and H2O."""
    windows = kept("sinks", "windows")
    rows = kept("sinks", "perplexity").filter(pl.col("bin").is_null()).to_dicts()
    order = {name: i for i, name in enumerate(("full", "sinks_0", "sinks_1", "sinks_2", "sinks_4", "sinks_8", "h2o"))}
    rows.sort(key=lambda r: order[r["policy"]])
    against = {
        r["policy"]: over(windows, r["policy"], "sinks_4") for r in rows if r["policy"] not in ("full", "sinks_4")
    }
    figures.dots(
        [r | {"low": r["ratio_low"], "high": r["ratio_high"]} for r in rows if r["policy"] != "full"],
        "policy", "ratio", title="perplexity over the full cache's, 95 % interval", log=True, reference=1,
        head=("Sinks", f"20 % held, each step; n = {rows[0]['n']} windows of {rows[0]['clusters']} books"),
        output=IMAGES / "real_sinks.svg",
    )  # fmt: skip
    more = [p for p, (_, low, _) in against.items() if p.startswith("sinks") and low > 1]
    less = [p for p, (_, _, high) in against.items() if p.startswith("sinks") and high < 1]
    lines = [
        "## Do sinks matter?",
        "",
        f"{'Yes' if 'sinks_0' in more else 'Undecided' if 'sinks_0' not in less else 'No'}: beside four sinks, "
        f"perplexity "
        f"is higher, its interval above 1, with {', '.join(more) or 'none'}, and lower with "
        f"{', '.join(less) or 'none'}.",
        *picture("real_sinks", "perplexity over the full cache's by the number of sinks"),
        table(
            ["policy", "perplexity", "over the full cache's", "over four sinks'", "entries held, mean"],
            [[r["policy"], f"{r['perplexity']:.2f}", _ratio(r),
              interval(*against[r["policy"]]) if r["policy"] in against else "–", f"{r['kept_mean']:.0f}"]
             for r in rows],
        ),
        "",
        f"n = {rows[0]['n']} windows of {rows[0]['clusters']} books, exploratory; context of 1,024 tokens, 64 "
        f"scored one by "
        "one, 20 % of the entries held at each step.",
    ]  # fmt: skip
    return lines + ending(
        "sinks", "longer contexts, other budgets, streaming from the first token on, other models.", "books"
    )


def over(windows: pl.DataFrame, policy: str, reference: str) -> tuple[float, float, float]:
    """Return the perplexity of a policy over that of another on the same windows, and its 95 % interval by book."""
    key = ["corpus", "bin", "book_id", "window", "budget"]
    both = windows.filter(policy=policy).join(windows.filter(policy=reference), on=key, suffix="_other")
    book = both["book_id"].rank("dense").to_numpy() - 1
    difference = (both["nll_sum"] - both["nll_sum_other"]).to_numpy()
    found = share(difference, both["n_tokens"].cast(float).to_numpy(), book, Statistics(0.95, 10_000, 0)).exp()
    return found.value, found.low, found.high
