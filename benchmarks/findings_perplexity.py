"""The sections of docs/findings.md on text scored from a compressed cache: merging, where it loses, sinks."""

from __future__ import annotations

import findings_figures as figures
import polars as pl
from document import table
from findings_sections import IMAGES, Row, ending, interval, kept, listed, picture, there

from kv_transition import labels
from kv_transition.stats.quotients import quotient

MERGING = {"merging": "contexts of 1,024 and 2,048 tokens", "merging_long": "contexts of 4,096 and 7,000 tokens"}
"""the kept runs, and what they read"""

SHOWN = ["entropy_merge", "entropy_drop", "merge_bias", "snapkv", "h2o", "streaming_llm"]
"""policies in the figures; left out are thresholds, whose compression follows from the text, and random, which loses
so much more that the others could not be told apart"""

EXPECTED = {
    ("entropy_merge", 0.7): ("EntropyMerged", "26 to 27 at 70 %", 1.04),
    ("h2o", 0.8): ("H2O", "27 to 29 at 80 %", 1.10),
    ("streaming_llm", 0.75): ("StreamingLLM", "27 to 30 at 75 %", 1.12),
}
"""what the study expects of Llama-2-7B on PG-19, full cache 25 to 26, and the ratio of the middles of these ranges"""


def merging() -> list[str]:
    """Merging against dropping."""
    runs = there(*MERGING)
    pairs = pl.concat([kept(name, "perplexity_pairs").filter(pl.col("bin").is_null()) for name in runs])
    worse, better = pairs.filter(pl.col("ratio_low") > 1).height, pairs.filter(pl.col("ratio_high") < 1).height
    adjusted = pairs.filter((pl.col("ratio_low") > 1) & (pl.col("p_holm") < 0.05)).height
    answer = "No" if better == 0 and worse else "Yes" if better and not worse else "Undecided"
    lines = [
        "## Does merging keep more than dropping?",
        "",
        f"{answer}: of {pairs.height} comparisons of merging with dropping the same spans, merging is better in "
        f"{better} and worse in {worse} ({adjusted} after Holm); the other intervals include 1.",
        *[line for name in runs for line in _compared(name)],
        "",
        "By context, at 20 % kept, perplexity over the full cache's:",
        "",
        _by_context(runs),
        "",
        "The study expects other figures, of Llama-2-7B (full cache 25 to 26); with ours at a similar compression:",
        "",
        _expected(runs),
    ]
    return lines + ending("other models; texts other than books.", *runs)


def _compared(name: str) -> list[str]:
    """Return the figure and the tables of one run: what each policy loses, and merging over dropping."""
    found = kept(name, "perplexity").filter(pl.col("bin").is_null())
    pairs = kept(name, "perplexity_pairs").filter(pl.col("bin").is_null())
    rows = found.sort("compression", "policy").to_dicts()
    shown = found.filter(pl.col("policy").is_in(SHOWN)).sort("policy", "compression").to_dicts()
    n = counted(name)
    figures.lines(
        [r | {"gone": 100 * r["compression"], "low": r["ratio_low"], "high": r["ratio_high"]} for r in shown],
        "gone", "ratio", "policy", titles=("% of the cache's bytes gone", "perplexity over the full cache's"), log=True,
        head=("What is lost by merging, dropping and others", f"SmolLM2-135M-Instruct, {MERGING[name]}, {n}"),
        output=IMAGES / f"real_{name}.svg", reference=1,
    )  # fmt: skip
    return [
        *picture(f"real_{name}", f"perplexity over the full cache's by compression, {MERGING[name]}"),
        table(
            ["policy", "gone", "perplexity", "over the full cache's"],
            [[r["policy"], f"{100 * r['compression']:.1f} %", f"{r['perplexity']:.2f}", _ratio(r)] for r in rows],
        ),
        "",
        f"{n}; {MERGING[name]}, 128 tokens scored after each. `h2o` and `streaming_llm` hold the budget at each step; "
        "the others are compressed once, and the scored tokens added. `entropy_merge` replaces each span by a mean, "
        "`merge_bias` also adds log m, `entropy_drop` keeps one entry of the same spans; `threshold`: all spans whose "
        "normalized entropy is at least that ([policies](policies.md)). Merging over dropping:",
        "",
        table(
            ["merging", "gone", "over dropping's perplexity", "p (Holm)"],
            [[r["policy"], f"{100 * r['compression']:.1f} %", _ratio(r), labels.p_value(r["p_holm"])]
             for r in pairs.sort("policy", "compression").to_dicts()],
        ),
    ]  # fmt: skip


def counted(name: str) -> str:
    """Return the number of windows of each policy and of their books, by where the books come from, and whether they
    are too few for more than an exploration.
    """
    windows = kept(name, "windows").filter(policy="full")
    books = windows["book_id"].unique()
    others = books.str.starts_with("narrativeqa").sum()
    sources = f" ({len(books) - others} of PG-19, {others} of LongBench's narrativeqa)" if others else " of PG-19"
    few = ", exploratory" if kept(name, "perplexity")["exploratory"].any() else ""
    return f"n = {windows.height} windows of {len(books)} books{sources}{few}"


def _by_context(runs: list[str]) -> str:
    found = pl.concat([kept(name, "perplexity").filter(pl.col("bin").is_not_null(), budget="r0.2") for name in runs])
    cells = {(r["policy"], r["context_min"]): r for r in found.to_dicts()}
    contexts = sorted({context for _, context in cells})
    policies = [name for name in [*SHOWN, "random"] if any(policy == name for policy, _ in cells)]
    return table(
        ["policy", *(f"{context:,} tokens, n = {cells[_any(cells, context)]['n']}" for context in contexts)],
        [[p, *(_ratio(cells[p, c]) if (p, c) in cells else "–" for c in contexts)] for p in policies],
    )


def _any(cells: dict[tuple[str, int], Row], context: int) -> tuple[str, int]:
    return next(key for key in cells if key[1] == context)


def _expected(runs: list[str]) -> str:
    rows = []
    for (policy, gone), (name, said, ratio) in EXPECTED.items():
        own = [
            f"{_ratio(r)} at {100 * r['compression']:.0f} % ({MERGING[run_]})"
            for run_ in runs
            for r in kept(run_, "perplexity").filter(pl.col("bin").is_null(), policy=policy).to_dicts()
            if abs(r["compression"] - gone) < 0.06
        ]
        rows.append([f"{name} (`{policy}`)", said, f"about {ratio:.2f}", "; ".join(own) or "–"])
    return table(["strategy", "the study's perplexity", "over its full cache's", "ours, over the full cache's"], rows)


def front() -> str:
    """Return the README's first picture and table: what is lost on a language model at three budgets."""
    found = kept("merging", "perplexity").filter(pl.col("bin").is_null(), pl.col("budget") != "r1")
    cells = {(r["policy"], r["budget"]): r for r in found.to_dicts()}
    budgets = sorted({budget for _, budget in cells}, key=labels.budget_order)
    shown = ("snapkv", "entropy_drop", "entropy_merge", "h2o", "streaming_llm", "random")
    policies = table(
        ["policy", *(f"{labels.budget(b)} kept" for b in budgets)],
        [[f"`{policy}`", *(_ratio(cells[policy, b]) for b in budgets)] for policy in shown],
    )
    return f"{first_picture('docs/')}\n\n{policies}"


def first_picture(docs: str) -> str:
    """Return the picture of what is lost on a language model, and its caption. docs: the path to the folder docs."""
    return (
        f"![Perplexity over the full cache's by the share of the cache that is gone]({docs}images/real_merging.svg)\n\n"
        "*SmolLM2-135M-Instruct, a language model of 135M parameters, on books: perplexity over the full cache's, 95 % "
        f"intervals, {counted('merging')} ([findings]({docs}findings.md)).*"
    )


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
    pairs = kept("ablation", "perplexity_pairs").filter(pl.col("bin").is_null(), pl.col("policy").is_in(list(VARIANTS)))
    rows = [
        {"variant": VARIANTS[pair["policy"]], "kept": f"{labels.budget(pair['budget'])} kept", "ratio": pair["ratio"],
         "low": pair["ratio_low"], "high": pair["ratio_high"], "p": pair["p_holm"]}
        for pair in sorted(pairs.to_dicts(), key=lambda r: (-float(r["budget"][1:]), list(VARIANTS).index(r["policy"])))
    ]  # fmt: skip
    adjusted = sum(row["low"] > 1 and row["p"] < 0.05 for row in rows)
    figures.dots(
        rows, "variant", "ratio", group="kept", title="perplexity over dropping's, 95 % interval", reference=1,
        head=("Where merging loses", f"what is averaged; {counted('ablation')}"),
        output=IMAGES / "real_ablation.svg",
    )  # fmt: skip
    several = len({r["kept"] for r in rows}) > 1
    named = [(f"{r['variant']} ({r['kept']})" if several else r["variant"], r["low"], r["high"]) for r in rows]
    worse = [name for name, low, _ in named if low > 1]
    better = [name for name, _, high in named if high < 1]
    open_ = [name for name, low, high in named if low <= 1 <= high]
    lines = [
        "## Where does merging lose?",
        "",
        f"In {len(worse)} of {len(rows)} variants averaging is worse than dropping (the interval of the ratio is above "
        f"1; {adjusted} after Holm), in {len(better)} it is better.",
        "",
        f"- Worse: {'; '.join(worse) or 'none'}.",
        f"- Better: {'; '.join(better) or 'none'}.",
        f"- Undecided: {'; '.join(open_) or 'none'}.",
        *picture("real_ablation", "perplexity of variants of merging over dropping's"),
        table(
            ["what is averaged", "kept", "over dropping's perplexity", "p (Holm)"],
            [
                [r["variant"], r["kept"], interval(r["ratio"], r["low"], r["high"]), labels.p_value(r["p"])]
                for r in rows
            ],
        ),
        "",
        f"{counted('ablation')}; intervals not adjusted; context of 1,024 tokens, 128 "
        "scored. Where a variant does not average (keys, values, or the other layers), the span's entry with "
        "the most attention is kept, so that all variants have the same footprint.",
    ]
    not_shown = "longer contexts, other spans and budgets, other models, and variants that are not in the table."
    return lines + ending(not_shown, "ablation")


def sinks() -> list[str]:
    """Attention sinks and H2O, at each context."""
    runs = there("sinks", "sinks_long")
    windows, perplexity = (pl.concat([_by_run(name, what) for name in runs]) for what in ("windows", "perplexity"))
    order = {name: i for i, name in enumerate(("full", "sinks_0", "sinks_1", "sinks_2", "sinks_4", "sinks_8", "h2o"))}
    rows = perplexity.filter(pl.col("bin").is_not_null()).to_dicts()
    rows.sort(key=lambda r: (r["bin"], order[r["policy"]]))
    against = {
        (r["bin"], r["policy"]): over(windows.filter(bin=r["bin"]), r["policy"], "sinks_4")
        for r in rows
        if r["policy"] not in ("full", "sinks_4")
    }
    contexts = {r["bin"]: f"{r['context_min']:,}" for r in rows}
    counts = _by_bin(rows)
    figures.dots(
        [r | {"what": f"{r['policy']}, {contexts[r['bin']]} tokens", "low": r["ratio_low"], "high": r["ratio_high"]}
         for r in rows if r["policy"] != "full"],
        "what", "ratio", title="perplexity over the full cache's, 95 % interval", log=True, reference=1,
        head=("Sinks", f"SmolLM2-135M-Instruct, 20 % held at each step; {_books(rows)} a context"),
        output=IMAGES / "real_sinks.svg",
    )  # fmt: skip
    answers, said, unclear = set(), {}, []
    for bin_, context in contexts.items():
        others = {p: found for (b, p), found in against.items() if b == bin_ and p.startswith("sinks")}
        more = [policy for policy, (_, low, _) in others.items() if low > 1]
        less = [policy for policy, (_, _, high) in others.items() if high < 1]
        answers.add("Yes" if "sinks_0" in more else "No" if "sinks_0" in less else "Undecided")
        same = [policy for policy in others if policy not in more + less]
        unclear += [end for policy in same for end in others[policy][1:]]
        parts = [f"{what} {_numbers(policies)}" for what, policies in
                 (("higher with", more), ("lower with", less), ("undecided with", same)) if policies]  # fmt: skip
        said.setdefault(", ".join(parts), []).append(context)
    scored: dict[int, list[str]] = {}
    for context, n in sorted(set(windows.select("context_tokens", "n_tokens").rows())):
        scored.setdefault(n, []).append(f"{context:,}")
    after = "; ".join(f"after {listed(at)} tokens it is {parts}" for parts, at in said.items())
    lines = [
        "## Do sinks matter?",
        "",
        f"{answers.pop() if len(answers) == 1 else 'It depends on the context'}. Perplexity compared with four sinks: "
        f"{after} sinks (higher or lower: the interval of the ratio excludes 1)."
        + (f" The undecided intervals lie within {min(unclear):.3f} and {max(unclear):.3f}." if unclear else ""),
        *picture("real_sinks", "perplexity over the full cache's by the number of sinks"),
        table(
            ["context", "policy", "perplexity", "over the full cache's", "over four sinks'", "entries held, mean"],
            [[contexts[r["bin"]], r["policy"], f"{r['perplexity']:.2f}", _ratio(r),
              interval(*found) if (found := against.get((r["bin"], r["policy"]))) else "–", f"{r['kept_mean']:.0f}"]
             for r in rows],
        ),
        "",
        f"{counts}; intervals not adjusted; tokens scored one by one: "
        + "; ".join(f"{n} after {listed(contexts)}" for n, contexts in scored.items())
        + "; 20 % of the context's entries held at each step. The section on merging scores 128 tokens after every "
        "context, so h2o and four sinks have other ratios there."
        + (" The longer contexts were loaded from prefills that real_merging_long.yaml had stored, so their processor "
           "time has no prefill." if "sinks_long" in runs else ""),
    ]  # fmt: skip
    not_shown = "other budgets, streaming from the first token on, other models."
    return lines + ending(not_shown, *runs)


def _by_run(name: str, what: str) -> pl.DataFrame:
    """Return a table of a kept run with bins that no other run has."""
    return kept(name, what).with_columns(bin=name + pl.col("bin").cast(str))


def _numbers(policies: list[str]) -> str:
    """Return the numbers of sinks of policies such as ``sinks_2``."""
    return listed([policy.removeprefix("sinks_") for policy in policies])


def _by_bin(rows: list[Row]) -> str:
    """Return the numbers of windows and books of each context, once for contexts that have the same."""
    found: dict[str, list[str]] = {}
    for bin_, context in {r["bin"]: f"{r['context_min']:,}" for r in rows}.items():
        row = next(r for r in rows if r["bin"] == bin_)
        count = f"{row['n']} windows of {row['clusters']} books" + (
            " (fewer than 20: exploratory)" if row["exploratory"] else ""
        )
        found.setdefault(count, []).append(context)
    if len(found) == 1:
        return f"n = {next(iter(found))} a context"
    return "n: " + "; ".join(f"after {listed(at)} tokens each {count}" for count, at in found.items())


def _books(rows: list[Row]) -> str:
    """Return the number of books, or from how many to how many."""
    least, most = min(r["clusters"] for r in rows), max(r["clusters"] for r in rows)
    return f"n = {most} books" if least == most else f"n = {least} to {most} books"


def over(windows: pl.DataFrame, policy: str, reference: str) -> tuple[float, float, float]:
    """Return the perplexity of a policy over that of another on the same windows, and its 95 % interval by book."""
    key = ["corpus", "bin", "book_id", "window", "budget"]
    both = windows.filter(policy=policy).join(windows.filter(policy=reference), on=key, suffix="_other")
    book = both["book_id"].rank("dense").to_numpy() - 1
    difference = (both["nll_sum"] - both["nll_sum_other"]).to_numpy()
    found = quotient(difference, both["n_tokens"].cast(float).to_numpy(), book, 0.95).exp()
    return found.value, found.low, found.high


MOMENTS = {
    "recall_entropy": "where entropy is high",
    "recall_random": "random",
    "recall_periodic": "evenly spread",
    "recall_always": "always",
    "recall_never": "never (h2o)",
}


def recall() -> list[str]:
    """Whether recalling evicted entries helps more at uncertain moments than at others."""
    windows = kept("recall", "windows")
    found = kept("recall", "perplexity").filter(pl.col("bin").is_null())
    rows = [found.filter(policy=name).to_dicts()[0] for name in MOMENTS]
    share = {name: _moments(windows.filter(policy=name)) for name in MOMENTS}
    against = {
        name: over(windows, "recall_entropy", name) for name in ("recall_random", "recall_periodic", "recall_never")
    }
    figures.dots(
        [{"moments": MOMENTS[r["policy"]], "ratio": r["ratio"], "low": r["ratio_low"], "high": r["ratio_high"]}
         for r in rows],
        "moments", "ratio", title="perplexity over the full cache's, 95 % interval", reference=1,
        head=("Recalling evicted entries at chosen moments",
              f"h2o at 20 %; {counted('recall')}"),
        output=IMAGES / "real_recall.svg",
    )  # fmt: skip
    chance = [against[name] for name in ("recall_random", "recall_periodic")]
    better, worse = all(high < 1 for _, _, high in chance), any(low > 1 for _, low, _ in chance)
    answer = "Yes" if better else "No" if worse else "Undecided"
    always = over(windows, "recall_always", "recall_never")
    part = {name: f"{100 * value:.0f} %" for name, value in share.items()}
    lines = [
        "## Does it help to look again at what was evicted when entropy is high?",
        "",
        f"{answer}: perplexity with recalls at high entropy ({part['recall_entropy']} of the steps) is "
        f"{interval(*against['recall_random'])} of that with random recalls ({part['recall_random']}) and "
        f"{interval(*against['recall_periodic'])} of that with evenly spread ones ({part['recall_periodic']}). "
        f"Compared with no recall, it is {interval(*against['recall_never'])} with recalls at high entropy and "
        f"{interval(*always)} with a recall at every step.",
        *picture("real_recall", "perplexity over the full cache's by the moments of recall"),
        table(
            ["recalls", "share of the steps", "perplexity", "over the full cache's"],
            [
                ["none needed (full cache)", "–", f"{found.filter(policy='full')['perplexity'].item():.2f}", "1"],
                *([MOMENTS[r["policy"]], part[r["policy"]], f"{r['perplexity']:.2f}", _ratio(r)] for r in rows),
            ],
        ),
        "",
        f"{counted('recall')}; intervals not adjusted; context of "
        "1,024 tokens, 64 scored one by one, 20 % of the entries held by h2o.",
    ]  # fmt: skip
    not_shown = "other thresholds of entropy, budgets, inner policies and models; answers to questions."
    return lines + ending(not_shown, "recall")


def _moments(windows: pl.DataFrame) -> float:
    """Return the share of the steps at which evicted entries were recalled."""
    return windows["triggers"].sum() / windows["steps"].sum()
