"""Survival curves of conversations: the share without a failure up to a turn, with censoring."""

from __future__ import annotations

import numpy as np
from statsmodels.duration.survfunc import SurvfuncRight
from statsmodels.stats.proportion import proportion_confint

from kv_transition.stats.intervals import Interval

KAPLAN_MEIER = "Kaplan-Meier, Wilson at the effective n"


def survival(time: np.ndarray, failed: np.ndarray, turns: int, confidence: float) -> Interval:
    """Return the share S(t) that has not failed by turn t = 1 ... ``turns``, one entry per turn.

    The estimate is that of Kaplan and Meier (1958), by statsmodels. The interval is Wilson's at the effective number of
    conversations: the number still observed at the turn divided by S(t - 1) (Peto et al. 1977). If no conversation ends
    early, it is Wilson's interval of a share. Once all have failed, S stays 0.

    Args:
        time: [n] turn of the first failure, or the last turn that was played.
        failed: [n] whether ``time`` is a failure.
        turns: number of turns.

    ``n`` of the interval is the number still observed, ``clusters`` the number of all conversations; NaN at turns that
    no conversation reached without an earlier failure.
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
    """Return the first turn by which half have failed, and the turns at which the bounds of the curve reach a half.

    A value is infinite if its curve stays above a half. The interval is that of Brookmeyer and Crowley (1982) with the
    bounds of the curve.
    """
    ends = []
    for line in (curve.estimate, curve.low, curve.high):
        down = np.flatnonzero(line <= 0.5 + 1e-9)  # a product of shares is rarely exactly one half
        ends.append(float(down[0] + 1) if len(down) else np.inf)
    return ends[0], ends[1], ends[2]
