"""The report section on conversations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import polars as pl

from kv_transition import labels
from kv_transition.labels import p_value
from kv_transition.report.numbers import DASH, MISSING, Number, kept_of, number, sentence
from kv_transition.report.section import Section
from kv_transition.stats.examples import FULL
from kv_transition.studies.chat import plots as retention_plots
from kv_transition.studies.chat.analysis import WINNERS
from kv_transition.studies.chat.plots import BY

if TYPE_CHECKING:
    from kv_transition.report.section import Source

FIGURES = {
    "retention": ("Retention", "Share of the instructions in force that answers follow, turn by turn, one line per "
                  "policy; grey is the full cache."),
    "survival": ("Until the first failure", "Share of conversations with every instruction followed up to the turn."),
    "cache_size": ("Size of the cache", "Entries per KV head that are kept after each turn's compression."),
    "conflicts": ("Conflicting instructions", "Which of two conflicting instructions answers follow, by the turns "
                  "since the second one was given."),
}  # fmt: skip
TEXT_DROP = "text_drop"
EXPLORATORY = 20  # results from fewer conversations are labelled exploratory
# the study's order: the full cache, sinks and recent entries, chance, then all others
FIRST = (FULL["policy"], "streaming_llm", "random")
COLUMNS = {
    "retention_rule": "Retention, by rule",
    "retention_judge": "Retention, by judge",
    "repetition": "Repetition",
    "answer_perplexity": "Perplexity of answers",
    "entries": "Cache entries",
    "cache_bytes": "Bytes",
    "total_bytes": "Bytes, all layers",
    "failed": "No answer",
}
SIZES = ("cache_bytes", "total_bytes")
Row = dict[str, Any]
Cell = tuple[str, str, str]


def build(source: Source) -> Row | None:
    """Return the content of the section; None if no conversation was played.

    ``source.extra``: ``retention`` (tables.RETENTION), ``memory_table`` (tables.MEMORY_TABLE) and ``cache_anatomy``
    (tables.CACHE_ANATOMY).
    """
    table, stats = source.extra.get("memory_table"), source.extra.get("retention")
    if table is None or stats is None or not table.height:
        return None
    settings = source.experiment
    confidence = (settings.get("statistics") or {}).get("confidence", 0.95)
    kinds = _kinds((settings.get("kv") or {}).get("policies") or {})
    cells = _ordered(table, kinds)
    anatomy = source.extra.get("cache_anatomy")
    conversations = int(table["clusters"].max() or 0)
    return {
        "sentences": [sentence(text) for text in _sentences(stats, cells, 1 - confidence)],
        "table": _table(table, cells),
        "last": _last_turn(stats, cells),
        "conflicts": _conflicts(stats, cells),
        "agreement": _agreement(stats, cells),
        "anatomy": _anatomy(anatomy, cells) if anatomy is not None and anatomy.height else [],
        "text_drop": any(policy == TEXT_DROP for _, policy, _ in cells),
        "chance": stats.filter(statistic="chance").height > 0,
        "few": conversations if conversations < EXPLORATORY else None,
        "exploratory": EXPLORATORY,
        "chart": retention_plots.explorer(stats, confidence),
    }


def _kinds(policies: Mapping[str, Any]) -> dict[str, str]:
    return {name: (options or {}).get("kind", name) for name, options in policies.items()}


def _ordered(table: pl.DataFrame, kinds: Mapping[str, str]) -> list[Cell]:
    """Return (set, policy, budget) in the order of table 1."""

    def place(cell: Cell) -> tuple[Any, ...]:
        chat_set, policy, budget = cell
        kind = kinds.get(policy, policy)
        first = FIRST.index(kind) if kind in FIRST else len(FIRST)
        return chat_set, policy == TEXT_DROP, first, policy, labels.budget_order(budget)

    return sorted(table.select("chat_set", "policy", "budget").unique().rows(), key=place)


def _name(cell: Cell) -> Row:
    chat_set, policy, budget = cell
    label = f"{policy} (control: deletes text, no KV compression)" if policy == TEXT_DROP else policy
    return {"set": chat_set, "policy": label, "budget": labels.kept(policy, budget)}


def _source(row: Mapping[str, Any]) -> str:
    """Return the table and the key of the row that a number comes from."""
    table = "retention" if "by" in row else "cache_anatomy" if "when" in row else "memory_table"
    turn = row.get("turn")
    key = [row["chat_set"], row["policy"] or "all", row["budget"] or "all", row.get("when"), row.get("kind"),
           row["statistic"], row.get("by"), None if turn is None else f"turn{turn}"]  # fmt: skip
    return "/".join([table, *(part for part in key if part)])


def _number(row: Row | None, digits: int = 2, scale: float = 1.0, signed: bool = False) -> Number:
    if row is None:
        return MISSING
    found = number(row, "", digits, scale, signed=signed, source=_source(row))
    return replace(found, text=found.text.replace("-", "−"))


def _by_cell(table: pl.DataFrame, *more: str) -> dict[tuple[Any, ...], Row]:
    key = ("chat_set", "policy", "budget", *more)
    return {tuple(row[k] for k in key): row for row in table.iter_rows(named=True)}


def _table(table: pl.DataFrame, cells: Iterable[Cell]) -> Row:
    """Return table 1: a row per policy and budget, a column per measure."""
    found = _by_cell(table, "statistic")
    there = [name for name in COLUMNS if table.filter(statistic=name).drop_nulls("estimate").height]
    # the column is omitted if no answer failed, or if every layer can be evicted
    if not table.filter(pl.col("statistic").eq("failed") & (pl.col("estimate") > 0)).height:
        there = [name for name in there if name != "failed"]
    if all(_equal(found, cell, *SIZES) for cell in cells):
        there = [name for name in there if name != "total_bytes"]
    scale, unit = _byte_scale(row["estimate"] for row in table.iter_rows(named=True) if row["statistic"] in SIZES)
    how = {
        "answer_perplexity": (2, 1.0), "entries": (1, 1.0), "repetition": (3, 1.0), "cache_bytes": (2, scale),
        "total_bytes": (2, scale),
    }  # fmt: skip
    titles = [COLUMNS[name] + (f", {unit}" if name in SIZES else "") for name in there]
    rows = []
    for cell in cells:
        numbers = [_number(found.get((*cell, name)), *how.get(name, (2, 1.0))) for name in there]
        counts = [found[(*cell, name)] for name in ("entries", "repetition") if (*cell, name) in found]
        rows.append(_name(cell) | {"numbers": numbers, "n": counts[0]["clusters"] if counts else 0,
                                   "answers": counts[0]["n"] if counts else 0})  # fmt: skip
    return {"titles": titles, "rows": rows}


def _equal(found: Mapping[tuple[Any, ...], Row], cell: Cell, *names: str) -> bool:
    return len({(found.get((*cell, name)) or {}).get("estimate") for name in names}) == 1


def _byte_scale(values: Iterable[float | None]) -> tuple[float, str]:
    largest = max((value for value in values if value is not None), default=0)
    return next((1 / size, unit) for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))
                if largest >= size or size == 1)  # fmt: skip


def _sentences(stats: pl.DataFrame, cells: Iterable[Cell], alpha: float) -> list[str]:
    """Return a sentence for each policy and budget: retention at the last turn, compared with the full cache."""
    last = _by_cell(stats.filter(statistic="last_turn", by="rule"))
    difference = _by_cell(stats.filter(statistic="last_turn_difference", by="rule"))
    said = []
    for cell in cells:
        row, name = last.get(cell), _name(cell)
        if row is None:
            continue
        kept = f"{labels.interval(row['estimate'], row['ci_low'], row['ci_high'])} of the instructions"
        if cell[1] == FULL["policy"]:
            said.append(f"at the last turn answers from the full cache follow {kept}, n = {row['n']} conversations")
            continue
        share = "at its own footprint" if name["budget"] == "its own" else kept_of(cell[2])
        who = f"with {name['policy']}, {share}, they follow {kept}"
        found = difference.get(cell)
        if found is None or found["p_holm"] is None:
            said.append(f"{who}, n = {row['n']}")
            continue
        sure = found["p_holm"] < alpha and (found["ci_high"] < 0 or found["ci_low"] > 0)
        what = f"{'fewer' if found['estimate'] < 0 else 'more'} than with the full cache"
        p = p_value(found["p_holm"])
        p = p if p.startswith("<") else f"= {p}"
        verdict = what if sure else "no difference from the full cache is shown"
        said.append(f"{who}: {verdict}, p {p} after Holm, n = {found['n']}")
    return said


def _last_turn(stats: pl.DataFrame, cells: Iterable[Cell]) -> list[Row]:
    rows = []
    for by in BY:
        last = _by_cell(stats.filter(statistic="last_turn", by=by))
        difference = _by_cell(stats.filter(statistic="last_turn_difference", by=by))
        half = _by_cell(stats.filter(statistic="survival_median", by=by))
        for cell in cells:
            if cell not in last:
                continue
            found, middle = difference.get(cell), half.get(cell)
            rows.append(_name(cell) | {
                "by": BY[by], "last": _number(last[cell]), "difference": _number(found, 3, signed=True),
                "p": labels.tested(found) if found and found["p_holm"] is not None else DASH,
                "half": _half(middle), "n": last[cell]["n"],
            })  # fmt: skip
    return rows


def _half(row: Row | None) -> Number:
    """Return the median turn of the first failure, or "not reached" if most conversations end without a failure."""
    if row is None:
        return MISSING
    if row["estimate"] is None:
        # the lower bound of the curve may fall to one half although the curve does not
        text = "not reached" if row["ci_low"] is None else f"not reached [{row['ci_low']:.0f}, …]"
        return Number(text, row["n"], _source(row), row["method"])
    return _number(row, 0)


def _conflicts(stats: pl.DataFrame, cells: Iterable[Cell]) -> list[Row]:
    overall = stats.filter(pl.col("age").is_null(), by="rule")
    rows = []
    for cell in cells:
        shares = [_by_cell(overall.filter(statistic=f"conflict_{name}")).get(cell) for name in WINNERS]
        if not any(shares):
            continue
        half = _by_cell(overall.filter(statistic="remembered_median")).get(cell)
        rows.append(_name(cell) | {
            "shares": [_number(row) for row in shares], "forgotten": _half(half),
            "n": shares[0]["clusters"], "answers": shares[0]["n"],
        })  # fmt: skip
    return rows


def _agreement(stats: pl.DataFrame, cells: Iterable[Cell]) -> list[Row]:
    names = ("kappa", "agreement", "judge_failed")
    found = {name: _by_cell(stats.filter(statistic=name)) for name in names}
    sets = list(dict.fromkeys(cell[0] for cell in cells))
    rows = []
    for cell in [*((chat_set, None, None) for chat_set in sets), *cells]:
        own = {name: found[name].get(cell) for name in names}
        if not any(own.values()):
            continue
        name = {"set": cell[0], "policy": "all together", "budget": ""} if cell[1] is None else _name(cell)
        kappa = own["kappa"]
        undefined = kappa is not None and kappa["estimate"] is None
        rows.append(name | {
            "kappa": Number(kappa["method"]) if undefined else _number(kappa),
            "agreement": _number(own["agreement"]), "failed": _number(own["judge_failed"], 3),
            "n": kappa["n"] if kappa else 0, "clusters": kappa["clusters"] if kappa else 0,
        })  # fmt: skip
    return rows


def _anatomy(cache: pl.DataFrame, cells: Iterable[Cell]) -> list[Row]:
    """Return the cache before and after the last turn's compression: a row for each shape of layer."""
    rows = []
    for cell in cells:
        own = cache.filter(chat_set=cell[0], policy=cell[1], budget=cell[2])
        if not own.height:
            continue
        own = own.filter(pl.col("turn") == own["turn"].max())
        shapes = own.select("kind", "kv_heads", "head_dim", "dtype", "layers").unique().sort("kind", "kv_heads").rows()
        scale, unit = _byte_scale(cache.filter(statistic="bytes")["estimate"])
        for kind, heads, dim, dtype, layers in shapes:
            shape = own.filter(kind=kind, kv_heads=heads, head_dim=dim, dtype=dtype, layers=layers)
            found = {(row["when"], row["statistic"]): row for row in shape.iter_rows(named=True)}
            rows.append(_name(cell) | {
                "layers": f"{layers} {kind}", "shape": f"{heads} × {dim}, {dtype}", "turn": own["turn"].max(),
                "numbers": [
                    _number(found.get((when, what)), *((1, 1.0) if what == "entries" else (2, scale)))
                    for what in ("entries", "bytes") for when in ("before", "after")
                ],
                "unit": unit, "token": f"{shape['bytes_per_token'].drop_nulls().mean() or 0:.0f}",
                "n": shape["n"].max(),
            })  # fmt: skip
    return rows


SECTIONS = (Section("memory", "Conversations on a compressed cache", build),)
