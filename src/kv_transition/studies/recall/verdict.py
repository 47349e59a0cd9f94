"""The verdict whether recall is low at high entropy: the study's success criteria as one rule."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kv_transition import labels
from kv_transition.stats.association import Estimate
from kv_transition.stats.intervals import finite
from kv_transition.studies.recall.observations import HIGH_ABOVE, LOW_BELOW

CONFIRMED, NOT_CONFIRMED, UNDECIDED = "confirmed", "not confirmed", "undecided"
AFTER_CONTROLLING = "not confirmed after controlling"
OUTCOMES = (CONFIRMED, NOT_CONFIRMED, AFTER_CONTROLLING, UNDECIDED)

HOLDS = 0.8  # criterion: recall at low entropy is at least this
FAILS = 0.5  # criterion: recall at high entropy is below this


@dataclass(frozen=True)
class Bin:
    """Mean recall of an entropy bin and its interval, from ``steps`` steps of ``n`` examples; NaN if it is empty.

    clusters: the contexts that the examples are about; None: each has its own.
    """

    estimate: float
    low: float
    high: float
    n: int
    steps: int
    clusters: int | None = None

    def __str__(self) -> str:
        return f"{shown(self)} ({counted(self.n, self.steps, self.clusters)})"


@dataclass(frozen=True)
class Verdict:
    outcome: str
    reason: str


def shown(value: Bin | Estimate) -> str:
    point = value.estimate if isinstance(value, Bin) else value.value
    text = labels.interval(*(finite(v) for v in (point, value.low, value.high)))
    return text.replace("-0.00", "0.00").replace("-", "−")


def counted(n: int, steps: int, clusters: int | None = None) -> str:
    return f"{labels.count(n, clusters)}, {steps} step{'s' * (steps != 1)}"


def judge(trend: Estimate, low: Bin, high: Bin, what: str = "the trend over the bins") -> Verdict:
    """Return the verdict for a trend of recall over entropy that should be downward.

    Confirmed: the trend's interval is below 0, recall is at least `HOLDS` at low entropy and below `FAILS` at high
    entropy, bounds included. Not confirmed: the trend's interval includes or exceeds 0, or a bin's interval excludes
    its criterion. Otherwise undecided; more examples would decide.
    """
    against, open_, found = [], [], shown(trend)
    if not trend.bounded:
        open_.append(f"{what} has no interval ({trend.method})")
    elif trend.high >= 0:
        direction = "is not downward" if trend.low <= 0 else "is upward"
        against.append(f"{what}, {found}, {direction}")
    if low.steps == 0:
        open_.append(f"no step has an entropy below {LOW_BELOW:g} nat")
    elif low.high < HOLDS:
        against.append(f"recall at low entropy, {low}, is below {HOLDS:g}")
    elif not low.low >= HOLDS:
        open_.append(f"recall at low entropy, {low}, may be above or below {HOLDS:g}: n is too small")
    if high.steps == 0:
        open_.append(f"no step has an entropy above {HIGH_ABOVE:g} nats")
    elif high.low >= FAILS:
        against.append(f"recall at high entropy, {high}, is not below {FAILS:g}")
    elif not high.high < FAILS:
        open_.append(f"recall at high entropy, {high}, may be above or below {FAILS:g}: n is too small")
    if against:
        return Verdict(NOT_CONFIRMED, "; ".join(against))
    if open_:
        return Verdict(UNDECIDED, "; ".join(open_))
    return Verdict(CONFIRMED, f"recall is {low} at low and {high} at high entropy; {what} is {found}")


def controlled(raw: Verdict, plain: Estimate, partial: Estimate, low: Bin, high: Bin, controls: str) -> Verdict:
    """Return the verdict by the partial correlation with ``controls`` held constant, instead of the trend.

    Controls cost precision. If the interval of the partial correlation includes both 0 and the ``plain`` correlation,
    the data do not show whether an association remains, and the verdict is undecided. A verdict that is not confirmed
    without controls does not change; the reason tells if the partial correlation is downward.
    """
    if not controls:  # none of them varies
        return raw
    what = f"the correlation with {controls} held constant"
    after = judge(partial, low, high, what)
    downward = partial.bounded and partial.high < 0
    if raw.outcome == NOT_CONFIRMED:
        return Verdict(NOT_CONFIRMED, raw.reason + (f"; yet {what}, {shown(partial)}, is downward" if downward else ""))
    if partial.low <= plain.value and partial.high >= 0:
        without = f"{plain.value:.2f}".replace("-", "−")
        also = f"{what}, {shown(partial)}, may be 0 or unchanged from {without}: n is too small"
        return Verdict(UNDECIDED, f"{raw.reason}; {also}" if raw.outcome == UNDECIDED else also)
    if after.outcome == NOT_CONFIRMED:
        return Verdict(
            AFTER_CONTROLLING, f"{raw.reason}; but {after.reason}" if raw.outcome == CONFIRMED else after.reason
        )
    if UNDECIDED in (raw.outcome, after.outcome):
        return raw if raw.outcome == UNDECIDED else after
    return Verdict(CONFIRMED, f"{raw.reason}; {what} is {shown(partial)}")


def empty_bin() -> Bin:
    return Bin(np.nan, np.nan, np.nan, 0, 0)
