"""Confidence intervals that stay honest at n = 5 to 20, vectorised over cells.

Every function takes ``values [cells, n]`` with NaN where an example is missing and returns an `Interval` with one
entry a cell. A bound that the data cannot give is NaN (null in the tables), never a guess. Why these methods, and how
often they cover the truth: docs/statistics.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

WILSON = "Wilson"
WILSON_EFFECTIVE = "Wilson at the effective n"
STUDENT = "Student t"
ORDER = "order statistics"
FIELLER = "Fieller with one discordant pair each way"

# Observations of the largest possible variance that are mixed into an estimate of dispersion: at n = 5 a sample
# often shows none of the spread that the population has.
PRIOR_OBSERVATIONS = 2


@dataclass(frozen=True)
class Interval:
    """``estimate``, ``low``, ``high`` [cells] float, ``n`` [cells] int, ``method`` [cells] text."""

    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n: np.ndarray
    method: np.ndarray

    def row(self, i: int) -> dict[str, float | int | str | None]:
        """One cell as the columns of a table; NaN becomes None."""
        return {
            "estimate": _or_none(self.estimate[i]),
            "ci_low": _or_none(self.low[i]),
            "ci_high": _or_none(self.high[i]),
            "n": int(self.n[i]),
            "method": str(self.method[i]),
        }


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.full(np.broadcast(a, b).shape, np.nan), where=np.asarray(b) != 0)


def bounded_mean(values: np.ndarray, confidence: float, bounds: tuple[float, float] = (0.0, 1.0)) -> Interval:
    """The mean of scores in ``bounds``: rates, F1, and paired differences (``bounds=(-1, 1)``).

    A score in [0, 1] with mean m has at most the variance m(1 - m) of a coin. phi is the share of it that the sample
    shows (mixed with `PRIOR_OBSERVATIONS` at the maximum), so n / phi is the number of coin flips that would tell as
    much; Wilson's interval is taken at that n, shrunk by (z / t)^2 because phi is estimated (Korn and Graubard 1998;
    Franco et al. 2019, who do so for surveys). Data of only 0 and 1 have phi = 1: plain Wilson.

    Raises ValueError for a value outside of ``bounds``.
    """
    low, high = bounds
    unit = (values - low) / (high - low)
    if np.nanmin(unit, initial=0) < 0 or np.nanmax(unit, initial=1) > 1:
        raise ValueError(f"a value lies outside of {bounds}")
    n = (~np.isnan(unit)).sum(axis=1)
    total, squares = np.nansum(unit, axis=1), np.nansum(unit**2, axis=1)
    coin = np.all((unit == 0) | (unit == 1) | np.isnan(unit), axis=1)
    lo, hi = bounded_mean_from_moments(total, squares, n, coin, confidence)
    mean = _divide(total, n)
    method = np.where(coin, WILSON, WILSON_EFFECTIVE)
    return Interval(low + mean * (high - low), low + lo * (high - low), low + hi * (high - low), n, method)


def bounded_mean_from_moments(
    total: np.ndarray, squares: np.ndarray, n: np.ndarray, coin: np.ndarray, confidence: float
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of `bounded_mean` from the sum, the sum of squares and n of scores in [0, 1]; ``coin``: only 0 and 1."""
    mean = _divide(total, n)
    most = mean * (1 - mean)
    spread = np.maximum(squares - total * mean, 0)
    phi = np.minimum((_divide(spread, most) + PRIOR_OBSERVATIONS) / (n - 1 + PRIOR_OBSERVATIONS), 1)
    phi = np.where(coin | ~(most > 0), 1, phi)
    alpha = 1 - confidence
    z = stats.norm.ppf(1 - alpha / 2)
    degrees, inverse = np.unique(n - 1 + PRIOR_OBSERVATIONS, return_inverse=True)
    t = stats.t.ppf(1 - alpha / 2, np.maximum(degrees, 1))[inverse].reshape(np.shape(n))
    effective = n / phi * np.where(coin, 1, (z / t) ** 2)
    measured = n > 0
    lo, hi = proportion_confint(
        np.where(measured, mean * effective, 0), np.where(measured, effective, 1), alpha, "wilson"
    )
    lo, hi = np.clip(lo, 0, 1), np.clip(hi, 0, 1)
    lo, hi = np.minimum(lo, mean), np.maximum(hi, mean)
    return np.where(measured, lo, np.nan), np.where(measured, hi, np.nan)


def bounded_std(values: np.ndarray, confidence: float) -> Interval:
    """The standard deviation (divisor n - 1) of scores in [0, 1].

    The variance is the mean of squared deviations, themselves in [0, 1], so `bounded_mean` serves; for 0/1 data the
    deviation is a function of the rate, and its bounds follow from Wilson's. No variance of such scores exceeds 1/4.
    """
    n = (~np.isnan(values)).sum(axis=1)
    mean = _divide(np.nansum(values, axis=1), n)
    deviations = (values - mean[:, None]) ** 2
    variance = _divide(np.nansum(deviations, axis=1), n - 1)
    variance = np.where(n > 1, variance, np.nan)
    inflated = deviations * np.where(n > 1, _divide(n, n - 1), 1)[:, None]
    general = bounded_mean(np.minimum(inflated, 1), confidence)
    low, high = np.sqrt(general.low), np.minimum(np.sqrt(general.high), 0.5)

    rate = bounded_mean(values, confidence)
    ends = np.sqrt(np.stack([rate.low * (1 - rate.low), rate.high * (1 - rate.high)]))
    straddles = (rate.low < 0.5) & (rate.high > 0.5)
    coin = rate.method == WILSON
    low = np.where(coin, ends.min(axis=0), low)
    high = np.where(coin, np.where(straddles, 0.5, ends.max(axis=0)), high)

    std = np.sqrt(variance)
    low, high = np.minimum(low, std), np.maximum(high, std)
    return Interval(std, np.where(n > 1, low, np.nan), np.where(n > 1, high, np.nan), n, rate.method)


def mean(values: np.ndarray, confidence: float) -> Interval:
    """The mean of an unbounded measurement (bytes, entries): Student's t; no bounds from one value alone."""
    n = (~np.isnan(values)).sum(axis=1)
    estimate = _divide(np.nansum(values, axis=1), n)
    variance = _divide(np.nansum((values - estimate[:, None]) ** 2, axis=1), n - 1)
    half = stats.t.ppf((1 + confidence) / 2, np.maximum(n - 1, 1)) * np.sqrt(_divide(variance, n))
    half = np.where(n > 1, half, np.nan)
    return Interval(estimate, estimate - half, estimate + half, n, np.full(n.shape, STUDENT))


def geometric_mean(logs: np.ndarray, confidence: float) -> Interval:
    """The geometric mean of positive ratios from their logarithms ``[cells, n]``: Student's t on the logarithms."""
    found = mean(logs, confidence)
    method = np.full(found.n.shape, f"{STUDENT} of the log ratio")
    return Interval(np.exp(found.estimate), np.exp(found.low), np.exp(found.high), found.n, method)


@lru_cache(maxsize=4096)
def _ranks(n: int, q: float, confidence: float) -> tuple[int | None, int | None]:
    """Ranks (from 0) of the order statistics that enclose the ``q`` quantile; None where n is too small for one."""
    interval = stats.quantile_test(np.arange(n), p=q).confidence_interval(confidence)
    return tuple(None if np.isnan(end) else int(end) for end in (interval.low, interval.high))


def percentile(values: np.ndarray, q: float, confidence: float) -> Interval:
    """A quantile, between two order statistics: exact for every continuous distribution, open where n is too small."""
    n = (~np.isnan(values)).sum(axis=1)
    estimate, low, high = (np.full(len(values), np.nan) for _ in range(3))
    method = np.full(len(values), ORDER, dtype=object)
    ordered = np.sort(values, axis=1)  # NaN last
    for i, count in enumerate(n.tolist()):
        if not count:
            continue
        sample = ordered[i, :count]
        estimate[i] = np.quantile(sample, q)
        below, above = _ranks(count, q, confidence)
        if below is not None:
            low[i] = sample[below]
        if above is not None:
            high[i] = sample[above]
        if below is None or above is None:
            method[i] = f"{ORDER}; n is too small for {'any bound' if below is above is None else 'both bounds'}"
    return Interval(estimate, low, high, n, method)


def ratio(numerator: np.ndarray, denominator: np.ndarray, confidence: float) -> Interval:
    """Mean of one score over the mean of another on the same examples, both in [0, 1]: Fieller's interval.

    The pairs (1, 0) and (0, 1) are added for the bounds (not for the estimate), as Bonett and Price (2012) do for
    paired proportions: without them twenty equal pairs would claim a ratio of exactly 1. Fieller (1954): all rho for
    which the mean of ``numerator - rho * denominator`` may be 0. The upper bound is NaN where the denominator may be 0.
    """
    missing = np.isnan(numerator) | np.isnan(denominator)
    x, y = np.where(missing, 0, numerator), np.where(missing, 0, denominator)
    n = (~missing).sum(axis=1)
    estimate = _divide(x.sum(axis=1), y.sum(axis=1))

    m = n + 2
    mean_x, mean_y = (x.sum(axis=1) + 1) / m, (y.sum(axis=1) + 1) / m
    var_x = (((x**2).sum(axis=1) + 1) / m - mean_x**2) / (m - 1)
    var_y = (((y**2).sum(axis=1) + 1) / m - mean_y**2) / (m - 1)
    cov = ((x * y).sum(axis=1) / m - mean_x * mean_y) / (m - 1)
    t2 = stats.t.ppf((1 + confidence) / 2, m - 1) ** 2
    a, b, c = mean_y**2 - t2 * var_y, mean_x * mean_y - t2 * cov, mean_x**2 - t2 * var_x
    bounded = a > 0
    root = np.sqrt(np.maximum(b**2 - a * c, 0))
    low = np.where(bounded, np.maximum(_divide(b - root, a), 0), 0.0)
    high = np.where(bounded, _divide(b + root, a), np.nan)
    known = np.isfinite(estimate)
    low, high = np.fmin(low, estimate), np.where(bounded, np.fmax(high, estimate), np.nan)
    return Interval(estimate, np.where(known, low, np.nan), np.where(known, high, np.nan), n, np.full(n.shape, FIELLER))


def sign_flip_p(differences: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Two-sided p-values [cells] of the paired permutation test that the mean difference is 0 (Fisher 1935).

    The same as `scipy.stats.permutation_test(permutation_type="samples")`, cell by cell, with one set of sign flips
    shared by all cells of the same n. All 2^n flips where they are fewer than ``resamples``.
    """
    n = (~np.isnan(differences)).sum(axis=1)
    p = np.ones(len(differences))
    for count in np.unique(n[n > 0]).tolist():
        cells = np.flatnonzero(n == count)
        compact = np.stack([differences[i][~np.isnan(differences[i])] for i in cells])
        exact = 2**count <= resamples
        if exact:
            signs = 1.0 - 2.0 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
        else:
            signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(resamples, count))
        for start in range(0, len(cells), 256):
            part = compact[start : start + 256]
            observed = np.abs(part.sum(axis=1))
            extreme = (np.abs(signs @ part.T) >= observed - 1e-9).sum(axis=0)
            chunk = extreme / len(signs) if exact else (extreme + 1) / (resamples + 1)
            p[cells[start : start + 256]] = chunk
    return p
