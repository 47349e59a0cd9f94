"""The sections of docs/findings.md on conversations: which rules the model follows, and what eviction does to that."""

from __future__ import annotations

import findings_figures as figures
import polars as pl
from document import table
from findings_sections import IMAGES, Row, ending, interval, kept, listed, mean, picture, there
from real_data import QUESTIONS

from kv_transition import labels
from kv_transition.stats import intervals

ENOUGH = 0.8
"""share of the answers that follow a rule; a rule with less says nothing about eviction"""


def _cell(row: Row) -> str:
    return interval(row["estimate"], row["ci_low"], row["ci_high"], 2)


def rules() -> list[str]:
    """Which rules the model follows with its full cache."""
    verdicts = kept("rules", "verdicts").filter(pl.col("standing"))
    rows = []
    for name in verdicts["check_id"].unique(maintain_order=True):
        own = verdicts.filter(check_id=name)
        conversation = own["conversation_id"].rank("dense").to_numpy() - 1
        found = intervals.bounded_mean(own["rule"].cast(float).to_numpy()[None], 0.95, clusters=conversation[None])
        rows.append(found.row(0) | {"rule": name, "asks": own["asks"][0], "without": own["chance"].mean()})
    rows.sort(key=lambda r: -r["estimate"])
    good = [r["rule"] for r in rows if r["estimate"] >= ENOUGH]
    conversations, turns = rows[0]["clusters"], verdicts["turn"].max()
    lines = [
        "## Which instructions does the model follow at all?",
        "",
        f"With its full cache its answers follow {', '.join(good) or 'no rule'} in {ENOUGH:.0%} of the cases or more "
        f"(the mean, which is the study's condition), of {len(rows)} rules that were tried. What eviction does to a "
        "rule can be seen only where the full cache follows it.",
        "",
        table(
            ["rule", "what it asks", "answers that follow it", "without the rule"],
            [[r["rule"], r["asks"], _cell(r), f"{r['without']:.2f}"] for r in rows],
        ),
        "",
        f"n = {conversations} conversations a rule, {turns} turns each; the rule is given in the first turn. `without "
        "the rule`: share of the answers of the other conversations that happen to follow it.",
    ]
    return lines + ending("other wordings of the rules, system messages, longer conversations.", "rules")


def memory() -> list[str]:
    """Whether answers follow the first turn's rule when the cache is evicted between turns."""
    retention = kept("memory", "retention")
    found = retention.filter(by="rule")
    last = found.filter(statistic="last_turn").sort("budget", "estimate", descending=True).to_dicts()
    apart = {(r["policy"], r["budget"]): r for r in found.filter(statistic="last_turn_difference").to_dicts()}
    sizes = retention.filter(pl.col("turn") == pl.col("turn").max(), statistic="entries_before")
    entries = {(r["policy"], r["budget"]): r["estimate"] for r in sizes.to_dicts()}
    turns = found.filter(pl.col("turn").is_not_null(), statistic="retention").sort("policy", "budget", "turn")
    n = last[0]["n"]
    figures.lines(
        [r | {"low": r["ci_low"], "high": r["ci_high"], "cell": _name(r)} for r in turns.to_dicts()],
        "turn", "estimate", "cell", titles=("turn", "share of answers that follow the rule"),
        head=("Does an answer still follow the first turn's rule?", f"SmolLM2-135M-Instruct, n = {n} conversations"),
        output=IMAGES / "real_memory.svg",
    )  # fmt: skip
    below = [_name(r) for r in apart.values() if r["ci_high"] < 0]
    unclear = [_name(r) for r in apart.values() if r["ci_low"] <= 0 <= r["ci_high"]]
    answer = "Less often" if apart and len(below) == len(apart) else "Undecided" if not below else "Not always"
    lines = [
        "## Does the model follow its instruction when its memory fails?",
        "",
        f"{answer}: at the last turn fewer answers follow the rule than with the full cache, the interval of the "
        f"difference below 0, under {', '.join(below) or 'no policy'}; undecided: {', '.join(unclear) or 'none'}.",
        *picture("real_memory", "share of the answers that follow the first turn's rule, by turn"),
        table(
            ["policy", "kept", "entries before the last compression", "answers of the last turn that follow the rule",
             "minus the full cache's", "p (Holm)"],
            [[r["policy"], _kept(r["budget"]), f"{entries[r['policy'], r['budget']]:.0f}", _cell(r),
              *_difference(apart.get((r["policy"], r["budget"])))] for r in last],
        ),
        "",
        f"n = {n} conversations of {turns['turn'].max()} turns, with rules that the model follows with its full cache; "
        "each turn ends with a compression of the cache; `streaming_llm` also evicts at each decode step. `text_drop` "
        "shortens the text instead and reads it again ([conversations](conversations.md) has the order in which it "
        f"removes words). Last answers that follow the rule under {_name(apart['streaming_llm', 'r0.5'])}, by rule: "
        f"{listed(_by_rule('streaming_llm', 'r0.5'))}.",
    ]  # fmt: skip
    return lines + ending(
        "whether the model remembers the rule or continues the language of its last answer; longer conversations, "
        "other kinds of rules (these ask for a language) and models, how good the answers are. The conversations count "
        f"as independent, although all draw their questions from the same {len(QUESTIONS)}; the rules were chosen with "
        "other selections of these (section above).",
        "memory",
    )


def _kept(budget: str) -> str:
    return "100 %" if budget == labels.OWN else labels.budget(budget)


def _by_rule(policy: str, budget: str) -> list[str]:
    """Return for each rule how many of the last answers follow it."""
    verdicts = kept("memory", "verdicts").filter(pl.col("turn") == pl.col("turn").max(), policy=policy, budget=budget)
    counts = verdicts.group_by("check_id").agg(pl.col("rule").sum(), pl.len()).sort("check_id")
    return [f"{rule} {follow} of {n}" for rule, follow, n in counts.iter_rows()]


CHATS = {"chat": "MT-bench", "chat_refinement": "MT-Eval, refinement"}
"""the kept runs of conversations without rules, and whose they are"""


def chat() -> list[str]:
    """What eviction between turns does to the answers of conversations without rules."""
    runs = there(*CHATS)
    rows = [row for name in runs for row in _changes(name)]
    likely = [r for r in rows if r["measure"] == "answer_nll"]
    less = [r for r in likely if r["low"] > 0]
    answer = "No" if likely and len(less) == len(likely) else "Not always" if less else "Undecided"
    figures.dots(
        [r | {"what": f"{r['set']}: {r['name']}"} for r in likely], "what", "value", reference=0,
        title="nats per token more than the full cache's answers, 95 % interval",
        head=("How unlikely answers become under the full cache", "last turn, SmolLM2-135M-Instruct"),
        output=IMAGES / "real_chat.svg",
    )  # fmt: skip
    longest = max(kept(name, "turns")["turn"].max() for name in runs)
    tokens = ", ".join(f"{kept(name, 'turns')['completion_tokens'].max()} ({CHATS[name]})" for name in runs)
    lines = [
        "## Are answers of ordinary conversations the same when entries are evicted between turns?",
        "",
        f"{answer}: at the last turn the answers are less likely under the full cache than its own answers, the "
        f"interval of the difference above 0, in {len(less)} of {len(likely)} cases (set, policy, budget).",
        *picture("real_chat", "nats per token of the answers under the full cache, minus those of its own answers"),
        table(
            ["conversations", "n", "policy", "kept", "nats per token, minus the full cache's",
             "repetition, minus the full cache's"],
            [[r["set"], str(r["n"]), r["policy"], labels.budget(r["budget"]), _change(r),
              _change(next(o for o in rows if o["measure"] == "repetition" and o["name"] == r["name"]
                           and o["set"] == r["set"]))] for r in likely],
        ),
        "",
        f"Last turn of each conversation ({longest} at most), longest answer in tokens {tokens}; exploratory, "
        "intervals over conversations, not adjusted. Nats per token: the negative log-likelihood of an answer under "
        "the full cache after the same conversation; its own answers are chosen to be likely, so that a difference "
        "above 0 means other answers, not worse ones. Repetition: share of an answer's 4-grams that it has already "
        "said.",
    ]  # fmt: skip
    return lines + ending("how good the answers are (no judge was asked); longer answers, other models.", *runs)


def _changes(name: str) -> list[Row]:
    """Return for each policy, budget and measure the mean difference from the full cache at the last turn."""
    turns = kept(name, "turns")
    last = turns.filter(pl.col("turn") == pl.col("turn").max().over("conversation_id", "policy", "budget"))
    rows = []
    for policy, budget in sorted(last.filter(pl.col("policy") != "full").select("policy", "budget").unique().rows()):
        own = last.filter(policy=policy, budget=budget)
        both = own.join(last.filter(policy="full"), on=["conversation_id", "turn"], suffix="_full")
        for measure in ("answer_nll", "repetition"):
            pairs = both.drop_nulls([measure, f"{measure}_full"])
            found = mean(pairs[measure] - pairs[f"{measure}_full"], pairs["conversation_id"])
            rows.append({"set": CHATS[name], "policy": policy, "budget": budget, "measure": measure, "n": pairs.height,
                         "value": found.value, "low": found.low, "high": found.high,
                         "name": _name({"policy": policy, "budget": budget})})  # fmt: skip
    return rows


def _change(row: Row) -> str:
    return interval(row["value"], row["low"], row["high"], 2)


def _name(row: Row) -> str:
    return row["policy"] if row["policy"] == "full" else f"{row['policy']} at {labels.budget(row['budget'])}"


def _difference(row: Row | None) -> tuple[str, str]:
    return ("–", "–") if row is None else (_cell(row), labels.p_value(row["p_holm"]))
