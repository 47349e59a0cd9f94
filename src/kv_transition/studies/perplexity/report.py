"""The report section on perplexity."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from kv_transition import labels
from kv_transition.policies import catalog
from kv_transition.report.numbers import DASH, MISSING, Number, kept_of, sentence
from kv_transition.report.section import Section
from kv_transition.stats.examples import FULL
from kv_transition.studies.perplexity.analysis import EXPLORATORY, MERGE
from kv_transition.studies.perplexity.plots import explorer, spans

if TYPE_CHECKING:
    from kv_transition.report.section import Source

FIGURES = {
    "ppl_vs_compression": ("Perplexity against compression", "Perplexity against the share of the cache's bytes that "
                           "is removed, one line per policy; grey is the full cache."),
    "ppl_vs_len": ("Perplexity against length", "Perplexity against the tokens of context, one panel per budget."),
    "merge_vs_drop": ("Merging compared with dropping", "Perplexity with merging divided by perplexity with dropping "
                      "the same spans; below 1: merging is better."),
}  # fmt: skip
Row = dict[str, Any]


@dataclass(frozen=True)
class Expected:
    """An expectation of the study of entropy-guided merging for Llama-2-7B on PG-19: a row of its table."""

    name: str
    kind: str
    perplexity: str
    compression: float
    memory: str


STUDY = (
    Expected("Full Cache", FULL["policy"], "25–26", 0.0, "3.0–3.5 GB"),
    Expected("EntropyMerged", MERGE, "26–27", 0.70, "0.9–1.2 GB"),
    Expected("H2O", "h2o", "27–29", 0.80, "0.6–0.8 GB"),
    Expected("StreamingLLM", "streaming_llm", "27–30", 0.75, "0.8–1.0 GB"),
)
STUDY_MODEL, STUDY_CORPUS = re.compile(r"llama-2-7b(-hf)?$", re.IGNORECASE), "pg19"


def build(source: Source) -> Row | None:
    """Return the content of the section; None if no text was scored.

    ``source.extra``: ``perplexity`` (tables.PERPLEXITY_STATS) and ``perplexity_pairs`` (tables.PERPLEXITY_PAIRS).
    """
    table = source.extra.get("perplexity")
    if table is None or not table.height:
        return None
    settings = source.experiment
    confidence = (settings.get("statistics") or {}).get("confidence", 0.95)
    policies = (settings.get("kv") or {}).get("policies") or {FULL["policy"]: {}}
    pairs = source.extra.get("perplexity_pairs")
    few = table.filter("exploratory")["clusters"]
    return {
        "how": _how(settings.get("perplexity") or {}),
        "sentences": [sentence(text) for text in _sentences(table)],
        "groups": _groups(table),
        "merging": _merging(pairs, 1 - confidence) if pairs is not None and pairs.height else None,
        "study": [_study(table, corpus, policies, settings) for corpus in table["corpus"].unique().sort()],
        "few": int(few.max()) if len(few) else None,
        "exploratory": EXPLORATORY,
        "chart": explorer(table, policies, confidence),
    }


def _how(section: Mapping[str, Any]) -> str:
    stride = f"the next {section['stride']} tokens" if section.get("stride") else "the tokens that follow"
    if section.get("streaming"):
        return (
            f"The policy acts from the first token of each context on; then {stride} are scored with the kept entries."
        )
    return f"Each context is read with the full cache and compressed; then {stride} are scored with the kept entries."


def _number(row: Mapping[str, Any], name: str, digits: int = 2, scale: float = 1.0, unit: str = "") -> Number:
    """Return an estimate of a row with its interval; a dash if it was not measured."""
    values = [None if row[k] is None else scale * row[k] for k in (name, f"{name}_low", f"{name}_high")]
    if values[0] is None:
        return MISSING
    if name.startswith("compression") and None not in values and round(values[1], digits) == round(values[2], digits):
        values[1:] = [None, None]  # bytes are the same in every window
    point, _, bounds = labels.interval(*values, digits).partition(" ")
    place = "all" if row["bin"] is None else f"bin{row['bin']}"
    source = "/".join((_table(row), row["corpus"], row["policy"], row["budget"], place, name))
    return Number(f"{point}{unit} {bounds}".strip().replace("-", "−"), row["n"], source, row["method"])


def _table(row: Mapping[str, Any]) -> str:
    return "perplexity_pairs" if "reference_policy" in row else "perplexity"


def _whole(table: pl.DataFrame, corpus: str) -> tuple[str, pl.DataFrame]:
    """Return the name and the rows of a corpus over all lengths, or of its only length."""
    names = {bin: name for (of, bin), name in spans(table).items() if of == corpus}
    bin, name = list(names.items())[-1]
    own = table.filter(pl.col("bin").is_null() if bin is None else pl.col("bin") == bin, corpus=corpus)
    return name, own


def _sentences(table: pl.DataFrame) -> Iterable[str]:
    for corpus in table["corpus"].unique().sort():
        name, own = _whole(table, corpus)
        for row in own.filter(**FULL).drop_nulls("perplexity").iter_rows(named=True):
            yield (
                f"on {corpus}, {name}, the full cache's perplexity is {_number(row, 'perplexity')} ({_counted(row)})."
            )
        others = own.filter(pl.col("policy") != FULL["policy"]).drop_nulls("ratio")
        for budget in sorted(set(others["budget"]) - {FULL["budget"]}, key=labels.budget_order):
            ranked = others.filter(budget=budget).sort("ratio").to_dicts()
            best, worst = ranked[0], ranked[-1]
            text = f"with {kept_of(budget)} kept, {best['policy']} loses the least: its perplexity is "
            text += f"{_number(best, 'ratio', 3)} times the full cache's"
            if len(ranked) > 1:
                apart = None not in (best["ratio_high"], worst["ratio_low"]) and best["ratio_high"] < worst["ratio_low"]
                text += f"; {worst['policy']} loses the most, {_number(worst, 'ratio', 3)}"
                text += "" if apart else "; their intervals overlap"
            yield text + "."


def _counted(row: Mapping[str, Any]) -> str:
    books = "book" if row["clusters"] == 1 else "books"
    return f"n = {row['n']} windows from {row['clusters']} {books}" + (", exploratory" if row["exploratory"] else "")


def _groups(table: pl.DataFrame) -> list[Row]:
    """Return a table for each corpus and length, all lengths first."""
    found, several = [], table["corpus"].n_unique() > 1
    places = sorted(spans(table).items(), key=lambda item: (item[0][0], item[0][1] is not None, item[0][1] or 0))
    for (corpus, bin), name in places:
        own = table.filter(pl.col("bin").is_null() if bin is None else pl.col("bin") == bin, corpus=corpus)
        rows = []
        for row in sorted(own.to_dicts(), key=_order):
            full = row["policy"] == FULL["policy"]
            rows.append({
                "policy": row["policy"], "kept": labels.kept(row["policy"], row["budget"]),
                "compression": DASH if full else _number(row, "compression", 1, 100, " %"),
                "end": DASH if full else _number(row, "compression_end", 1, 100, " %"),
                "perplexity": _number(row, "perplexity"),
                "ratio": "1, the reference" if full else _number(row, "ratio", 3),
                "memory": _memory(row["total_bytes"]),
                "rate": _number(row, "tokens_per_s", 0),
                "peak": DASH if row["peak_mem_mb"] is None else f"{row['peak_mem_mb']:.0f} MB",
                "n": f"{row['n']} ({row['clusters']})", "missing": row["missing"],
            })  # fmt: skip
        found.append({
            "heading": f"{corpus}, {name}" if several else sentence(name), "rows": rows,
            "missing": sum(row["missing"] for row in rows),
        })  # fmt: skip
    return found


def _order(row: Mapping[str, Any]) -> tuple:
    return (row["policy"] != FULL["policy"], labels.budget_order(row["budget"]), row["policy"])


def _memory(size: float | None) -> str:
    if size is None:
        return DASH
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def _merging(pairs: pl.DataFrame, alpha: float) -> Row:
    """Return a sentence on merging compared with dropping, and a row for each pair, budget and length."""
    several = pairs["corpus"].n_unique() > 1
    names, rows = spans(pairs), []
    for row in pairs.sort("corpus", "policy", "bin", nulls_last=False).to_dicts():
        if (row["corpus"], row["bin"]) not in names:
            continue
        outcome = "not shown"
        if row["p_holm"] is not None and row["p_holm"] < alpha:
            outcome = "merging is better" if row["ratio"] < 1 else "dropping is better"
        rows.append({
            "pair": f"{row['policy']} : {row['reference_policy']}",
            "corpus": row["corpus"] if several else "", "span": names[row["corpus"], row["bin"]],
            "kept": labels.budget(row["budget"]), "compression": _percent(row["compression"]),
            "other": _percent(row["reference_compression"]), "ratio": _number(row, "ratio", 4),
            "p": labels.tested(row), "n": f"{row['n']} ({row['clusters']})", "outcome": outcome,
            "order": (row["corpus"], labels.budget_order(row["budget"]), row["policy"]),
        })  # fmt: skip
    rows.sort(key=lambda r: r["order"])
    counts = {name: sum(row["outcome"] == name for row in rows) for name in
              ("merging is better", "dropping is better", "not shown")}  # fmt: skip
    said = (
        f"Of {len(rows)} comparisons at the same spans, merging has the lower perplexity in "
        f"{counts['merging is better']}, dropping in {counts['dropping is better']}, and no difference is shown in "
        f"{counts['not shown']} (p below {alpha:.2g} after Holm)."
    )
    return {"said": said, "rows": rows}


def _percent(share: float | None) -> str:
    return DASH if share is None else f"{100 * share:.1f} %"


def _study(table: pl.DataFrame, corpus: str, policies: Mapping[str, Any], settings: Mapping[str, Any]) -> Row:
    """Return the study's expectations, each with the measured cell of its kind whose compression is nearest."""
    name, own = _whole(table, corpus)
    kinds = {policy: catalog.resolve(policy, options or {})[0] for policy, options in policies.items()}
    rows = []
    for expected in STUDY:
        near = [row for row in own.to_dicts() if kinds.get(row["policy"], row["policy"]) == expected.kind
                and row["perplexity"] is not None and row["compression"] is not None]  # fmt: skip
        near.sort(key=lambda row: abs(row["compression"] - expected.compression))
        found = near[0] if near else None
        rows.append({
            "name": expected.name, "perplexity": expected.perplexity, "memory": expected.memory,
            "compression": f"{100 * expected.compression:.0f} %",
            "own": "not run" if found is None else
            found["policy"] + (f", {labels.budget(found['budget'])}" if found["policy"] != FULL["policy"] else ""),
            "own_perplexity": MISSING if found is None else _number(found, "perplexity"),
            "own_compression": DASH if found is None else _percent(found["compression"]),
            "own_memory": DASH if found is None else _memory(found["total_bytes"]),
        })  # fmt: skip
    model = str((settings.get("model") or {}).get("name", ""))
    return {"corpus": corpus, "span": name, "rows": rows,
            "comparable": corpus == STUDY_CORPUS and bool(STUDY_MODEL.search(model))}  # fmt: skip


SECTIONS = (Section("perplexity", "Perplexity", build),)
