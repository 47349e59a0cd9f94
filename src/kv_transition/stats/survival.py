"""Survival curves of conversations: the share without a failure by a turn, with censoring."""

from __future__ import annotations

import numpy as np
from statsmodels.duration.survfunc import SurvfuncRight
from statsmodels.stats.proportion import proportion_confint

from kv_transition.stats.intervals import Interval

KAPLAN_MEIER = "Kaplan-Meier, Wilson at the effective n"


def survival(time: np.ndarray, failed: np.ndarray, turns: int, confidence: float) -> Interval:
    """The share S(t) that has not failed by turn t = 1 ... ``turns``, an entry a turn.

    Kaplan and Meier (1958) by statsmodels, with Wilson's interval at the number of conversations that would tell as
    much had none ended early: those still there at the turn over the share S(t - 1) that they stand for (Peto et al.
    1977). Without early ends that is Wilson's interval of a share. Where all have failed S stays 0.

    Args:
        time: [n] turn of the first failure, or the last turn that was played.
        failed: [n] whether it is the former.
        turns: up to which turn.

    ``n`` of the interval is the number still there, ``clusters`` all of them; NaN at turns that none reached without
    failing before.
    """
    time, failed = np.asarray(time), np.asarray(failed, dtype=bool)
    estimate, low, high = (np.full(turns, np.nan) for _ in range(3))
    n = np.array([(time >= turn).sum() for turn in range(1, turns + 1)])
    found = SurvfuncRight(time, failed) if failed.any() else None
    before = 1.0
    for i in range(turns):
        if before == 0:
            estimate[i], low[i], high[i], n[i] = 0.0, 0.0, high[i - 1], n[i - 1]
        elif n[i]:
            events = 0 if found is None else np.searchsorted(found.surv_times, i + 1, side="right")
            share = float(found.surv_prob[events - 1]) if events else 1.0
            worth = n[i] / before
            bounds = proportion_confint(share * worth, worth, 1 - confidence, "wilson")
            estimate[i] = before = share
            low[i], high[i] = min(max(bounds[0], 0), share), max(min(bounds[1], 1), share)
    method, every = np.full(turns, KAPLAN_MEIER, dtype=object), np.full(turns, len(time))
    return Interval(estimate, low, high, n, method, every)


def median(curve: Interval) -> tuple[float, float, float]:
    """The first turn by which half have failed, and those at which the curve's bounds come down to a half.

    Infinite where one of them never does: Brookmeyer and Crowley's (1982) interval with the bounds of the curve.
    """
    ends = []
    for line in (curve.estimate, curve.low, curve.high):
        down = np.flatnonzero(line <= 0.5 + 1e-9)  # a product of shares is seldom exactly a half
        ends.append(float(down[0] + 1) if len(down) else np.inf)
    return ends[0], ends[1], ends[2]
