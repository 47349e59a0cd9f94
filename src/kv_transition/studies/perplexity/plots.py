"""Figures of perplexity under eviction: against compression, against context length, merging beside dropping.

Books differ far more than policies do. A policy is therefore drawn at the full cache's perplexity times its ratio to
it, with the ratio's interval: where both scored the same windows, that is the policy's own perplexity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import polars as pl

from kv_transition import labels
from kv_transition.plotting.drawing import (  # fmt: skip
    INK,
    NEUTRAL,
    PALETTE,
    SHAPES,
    Datasets,
    Spec,
    as_wide_as_its_place,
    choices,
    color,
    compose,
    filtered,
    inner,
    note,
    rows_of,
    save_figures,
    shape,
    view,
)
from kv_transition.policies import catalog
from kv_transition.stats.examples import FULL
from kv_transition.stats.frames import read_table

FIGURES = ("ppl_vs_compression", "ppl_vs_len", "merge_vs_drop")
ALL_LENGTHS = "all lengths"
WIDTH, HEIGHT, COLUMNS = 300, 200, 3
Options = Mapping[str, Mapping[str, Any] | None]
Row = dict[str, Any]


def curves(policies: Options) -> dict[str, str]:
    """The line that each policy's points are on, by its name: policies that differ in their threshold share one."""
    resolved = {name: catalog.resolve(name, options or {}) for name, options in policies.items()}
    alike: dict[str, list[str]] = {}
    for name, (kind, chosen) in resolved.items():
        rest = {key: value for key, value in chosen.items() if key != "threshold"}
        thresholded = chosen.get("target") == "threshold"
        alike.setdefault(repr((kind, sorted(rest.items()))) if thresholded else name, []).append(name)
    found = {}
    for names in alike.values():
        shared = f"{resolved[names[0]][0]}, thresholds" if len(names) > 1 else names[0]
        if len(names) > 1 and shared in found.values():
            shared = f"{shared} ({names[0]} ...)"
        found |= dict.fromkeys(names, shared)
    return found


def spans(table: pl.DataFrame) -> dict[tuple[str, int | None], str]:
    """What each (corpus, bin) is called, from short to long, then all lengths where there are several."""
    found = {}
    for corpus in table["corpus"].unique(maintain_order=True).sort():
        own = table.filter(corpus=corpus).select("bin", "context_min", "context_max").unique("bin").sort("bin")
        several = own["bin"].drop_nulls().len() > 1
        for row in own.drop_nulls("bin").iter_rows(named=True):
            found[corpus, row["bin"]] = f"{labels.token_range(row['context_min'], row['context_max'])} tokens"
        if several:
            found[corpus, None] = ALL_LENGTHS
    return found


def _names(points: Sequence[Row]) -> list[str]:
    return sorted({point["policy"] for point in points} - {FULL["policy"]})


def points(table: pl.DataFrame, policies: Options) -> list[Row]:
    """Every cell as it is drawn: compression in per cent, perplexity with the bounds of its ratio to the full cache."""
    lines, names = curves(policies), spans(table)
    full = {(row["corpus"], row["bin"]): row["perplexity"] for row in table.filter(**FULL).iter_rows(named=True)}
    found = []
    for row in table.drop_nulls("ratio").iter_rows(named=True):
        place = row["corpus"], row["bin"]
        level = full.get(place)
        if place not in names or level is None:
            continue
        found.append({
            "corpus": row["corpus"], "span": names[place], "bin": row["bin"], "name": row["policy"],
            "policy": lines.get(row["policy"], row["policy"]), "budget": row["budget"],
            "kept": labels.kept(row["policy"], row["budget"]), "tokens": row["context_max"],
            "compression": None if row["compression"] is None else 100 * row["compression"],
            "estimate": level * row["ratio"], **_scaled(row, level),
            "interval": labels.interval(row["perplexity"], row["perplexity_low"], row["perplexity_high"]),
            "ratio": labels.interval(row["ratio"], row["ratio_low"], row["ratio_high"], 3),
            "n": row["n"], "books": row["clusters"], "method": row["method"],
        })  # fmt: skip
    return found


def _scaled(row: Row, level: float) -> Row:
    bounds = {"low": row["ratio_low"], "high": row["ratio_high"]}
    return {name: None if bound is None else level * bound for name, bound in bounds.items()}


_TIP = {"name": "policy", "kept": "kept", "interval": "perplexity [interval]", "ratio": "over the full cache's",
        "n": "windows", "books": "books"}  # fmt: skip


def _y(title: str = "perplexity (log scale)") -> alt.Y:
    # ratios are what matters, so equal factors are equally far apart
    return alt.Y("estimate:Q", scale=_SCALE, axis=alt.Axis(title=title, tickCount=5))


_SCALE = alt.Scale(type="log", nice=False, padding=12)


def _lines(own: list[Row], names: Sequence[str], x: alt.X, data: Datasets, by: Sequence[alt.Parameter] = ()) -> list:
    """Each policy as a line with a band and its points."""
    of = filtered(data.add([p for p in own if p["name"] != FULL["policy"]]), by)
    bounds = {"y": alt.Y("low:Q", scale=_SCALE), "y2": alt.Y2("high:Q")}
    tip = [alt.Tooltip(f"{field}:N", title=title) for field, title in _TIP.items()]
    return [
        of.mark_area(opacity=0.13).encode(x=x, color=color(names), **bounds),
        of.mark_rule(strokeWidth=1.2, opacity=0.55).encode(x=x, color=color(names), **bounds),
        of.mark_line(strokeWidth=1.8).encode(x=x, y=_y(), color=color(names)),
        of.mark_point(filled=True, size=58, opacity=1, stroke="white", strokeWidth=0.6)
        .encode(x=x, y=_y(), color=color(names), shape=shape(names), tooltip=tip),
    ]  # fmt: skip


def _level(own: list[Row], data: Datasets, by: Sequence[alt.Parameter] = ()) -> list:
    """The full cache as a grey line across."""
    full = filtered(data.add([p for p in own if p["name"] == FULL["policy"]]), by)
    return [full.mark_rule(color=NEUTRAL, strokeDash=[5, 3], strokeWidth=1.6).encode(y=_y())]


def _compression() -> alt.X:
    axis = alt.Axis(title="compression reached, % of the full cache's bytes", grid=False, tickCount=6)
    return alt.X("compression:Q", scale=alt.Scale(zero=False, nice=True, padding=10), axis=axis)


def _said(found: Sequence[Row], confidence: float) -> str:
    windows, books = sorted({p["n"] for p in found}), sorted({p["books"] for p in found})

    def span(counts: list[int]) -> str:
        return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"

    counts = f"{span(windows)} windows from {span(books)} book{'s' * (books != [1])}"
    return f"{100 * confidence:g} % intervals with books as clusters; {counts}"


_BANDS = "bands: how well the ratio to the full cache (grey) is known; of the perplexity itself the table says it"
_COMPRESSION_TITLE = "Perplexity against compression"


def compression_figure(table: pl.DataFrame, policies: Options, confidence: float) -> Spec:
    """A panel per corpus and length, a line per policy over its budgets."""
    found = [p for p in points(table, policies) if p["compression"] is not None]
    if not found:
        return note("No window was scored.", _COMPRESSION_TITLE, f"{100 * confidence:g} % intervals")
    data, panels, names = Datasets(), [], _names(found)
    for (corpus, bin), span in spans(table).items():
        own = [p for p in found if (p["corpus"], p["bin"]) == (corpus, bin)]
        layers = _level(own, data) + _lines(own, names, _compression(), data)
        panels.append(view(layers, WIDTH, HEIGHT, _title(f"{corpus}, {span}")))
    content = {"vconcat": rows_of(panels, COLUMNS), "spacing": 26}
    return compose(content, data, _COMPRESSION_TITLE, _said(found, confidence), _BANDS)


def _title(text: str) -> Spec:
    return {"text": text, "fontSize": 13, "offset": 8}


def explorer(table: pl.DataFrame, policies: Options, confidence: float) -> Spec | None:
    """The same for one corpus and length at a time, as wide as its place; None without any window."""
    found = [p for p in points(table, policies) if p["compression"] is not None]
    if not found:
        return None
    found.sort(key=lambda p: (p["corpus"], p["bin"] is not None, p["bin"] or 0))
    by = choices(found, {"span": "Length", "corpus": "Corpus"})
    data, names = Datasets(), _names(found)
    layers = alt.layer(*_level(found, data, by), *_lines(found, names, _compression(), data, by)).add_params(*by)
    content = as_wide_as_its_place(inner(layers), 340)
    return compose(content, data, _COMPRESSION_TITLE, _said(found, confidence), _BANDS)


_LENGTH_TITLE = "Perplexity against context length"


def length_figure(table: pl.DataFrame, policies: Options, confidence: float) -> Spec:
    """A panel per corpus and budget, a line per policy; the full cache in each."""
    found = [p for p in points(table, policies) if p["bin"] is not None]
    if not found:
        return note("No window was scored.", _LENGTH_TITLE, f"{100 * confidence:g} % intervals")
    for point in found:
        point["policy"] = point["name"]  # thresholds are lines of their own here
    data, panels, names = Datasets(), [], _names(found)
    budgets = sorted({(p["corpus"], p["budget"]) for p in found if p["name"] != FULL["policy"]},
                     key=lambda k: (k[0], labels.budget_order(k[1])))  # fmt: skip
    for corpus, budget in budgets or sorted({(p["corpus"], p["budget"]) for p in found}):
        own = [p for p in found if p["corpus"] == corpus and (p["budget"] == budget or p["name"] == FULL["policy"])]
        lengths = sorted({p["tokens"] for p in own})
        x = alt.X(
            "tokens:Q",
            scale=alt.Scale(type="log", nice=False, padding=14),
            axis=alt.Axis(title="tokens of context", grid=False, values=lengths, format="d"),
        )
        full = [p for p in own if p["name"] == FULL["policy"]]
        reference = alt.Chart(data.add(full))
        layers = [
            reference.mark_line(color=NEUTRAL, strokeDash=[5, 3], strokeWidth=1.6).encode(x=x, y=_y()),
            reference.mark_point(color=NEUTRAL, size=40, opacity=1).encode(x=x, y=_y()),
            *_lines(own, names, x, data),
        ]  # fmt: skip
        kept = "footprint of their own" if budget == FULL["budget"] else f"{labels.budget(budget)} kept"
        panels.append(view(layers, WIDTH, HEIGHT, _title(f"{corpus}, {kept}")))
    content = {"vconcat": rows_of(panels, COLUMNS), "spacing": 26}
    return compose(content, data, _LENGTH_TITLE, _said(found, confidence), _BANDS)


_PAIRS_TITLE = "Merging beside dropping the same spans"


def pairs_figure(pairs: pl.DataFrame, confidence: float) -> Spec:
    """Ratio of the two perplexities, a line per pair and budget; a panel per corpus, colours by length."""
    about = "perplexity with merging over that with dropping, on the same windows at the same footprint"
    own = pairs.drop_nulls("ratio")
    if not own.height:
        return note("No policy that merges was run beside one that drops the same spans.", _PAIRS_TITLE, about)
    names = spans(own)
    lengths = list(dict.fromkeys(names.values()))
    order = list(dict.fromkeys(zip(own["policy"], own["reference_policy"], own["budget"], strict=True)))
    order.sort(key=lambda k: (k[0], labels.budget_order(k[2])))
    data, panels = Datasets(), []
    for corpus in own["corpus"].unique().sort():
        rows = []
        for row in own.filter(corpus=corpus).iter_rows(named=True):
            if (corpus, row["bin"]) not in names:
                continue
            merging, dropping, budget = (row[k] for k in ("policy", "reference_policy", "budget"))
            kept = "" if budget == FULL["budget"] else f", {labels.budget(budget)}"
            rows.append({
                "what": f"{merging} : {dropping}{kept}", "at": order.index((merging, dropping, budget)),
                "span": names[corpus, row["bin"]],
                "estimate": row["ratio"], "low": row["ratio_low"], "high": row["ratio_high"],
                "interval": labels.interval(row["ratio"], row["ratio_low"], row["ratio_high"], 3),
                "n": row["n"], "books": row["clusters"],
                "p": "–" if row["p_holm"] is None else f"{row['p_holm']:.2g}",
            })  # fmt: skip
        panels.append(view(_forest(rows, lengths, data), 380, {"step": 14}, _title(corpus)))
    said = _said([{"n": r["n"], "books": r["clusters"]} for r in own.iter_rows(named=True)], confidence)
    content = {"vconcat": rows_of(panels, 2), "spacing": 26}
    return compose(content, data, _PAIRS_TITLE, about + "; below 1 merging is better", said)


def _forest(rows: list[Row], lengths: list[str], data: Datasets) -> list:
    scale = alt.Scale(type="log", nice=False, padding=14)
    axis = alt.Axis(title="ratio of perplexities", grid=False, tickCount=6)
    y = alt.Y("what:N", sort=alt.EncodingSortField("at", order="ascending"), title=None,
              axis=alt.Axis(labelLimit=300, domain=False, ticks=False))  # fmt: skip
    legend = alt.Legend(title="context", orient="top", symbolSize=90, symbolOpacity=1)
    colors = alt.Color("span:N", legend=legend, scale=alt.Scale(
        domain=lengths, range=[INK if name == ALL_LENGTHS else PALETTE[i % len(PALETTE)]
                               for i, name in enumerate(lengths)]))  # fmt: skip
    shapes = alt.Shape("span:N", legend=legend, scale=alt.Scale(
        domain=lengths, range=[SHAPES[i % len(SHAPES)] for i in range(len(lengths))]))  # fmt: skip
    offset = alt.YOffset("span:N", scale=alt.Scale(domain=lengths))
    tip = {"what": "pair", "span": "context", "interval": "ratio [interval]", "p": "p (Holm)", "n": "windows",
           "books": "books"}  # fmt: skip
    own = alt.Chart(data.add(rows))
    return [
        alt.Chart(data.add([{"x": 1}])).mark_rule(color=NEUTRAL, strokeDash=[5, 3]).encode(x=alt.X("x:Q", scale=scale)),
        own.mark_rule(strokeWidth=1.6, opacity=0.7)
        .encode(y=y, yOffset=offset, x=alt.X("low:Q", scale=scale, axis=axis), x2="high:Q", color=colors),
        own.mark_point(filled=True, size=64, opacity=1, stroke="white", strokeWidth=0.6)
        .encode(y=y, yOffset=offset, x=alt.X("estimate:Q", scale=scale, axis=axis), color=colors, shape=shapes,
                tooltip=[alt.Tooltip(f"{field}:N", title=title) for field, title in tip.items()]),
    ]  # fmt: skip


def write_perplexity_plots(
    table: str, pairs: str, policies: Options, confidence: float, outputs: Mapping[str, str]
) -> None:
    """The `perplexity_plots` rule. ``policies``: the configuration's ``kv.policies``; ``outputs``: path by
    ``{ppl_vs_compression|ppl_vs_len|merge_vs_drop}_{svg|png}``.

    Raises UserError for an output of another name.
    """
    stats = read_table(table)
    drawn = {
        "ppl_vs_compression": compression_figure(stats, policies, confidence),
        "ppl_vs_len": length_figure(stats, policies, confidence),
        "merge_vs_drop": pairs_figure(read_table(pairs), confidence),
    }
    save_figures(drawn, outputs)
