"""The scale of outcomes: the result for a policy at a budget, from no loss to collapse, in five words.

The transition zone shows where a policy is unstable or has collapsed. Comparisons show where its score or its failure
rate is worse than the full cache's. Non-inferiority shows whether enough is kept. The outcome is the worst that is
shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kv_transition import labels

NO_LOSS, LOSS, UNSTABLE, COLLAPSED, UNDECIDED = "no loss shown", "loss shown", "unstable", "collapsed", "undecided"
SCALE = (NO_LOSS, LOSS, UNSTABLE, COLLAPSED, UNDECIDED)
SYMBOLS = dict(zip(SCALE, ("●", "◐", "▲", "×", "?"), strict=True))
DEFINITIONS = {
    NO_LOSS: "at least {kept} of the score is shown to be kept (non-inferiority), and nothing worse is shown",
    LOSS: "the score is significantly lower, or failures are more frequent, than with the full cache",
    UNSTABLE: "failures, repeats or dispersion significantly exceed the full cache's",
    COLLAPSED: "the mean's upper bound is below half of the full cache's mean",
    UNDECIDED: "none of these is shown, because n is too small; the number of examples that would decide is given",
}
"""definition of each word, from best to worst; all tests are on the same examples, after Holm"""
Row = dict[str, Any]
Key = tuple[str, str, str, str, int | None]


@dataclass(frozen=True)
class Shown:
    """The results of comparisons and non-inferiority for one policy and budget, in a bin or over all bins.

    ``n_decides``: about how many examples would show one or the other if the observed values were the true ones; None:
    unknown. ``kept``: interval of the share of the score that is kept; it is above 95 % exactly if no loss is shown,
    and below 100 % exactly if a loss of score is shown, both after Holm. Its upper end is known over all bins only.
    """

    loss: Row | None = None
    no_loss: Row | None = None
    n: int = 0
    n_decides: int | None = None
    kept: tuple[float | None, float | None] = (None, None)

    @property
    def word(self) -> str:
        return LOSS if self.loss else NO_LOSS if self.no_loss else UNDECIDED


def shown(comparisons: Iterable[Row], noninferiority: Iterable[Row], alpha: float) -> dict[Key, Shown]:
    """Return what is shown by (task, mode, policy, budget, bin); bin None: over all bins.

    The arguments are rows of tables.COMPARISONS with the full cache, and of tables.NONINFERIORITY.
    """
    losses: dict[Key, Row] = {}
    highest: dict[Key, float | None] = {}
    decides: dict[Key, list[int]] = {}
    for row in comparisons:
        key = _key(row)
        if row["statistic"] == "score_ratio":
            highest[key] = row["holm_high"]
        if row["statistic"] not in ("score", "failure_rate") or row["p_holm"] is None:
            continue
        worse = row["estimate"] < 0 if row["statistic"] == "score" else row["estimate"] > 0
        if worse and row["p_holm"] < alpha:
            losses.setdefault(key, row)
        if worse and row["n_decides"] is not None:
            decides.setdefault(key, []).append(row["n_decides"])
    found = {}
    for row in noninferiority:
        key = _key(row)
        enough = decides.get(key, []) + ([row["n_decides"]] if row["n_decides"] is not None else [])
        no_loss = row if row["non_inferior"] else None
        kept = row["ratio_holm_low"], highest.get(key)
        found[key] = Shown(losses.get(key), no_loss, row["n"], min(enough, default=None), kept)
    return found


def _key(row: Mapping[str, Any]) -> Key:
    return row["task"], row["mode"], row["policy"], row["budget"], row["bin"]


def along(row: Row, points: Sequence[Shown], whole: Shown | None, axis: str) -> Row:
    """Return a row of the transition tables with its outcome on the scale.

    Args:
        row: the row of the detector ``definition``; its ``outcome`` is replaced.
        points: what is shown at each of the points in ``details``, in their order.
        whole: what is shown over all points together; None along budgets, which are not one sample.
        axis: "bin" or "budget".

    ``since_*`` is the first point in that state (null: only over all points together), ``n_decides`` belongs to the
    outcome undecided. The ``state`` of each point in ``details`` is a word of the scale, too.
    """
    details = json.loads(row["details"])
    at = details.get(f"{axis}s", [])
    for point, one in zip(at, points, strict=True):
        point["state"] = COLLAPSED if point["collapsed"] else UNSTABLE if point["unstable"] else one.word
    names = [point[axis] for point in at]
    losing = [name for name, one in zip(names, points, strict=True) if one.loss]
    since, n_decides, words = None, None, ""
    if row[f"collapse_{axis}"] is not None:
        outcome, since = COLLAPSED, row[f"collapse_{axis}"]
    elif row[f"onset_{axis}"] is not None:
        outcome, since = UNSTABLE, row[f"onset_{axis}"]
    elif losing or (whole and whole.loss):
        outcome, since = LOSS, losing[0] if losing else None
        words = _loss(whole.loss if since is None else points[names.index(since)].loss)
    elif at and (whole.no_loss if whole else all(one.no_loss for one in points)):
        outcome, words = NO_LOSS, _kept(whole.no_loss if whole else points[-1].no_loss)
    else:
        outcome = UNDECIDED
        open_at = [whole] if whole else [one for one in points if one.word == UNDECIDED]
        known = [one.n_decides for one in open_at]
        n_decides = None if None in known else max(known, default=None)
        words = (
            f"neither a loss nor its absence is shown, {undecided(max((o.n for o in open_at), default=0), n_decides)}"
        )
    texts = {name: row[name].removesuffix(".") + (f"; {words}." if words else ".") for name in ("reason", "sentence")}
    made = {
        "outcome": outcome,
        f"since_{axis}": since,
        "n_decides": n_decides,
        "details": json.dumps(details, sort_keys=True),
    }
    low, high = whole.kept if whole else (None, None)
    return row | texts | made | {"kept_low": low, "kept_high": high}


def _loss(row: Row) -> str:
    what = "score" if row["statistic"] == "score" else "failure rate"
    where = "over all bins" if row["bin"] is None else "in this bin"
    inside = {"ci_low": row["holm_low"], "ci_high": row["holm_high"]}
    return (
        f"a loss is shown {where}: {what} {labels.signed(row | inside)} against the full cache, p "
        f"{_p(row['p_holm'])} after Holm, {labels.count(row['n'], row['clusters'])}"
    )


def _p(p: float) -> str:
    text = labels.p_value(p)
    return text if text.startswith("<") else f"= {text}"


def _kept(row: Row) -> str:
    ratio = labels.interval(row["ratio"], row["ratio_low"], row["ratio_high"])
    return f"at least {100 * row['kept']:g} % of the score is shown to be kept (ratio {ratio}, n = {row['n']})"


def undecided(n: int, n_decides: int | None) -> str:
    """Return the reason of an undecided outcome: ``because n = 100; about 340 would decide``."""
    if not n:
        return "because no answers can be compared"
    enough = "more than 100,000 would be needed" if n_decides is None else f"about {n_decides} would decide"
    return f"because n = {n}; {enough}"


def words(row: Mapping[str, Any], start: str | None, n: int) -> str:
    """Return the outcome with its beginning: ``unstable from 2.0k tokens``, ``undecided, because n = 100; ...``.

    start: the tokens (or the budget) at which it begins; None: over all of them together.
    """
    if row["outcome"] == UNDECIDED:
        return f"{UNDECIDED}, {undecided(n, row['n_decides'])}"
    if row["outcome"] == NO_LOSS:
        return NO_LOSS
    return f"{row['outcome']} {f'from {start}' if start else 'over all lengths'}"
