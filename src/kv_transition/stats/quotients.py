"""A sum over another sum, from clusters: perplexities, their ratios, shares of bytes; interval and p are one inference.

The test is that of `stats.paired`, Student's t after one more cluster that speaks against the claim. Scores have ends,
so there the additional pair is lost or gained altogether. Here nothing is bounded: the additional cluster lies as far
out, on its side, as the farthest cluster lies from the others. Where a few clusters are much harder than the rest, a
sample often holds none of them, and Student's t alone claims too much (docs/perplexity.md has coverage and size).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kv_transition.stats.clusters import divide
from kv_transition.stats.intervals import finite
from kv_transition.stats.paired import Paired, mean_size, with_one_more


@dataclass(frozen=True)
class Quotient:
    """A sum over another: ``value`` and bounds, NaN where one cluster cannot give them.

    ``p``: two-sided, that it is 0 (of a ratio, `exp`, that it is 1); below 1 - confidence just where the interval
    excludes that.
    """

    value: float
    low: float
    high: float
    p: float = np.nan

    def columns(self, name: str) -> dict[str, float | None]:
        """Return the columns ``name``, ``name_low`` and ``name_high`` of a table; NaN becomes None."""
        return {name: finite(self.value), f"{name}_low": finite(self.low), f"{name}_high": finite(self.high)}

    def exp(self) -> Quotient:
        """Return exp of a logarithm and of its bounds."""
        return Quotient(*(float(np.exp(end)) for end in (self.value, self.low, self.high)), self.p)

    def rest(self) -> Quotient:
        """Return 1 minus a share."""
        return Quotient(1 - self.value, 1 - self.high, 1 - self.low)


def quotient(top: np.ndarray, bottom: np.ndarray, cluster: np.ndarray, confidence: float) -> Quotient:
    """Return sum(top) / sum(bottom) over observations [n] from clusters [n]; those without either number are left out.

    ``bottom`` is not negative. Degrees of freedom: clusters less one.
    """
    there = np.isfinite(top) & np.isfinite(bottom)
    _, codes = np.unique(cluster[there], return_inverse=True)
    clusters = int(codes.max(initial=-1)) + 1
    total, count = (np.bincount(codes, weights=column[there], minlength=clusters)[None] for column in (top, bottom))
    value = divide(total.sum(axis=1), count.sum(axis=1))
    known = int((count > 0).sum())
    if known < 2:
        return Quotient(float(value[0]), np.nan, np.nan)
    apart = (divide(total, count) - value) * known / (known - 1)
    size = mean_size(count)
    lost, gained = (with_one_more(count, total, size * (value + far)) for far in (np.nanmin(apart), np.nanmax(apart)))
    of = np.array([known])
    tested = Paired(value, of, of, np.array([""]), np.array([np.nan]), lost, gained, of - 1)
    found = tested.interval(confidence)
    return Quotient(float(value[0]), float(found.low[0]), float(found.high[0]), float(tested.p[0]))
