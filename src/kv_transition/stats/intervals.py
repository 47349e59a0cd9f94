"""Confidence intervals with good coverage at n = 5 to 20, vectorised over cells.

Every function takes ``values [cells, n]`` with NaN for missing examples, and optionally the codes ``clusters`` of the
same shape if examples share documents. It returns an `Interval` with one entry per cell. A bound that the data cannot
determine is NaN (null in the tables). docs/statistics.md explains the choice of methods and their measured coverage.
Comparisons on the same examples are in a module of their own, `stats.paired`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import special, stats
from statsmodels.stats.proportion import proportion_confint

from kv_transition.stats.clusters import Moments, divide, moments, number, sums

WILSON = "Wilson"
WILSON_EFFECTIVE = "Wilson at the effective n"
WILSON_STD = "from Wilson's bounds of the rate"
BAYES = "Bayesian bootstrap with half an observation at each end"
STUDENT = "Student t"
ORDER = "order statistics"
CLUSTERED = ", clusters"

# Number of observations with the largest possible variance that are added to an estimate of dispersion, because a
# sample of n = 5 often shows none of the spread of the population.
PRIOR_OBSERVATIONS = 2
# Number of prior observations at 0, and at 1, for the bootstrap of a standard deviation (Jeffreys' prior for a coin).
PRIOR_AT_END = 0.5


@dataclass(frozen=True)
class Interval:
    """Estimates with intervals: ``estimate``, ``low``, ``high`` [cells] float, ``n``, ``clusters`` [cells] int,
    ``method`` text.

    ``n``: number of examples. ``clusters``: number of their documents; equal to n if each example has its own document.
    """

    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n: np.ndarray
    method: np.ndarray
    clusters: np.ndarray | None = None

    def row(self, i: int) -> dict[str, float | int | str | None]:
        """Return one cell as the columns of a table; NaN becomes None."""
        return {
            "estimate": finite(self.estimate[i]),
            "ci_low": finite(self.low[i]),
            "ci_high": finite(self.high[i]),
            "n": int(self.n[i]),
            "clusters": int((self.n if self.clusters is None else self.clusters)[i]),
            "method": str(self.method[i]),
        }


def finite(value: float) -> float | None:
    """Return None for NaN and infinity."""
    return float(value) if np.isfinite(value) else None


def _named(name: str | np.ndarray, of: Moments) -> np.ndarray:
    """Return the name of the method [cells], with a suffix if clusters were used."""
    named = np.broadcast_to(np.asarray(name, dtype=object), of.single.shape)
    return np.where(of.single, named, named + CLUSTERED)


def bounded_mean(
    values: np.ndarray,
    confidence: float,
    bounds: tuple[float, float] = (0.0, 1.0),
    clusters: np.ndarray | None = None,
) -> Interval:
    """Return the mean of scores in ``bounds``: rates, F1, and paired differences (``bounds=(-1, 1)``).

    The variance of a score in [0, 1] with mean m is at most that of a coin, m(1 - m). phi is the share of it that the
    sample shows (with `PRIOR_OBSERVATIONS` observations at the maximum added), so n / phi is the equivalent number of
    coin flips. The interval is Wilson's for that n, reduced by (z / t)^2 because phi is estimated (Korn and Graubard
    1998; Franco et al. 2019, for surveys). Scores of only 0 and 1 have phi = 1, which gives the plain Wilson interval.
    With clusters, phi is the variance between them divided by that of a coin; it exceeds 1 if the examples of a
    document are similar.

    Raises ValueError for a value outside of ``bounds``.
    """
    low, high = bounds
    unit, coin = _unit(values, bounds)
    of = moments(unit, clusters)
    lo, hi = bounded_mean_from_moments(of, coin, confidence)
    method = _named(np.where(coin, WILSON, WILSON_EFFECTIVE), of)
    width = high - low
    return Interval(low + of.mean * width, low + lo * width, low + hi * width, of.n, method, number(values, clusters))


def _unit(values: np.ndarray, bounds: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the values rescaled to [0, 1], and which cells [cells] contain only 0 and 1."""
    low, high = bounds
    unit = (values - low) / (high - low)
    if np.nanmin(unit, initial=0) < -1e-12 or np.nanmax(unit, initial=1) > 1 + 1e-12:
        raise ValueError(f"a value lies outside of {bounds}")
    return np.clip(unit, 0, 1), np.all((unit == 0) | (unit == 1) | np.isnan(unit), axis=1)


def relative_variance(of: Moments, coin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return phi of `bounded_mean` and its degrees of freedom: the variance of the mean is phi m(1 - m) / n.

    phi is at most the mean cluster size sum n_c^2 / n (all examples of a cluster equal), and at least 1 for coins. The
    prior observations are clusters of that size, so that duplicated examples do not change the result. If the mean is 0
    or 1, the sample contains no information about clusters, and the largest phi is assumed.
    """
    most, largest = of.mean * (1 - of.mean), divide(of.sizes, of.n)
    free = of.n - largest
    shown = divide(of.spread, most)
    phi = (shown + PRIOR_OBSERVATIONS * largest**2) / (free + PRIOR_OBSERVATIONS * largest)
    phi = np.where(coin, np.where(of.single, 1, np.maximum(phi, 1)), phi)
    phi = np.minimum(np.where(most > 0, phi, largest), largest)
    return phi, of.effective - 1 + PRIOR_OBSERVATIONS


def bounded_mean_from_moments(of: Moments, coin: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounds of `bounded_mean` from the moments of scores in [0, 1], of any shape; ``coin``: only 0 and 1
    occur.
    """
    phi, degrees = relative_variance(of, coin)
    alpha = 1 - confidence
    z = special.ndtri(1 - alpha / 2)
    measured = np.asarray(of.n) > 0
    distinct, inverse = np.unique(np.where(measured, degrees, 1), return_inverse=True)
    t = special.stdtrit(distinct, 1 - alpha / 2)[inverse].reshape(measured.shape)
    effective = divide(of.n, phi) * np.where(coin & of.single, 1, (z / t) ** 2)
    mean = of.mean
    lo, hi = proportion_confint(
        np.where(measured, mean * effective, 0), np.where(measured, effective, 1), alpha, "wilson"
    )
    lo, hi = np.clip(lo, 0, 1), np.clip(hi, 0, 1)
    lo, hi = np.minimum(lo, mean), np.maximum(hi, mean)
    return np.where(measured, lo, np.nan), np.where(measured, hi, np.nan)


def bounded_std(
    values: np.ndarray, confidence: float, clusters: np.ndarray | None = None, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Return the standard deviation (divisor n - 1) of scores in [0, 1].

    For scores of only 0 and 1 it is a function of the rate, and its bounds follow from Wilson's interval. Otherwise the
    bounds come from the Bayesian bootstrap (Rubin 1981) with half an observation at 0 and half at 1, which represent
    rare values that a small sample does not contain; weights are drawn for whole clusters. No standard deviation here
    exceeds 1/2.
    """
    rate = bounded_mean(values, confidence, clusters=clusters)
    n, deviations = rate.n, (values - rate.estimate[:, None]) ** 2
    std = np.sqrt(np.where(n > 1, divide(np.nansum(deviations, axis=1), n - 1), np.nan))
    ends = np.sqrt(np.stack([rate.low * (1 - rate.low), rate.high * (1 - rate.high)]))
    straddles = (rate.low < 0.5) & (rate.high > 0.5)
    coin = np.all((values == 0) | (values == 1) | np.isnan(values), axis=1)
    low, high = _bayesian_std(values, confidence, clusters, resamples, seed)
    low = np.where(coin, ends.min(axis=0), low)
    high = np.where(coin, np.where(straddles, 0.5, ends.max(axis=0)), high)
    low, high = np.fmin(low, std), np.fmax(np.fmin(high, 0.5), std)
    method = _named(np.where(coin, WILSON_STD, BAYES), moments(values, clusters))
    return Interval(std, np.where(n > 1, low, np.nan), np.where(n > 1, high, np.nan), n, method, rate.clusters)


def _bayesian_std(
    values: np.ndarray, confidence: float, clusters: np.ndarray | None, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    count, total = sums(values, clusters)
    squares = sums(values**2, clusters)[1]
    size = divide((count**2).sum(axis=1), count.sum(axis=1))
    rng = np.random.default_rng(seed)
    zero, one = rng.gamma(PRIOR_AT_END, size=(2, resamples))
    weight = rng.exponential(
        size=(count.shape[1], resamples)
    )  # one row per cluster, so that padding does not change the draws
    tails = (1 - confidence) / 2, (1 + confidence) / 2
    low, high = np.empty(len(values)), np.empty(len(values))
    step = max(1, 2_000_000 // resamples)
    for start in range(0, len(values), step):
        part = slice(start, start + step)
        prior = size[part, None]
        whole = count[part] @ weight + prior * (zero + one)
        mean = divide(total[part] @ weight + prior * one, whole)
        square = divide(squares[part] @ weight + prior * one, whole)
        low[part], high[part] = np.quantile(np.sqrt(np.maximum(square - mean**2, 0)), tails, axis=1)
    return low, high


def mean(values: np.ndarray, confidence: float, clusters: np.ndarray | None = None) -> Interval:
    """Return the mean of an unbounded measurement (bytes, entries) with Student's t interval; one value gives no
    bounds.

    With clusters, the variance is cluster-robust with C - 1 degrees of freedom, as in statsmodels' regression on a
    constant.
    """
    of, count = moments(values, clusters), number(values, clusters)
    # Sums of squares around the mean, not around 0, because bytes are large and their differences are small.
    middle = of.mean
    around = moments(values - middle[:, None], clusters).squares
    variance = divide(around * count, np.square(of.n, dtype=float) * (count - 1))
    half = special.stdtrit(np.maximum(count - 1, 1), (1 + confidence) / 2) * np.sqrt(variance)
    half = np.where(count > 1, half, np.nan)
    return Interval(middle, middle - half, middle + half, of.n, _named(STUDENT, of), count)


def geometric_mean(logs: np.ndarray, confidence: float, clusters: np.ndarray | None = None) -> Interval:
    """Return the geometric mean of positive ratios from their logarithms ``[cells, n]``, with Student's t on the
    logarithms.
    """
    found = mean(logs, confidence, clusters)
    method = np.array([str(m).replace(STUDENT, f"{STUDENT} of the log ratio") for m in found.method], dtype=object)
    return Interval(np.exp(found.estimate), np.exp(found.low), np.exp(found.high), found.n, method, found.clusters)


@lru_cache(maxsize=4096)
def _ranks(n: int, q: float, confidence: float) -> tuple[int | None, int | None]:
    """Return the ranks (from 0) of the order statistics that bound the ``q`` quantile; None if n is too small for a
    bound.
    """
    interval = stats.quantile_test(np.arange(n), p=q).confidence_interval(confidence)
    return tuple(None if np.isnan(end) else int(end) for end in (interval.low, interval.high))


def percentile(values: np.ndarray, q: float, confidence: float, clusters: np.ndarray | None = None) -> Interval:
    """Return a quantile with two order statistics as bounds; a bound is NaN if n is too small for it.

    The interval is exact for every continuous distribution. With clusters, the ranks are those of a sample of the
    effective number of clusters, spread over the values: exact if the answers of a document are all equal, conservative
    otherwise.
    """
    of = moments(values, clusters)
    n, ordered = of.n, np.sort(values, axis=1)  # NaN last
    estimate, low, high = (np.full(len(values), np.nan) for _ in range(3))
    method = _named(ORDER, of).astype(object)
    for i, count in enumerate(n.tolist()):
        if not count:
            continue
        sample = ordered[i, :count]
        estimate[i] = np.quantile(sample, q)
        independent = max(1, int(of.effective[i] + 1e-9))
        below, above = _ranks(independent, q, confidence)
        if below is not None:
            low[i] = min(sample[int((below + 0.5) * count / independent)], estimate[i])
        if above is not None:
            high[i] = max(sample[int((above + 0.5) * count / independent)], estimate[i])
        if below is None or above is None:
            method[i] += f"; n is too small for {'any bound' if below is above is None else 'both bounds'}"
    return Interval(estimate, low, high, n, method, number(values, clusters))
