"""Figures of perplexity: against compression, against context length, and merging compared with dropping.

Books differ far more than policies do. Therefore a policy is drawn at the full cache's perplexity times its ratio to
it, with the interval of the ratio. If both scored the same windows, this is the policy's own perplexity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import polars as pl

from kv_transition import labels
from kv_transition.plotting import marks, panels, save, theme
from kv_transition.plotting.panels import Datasets, Row, Spec
from kv_transition.policies import catalog
from kv_transition.stats.examples import FULL
from kv_transition.stats.frames import read_table

FIGURES = ("ppl_vs_compression", "ppl_vs_len", "merge_vs_drop")
ALL_LENGTHS = "all lengths"
WIDTH, HEIGHT, COLUMNS = 300, 200, 3
Options = Mapping[str, Mapping[str, Any] | None]


def curves(policies: Options) -> dict[str, str]:
    """Return the line of each policy by its name; policies that differ only in their threshold share a line."""
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
    """Return the name of each (corpus, bin), from short to long, then all lengths if there are several."""
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
    """Return every cell as drawn: compression in per cent, and perplexity with the bounds of its ratio to the full
    cache.
    """
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
# log scale: equal ratios have equal distances
_Y = alt.Y(
    "estimate:Q",
    scale=alt.Scale(type="log", nice=False, padding=12),
    axis=alt.Axis(title="perplexity (log scale)", tickCount=5),
)


def _curves(own: list[Row], names: Sequence[str], x: alt.X, data: Datasets) -> list[alt.Chart]:
    rows = [p for p in own if p["name"] != FULL["policy"]]
    return marks.curves(data, rows, x, _Y, theme.policy_scales(names), "both", panels.tooltip(_TIP))


def _by_compression(own: list[Row], names: Sequence[str], data: Datasets) -> list[alt.Chart]:
    axis = alt.Axis(title="compression reached, % of the full cache's bytes", grid=False, tickCount=6)
    x = alt.X("compression:Q", scale=alt.Scale(zero=False, nice=True, padding=10), axis=axis)
    full = [p for p in own if p["name"] == FULL["policy"]]
    return [marks.level(data, full, _Y), *_curves(own, names, x, data)]


def _said(found: Sequence[Row], confidence: float) -> str:
    books = [p["books"] for p in found]
    counts = f"{panels.span([p['n'] for p in found])} windows from {panels.span(books)} book{'s' * (set(books) != {1})}"
    return f"{panels.share(confidence)} with books as clusters; {counts}"


_BANDS = "bands: interval of the ratio to the full cache (grey); the table has the interval of the perplexity itself"
_COMPRESSION_TITLE = "Perplexity against compression"


def compression_figure(table: pl.DataFrame, policies: Options, confidence: float) -> Spec:
    """Return the figure of perplexity against compression: a panel per corpus and length, a line per policy."""
    found = [p for p in points(table, policies) if p["compression"] is not None]
    if not found:
        return panels.note("No window was scored.", _COMPRESSION_TITLE, panels.share(confidence))
    data, drawn, names = Datasets(), [], _names(found)
    for (corpus, bin), span in spans(table).items():
        own = [p for p in found if (p["corpus"], p["bin"]) == (corpus, bin)]
        layers = _by_compression(own, names, data)
        drawn.append(panels.panel(layers, WIDTH, HEIGHT, panels.title(f"{corpus}, {span}")))
    return panels.figure(drawn, COLUMNS, data, _COMPRESSION_TITLE, _said(found, confidence), _BANDS)


def explorer(table: pl.DataFrame, policies: Options, confidence: float) -> Spec | None:
    """Return the same as an interactive chart for one corpus and length at a time; None without windows."""
    found = [p for p in points(table, policies) if p["compression"] is not None]
    if not found:
        return None
    found.sort(key=lambda p: (p["corpus"], p["bin"] is not None, p["bin"] or 0))
    data = Datasets(panels.choices(found, {"span": "Length", "corpus": "Corpus"}))
    layers = _by_compression(found, _names(found), data)
    return panels.explorer(layers, 210, data, _COMPRESSION_TITLE, _said(found, confidence), _BANDS)


_LENGTH_TITLE = "Perplexity against context length"


def length_figure(table: pl.DataFrame, policies: Options, confidence: float) -> Spec:
    """Return the figure of perplexity against context length: a panel per corpus and budget, a line per policy."""
    found = [p for p in points(table, policies) if p["bin"] is not None]
    if not found:
        return panels.note("No window was scored.", _LENGTH_TITLE, panels.share(confidence))
    for point in found:
        point["policy"] = point["name"]  # in this figure each threshold has its own line
    data, drawn, names = Datasets(), [], _names(found)
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
        layers = [
            *marks.reference(data, full, x, _Y),
            data.chart(full).mark_point(color=theme.NEUTRAL, size=40, opacity=1).encode(x=x, y=_Y),
            *_curves(own, names, x, data),
        ]
        kept = "footprint of their own" if budget == FULL["budget"] else f"{labels.budget(budget)} kept"
        drawn.append(panels.panel(layers, WIDTH, HEIGHT, panels.title(f"{corpus}, {kept}")))
    return panels.figure(drawn, COLUMNS, data, _LENGTH_TITLE, _said(found, confidence), _BANDS)


_PAIRS_TITLE = "Merging compared with dropping the same spans"


def pairs_figure(pairs: pl.DataFrame, confidence: float) -> Spec:
    """Return the ratio of the two perplexities, a line per pair and budget, a panel per corpus, a colour per length."""
    about = "perplexity with merging divided by that with dropping, on the same windows at the same footprint"
    own = pairs.drop_nulls("ratio")
    if not own.height:
        return panels.note(
            "No merging policy was run together with a policy that drops the same spans.", _PAIRS_TITLE, about
        )
    names = spans(own)
    lengths = list(dict.fromkeys(names.values()))
    order = list(dict.fromkeys(zip(own["policy"], own["reference_policy"], own["budget"], strict=True)))
    order.sort(key=lambda k: (k[0], labels.budget_order(k[2])))
    data, drawn = Datasets(), []
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
        drawn.append(panels.panel(_forest(rows, lengths, data), 380, {"step": 14}, panels.title(corpus)))
    said = _said([{"n": r["n"], "books": r["clusters"]} for r in own.iter_rows(named=True)], confidence)
    return panels.figure(drawn, 2, data, _PAIRS_TITLE, about + "; below 1: merging is better", said)


def _forest(rows: list[Row], lengths: list[str], data: Datasets) -> list[alt.Chart]:
    scale = alt.Scale(type="log", nice=False, padding=14)
    x = alt.X("estimate:Q", scale=scale, axis=alt.Axis(title="ratio of perplexities", grid=False, tickCount=6))
    y = alt.Y("what:N", sort=alt.EncodingSortField("at", order="ascending"), title=None,
              axis=alt.Axis(labelLimit=300, domain=False, ticks=False))  # fmt: skip
    scales = theme.category_scales("span", lengths, "context", {ALL_LENGTHS: theme.INK})
    offset = alt.YOffset("span:N", scale=alt.Scale(domain=lengths))
    tip = {"what": "pair", "span": "context", "interval": "ratio [interval]", "p": "p (Holm)", "n": "windows",
           "books": "books"}  # fmt: skip
    return marks.forest(data, rows, x, y, scales, panels.tooltip(tip), at=1, offset=offset)


def write_perplexity_plots(
    table: str, pairs: str, policies: Options, confidence: float, outputs: Mapping[str, str]
) -> None:
    """Write the figures. Raises UserError for an output of another name.

    policies: the configuration's ``kv.policies``. outputs: path by
    ``{ppl_vs_compression|ppl_vs_len|merge_vs_drop}_{svg|png}``.
    """
    stats = read_table(table)
    figures = {
        "ppl_vs_compression": lambda: compression_figure(stats, policies, confidence),
        "ppl_vs_len": lambda: length_figure(stats, policies, confidence),
        "merge_vs_drop": lambda: pairs_figure(read_table(pairs), confidence),
    }
    save.save_figures(figures, outputs)
