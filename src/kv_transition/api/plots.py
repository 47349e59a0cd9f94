"""Two figures for a notebook: the kept entries, and score against bytes."""

from __future__ import annotations

import altair as alt
import polars as pl

from kv_transition.api.context import Compressed
from kv_transition.errors import UserError
from kv_transition.plotting.theme import policy_scales


def heat_map(compressed: Compressed, columns: int = 64) -> alt.Chart:
    """Return a heat map of the share of a context's entries that each layer kept, by position, mean over its KV heads.

    columns: number of pieces of equal length that the context is divided into.
    """
    n = len(compressed.context)
    width = -(-n // columns)
    heads = compressed.context.state.evictable[0].parts
    per_layer = sum(part.positions.shape[0] for part in heads)
    starts = pl.DataFrame({"start": list(range(0, n, width))})
    kept = compressed.kept().with_columns(start=pl.col("position") // width * width)
    layers = kept.select("layer").unique()
    shares = (
        layers.join(starts, how="cross")
        .join(kept.group_by("layer", "start").len(), on=["layer", "start"], how="left")
        .with_columns(end=(pl.col("start") + width).clip(upper_bound=n))
        .with_columns(share=pl.col("len").fill_null(0) / ((pl.col("end") - pl.col("start")) * per_layer))
    )
    return (
        alt.Chart(shares.select("layer", "start", "end", "share"))
        .mark_rect()
        .encode(
            x=alt.X("start:Q", title="position in the context", scale=alt.Scale(domain=[0, n], nice=False)),
            x2="end:Q",
            y=alt.Y("layer:O", title="layer", sort="descending"),
            color=alt.Color("share:Q", title="share kept", scale=alt.Scale(domain=[0, 1], scheme="viridis")),
            tooltip=["layer", "start", "end", alt.Tooltip("share", format=".2f")],
        )
        .properties(
            width=520,
            title=f"{compressed.policy}: {compressed.entries:g} of {n} entries of each KV head",
        )
    )


def plot(table: pl.DataFrame) -> alt.LayerChart:
    """Return the mean score of a `grid` against the bytes that were held, with a line for each policy.

    All questions are about one context, so the figure shows one example and has no interval. Raises UserError for a
    grid without scores.
    """
    if table["score"].null_count() == len(table):
        raise UserError("the grid has no scores to draw; give the right answers to grid()")
    n = table["question"].n_unique()
    held = pl.col("cache_bytes") / pl.col("full_bytes")
    means = table.group_by("policy", "budget").agg(pl.col("score").mean(), held.mean().alias("held")).sort("held")
    full = means.filter(pl.col("policy") == "full")
    rest = means.filter(pl.col("policy") != "full")
    color, shape = policy_scales(sorted(rest["policy"].unique().to_list()))
    drawn = alt.Chart(rest).encode(
        x=alt.X("held:Q", title="bytes held at the end, share of the full cache's", scale=alt.Scale(domain=[0, 1])),
        y=alt.Y("score:Q", title="mean score", scale=alt.Scale(domain=[0, 1])),
        color=color,
        tooltip=["policy", "budget", alt.Tooltip("held", format=".2f"), alt.Tooltip("score", format=".2f")],
    )
    points = drawn.mark_point(filled=True, size=70).encode(shape=shape)
    whole = alt.Chart(full).mark_rule(strokeDash=[4, 4]).encode(y="score:Q", tooltip=["policy", "score"])
    noun = "question" if n == 1 else "questions"
    subtitle = f"{n} {noun} about one context; dashed: the full cache; an example, not an estimate"
    return alt.layer(drawn.mark_line(), points, whole).properties(
        width=460, title=alt.Title("Score against budget", subtitle=subtitle)
    )
