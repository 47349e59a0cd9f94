"""Confidence intervals with good coverage at n = 5 to 20, vectorised over cells.

Every function takes ``values [cells, n]`` with NaN where an example is missing, optionally the codes ``clusters`` of
the same shape where examples share documents, and returns an `Interval` with one entry a cell. A bound that the data
cannot give is NaN (null in the tables), never a guess. Why these methods, and how often they cover the truth:
docs/statistics.md. What is compared on the same examples has a module of its own, `stats.paired`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from kv_transition.stats.clusters import Moments, divide, moments, number, sums

WILSON = "Wilson"
WILSON_EFFECTIVE = "Wilson at the effective n"
WILSON_STD = "from Wilson's bounds of the rate"
BAYES = "Bayesian bootstrap with half an observation at each end"
STUDENT = "Student t"
ORDER = "order statistics"
CLUSTERED = ", clusters"

# Observations of the largest possible variance that are mixed into an estimate of dispersion: at n = 5 a sample
# often shows none of the spread that the population has.
PRIOR_OBSERVATIONS = 2
# Observations at 0 and at 1 each that the bootstrap of a spread believes in beforehand (Jeffreys' for a coin).
PRIOR_AT_END = 0.5


@dataclass(frozen=True)
class Interval:
    """``estimate``, ``low``, ``high`` [cells] float, ``n`` and ``clusters`` [cells] int, ``method`` [cells] text.

    ``n`` counts examples; ``clusters`` the documents that they come from, as many where each has its own.
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
    """Return the method's name [cells], which says if clusters were used."""
    named = np.broadcast_to(np.asarray(name, dtype=object), of.single.shape)
    return np.where(of.single, named, named + CLUSTERED)


def bounded_mean(
    values: np.ndarray,
    confidence: float,
    bounds: tuple[float, float] = (0.0, 1.0),
    clusters: np.ndarray | None = None,
) -> Interval:
    """Return the mean of scores in ``bounds``: rates, F1, and paired differences (``bounds=(-1, 1)``).

    A score in [0, 1] with mean m has at most the variance m(1 - m) of a coin. phi is the share of it that the sample
    shows (mixed with `PRIOR_OBSERVATIONS` at the maximum), so n / phi is the equivalent number of coin flips; Wilson's
    interval is taken at that n, shrunk by (z / t)^2 because phi is estimated (Korn and Graubard 1998; Franco et al.
    2019, who do so for surveys). Data of only 0 and 1 have phi = 1: plain Wilson. With clusters, phi is the variance
    between them over that of a coin, above 1 if examples of one document are alike.

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
    """Return the values moved to [0, 1], and which cells [cells] have only 0 and 1."""
    low, high = bounds
    unit = (values - low) / (high - low)
    if np.nanmin(unit, initial=0) < -1e-12 or np.nanmax(unit, initial=1) > 1 + 1e-12:
        raise ValueError(f"a value lies outside of {bounds}")
    return np.clip(unit, 0, 1), np.all((unit == 0) | (unit == 1) | np.isnan(unit), axis=1)


def relative_variance(of: Moments, coin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """phi of `bounded_mean` and its degrees of freedom: the variance of the mean is phi m(1 - m) / n.

    phi is at most the mean cluster size sum n_c^2 / n (all examples of a cluster equal), and at least 1 for coins. The
    prior observations are clusters of that size, so that copies of examples change nothing.
    Where the mean is 0 or 1 the sample says nothing about clusters, and the most is assumed.
    """
    most, largest = of.mean * (1 - of.mean), divide(of.sizes, of.n)
    free = of.n - largest
    shown = divide(of.spread, most)
    phi = (shown + PRIOR_OBSERVATIONS * largest**2) / (free + PRIOR_OBSERVATIONS * largest)
    phi = np.where(coin, np.where(of.single, 1, np.maximum(phi, 1)), phi)
    phi = np.minimum(np.where(most > 0, phi, largest), largest)
    return phi, of.effective - 1 + PRIOR_OBSERVATIONS


def bounded_mean_from_moments(of: Moments, coin: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of `bounded_mean` from the moments of scores in [0, 1]; ``coin``: only 0 and 1. Any shape."""
    phi, degrees = relative_variance(of, coin)
    alpha = 1 - confidence
    z = stats.norm.ppf(1 - alpha / 2)
    measured = np.asarray(of.n) > 0
    distinct, inverse = np.unique(np.where(measured, degrees, 1), return_inverse=True)
    t = stats.t.ppf(1 - alpha / 2, distinct)[inverse].reshape(measured.shape)
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

    For 0/1 data it is a function of the rate, and its bounds follow from Wilson's. Otherwise the Bayesian bootstrap
    (Rubin 1981) with half an observation at 0 and half at 1, which represent the rare values that a small sample does
    not show; weights are drawn for whole clusters. No such standard deviation exceeds 1/2.
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
    weight = rng.exponential(size=(count.shape[1], resamples))  # rows by cluster: padding does not change the draws
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
    """Return the mean of an unbounded measurement (bytes, entries): Student's t; no bounds from one value.

    With clusters: the cluster-robust variance with C - 1 degrees of freedom, as in statsmodels' regression on a
    constant.
    """
    of, count = moments(values, clusters), number(values, clusters)
    # Around the mean, not around 0: bytes are large, and their differences small.
    middle = of.mean
    around = moments(values - middle[:, None], clusters).squares
    variance = divide(around * count, np.square(of.n, dtype=float) * (count - 1))
    half = stats.t.ppf((1 + confidence) / 2, np.maximum(count - 1, 1)) * np.sqrt(variance)
    half = np.where(count > 1, half, np.nan)
    return Interval(middle, middle - half, middle + half, of.n, _named(STUDENT, of), count)


def geometric_mean(logs: np.ndarray, confidence: float, clusters: np.ndarray | None = None) -> Interval:
    """Return the geometric mean of positive ratios from their logarithms ``[cells, n]``: Student's t on the
    logarithms.
    """
    found = mean(logs, confidence, clusters)
    method = np.array([str(m).replace(STUDENT, f"{STUDENT} of the log ratio") for m in found.method], dtype=object)
    return Interval(np.exp(found.estimate), np.exp(found.low), np.exp(found.high), found.n, method, found.clusters)


@lru_cache(maxsize=4096)
def _ranks(n: int, q: float, confidence: float) -> tuple[int | None, int | None]:
    """Return the ranks (from 0) of the order statistics around the ``q`` quantile; None if n is too small for one."""
    interval = stats.quantile_test(np.arange(n), p=q).confidence_interval(confidence)
    return tuple(None if np.isnan(end) else int(end) for end in (interval.low, interval.high))


def percentile(values: np.ndarray, q: float, confidence: float, clusters: np.ndarray | None = None) -> Interval:
    """A quantile, between two order statistics: exact for every continuous distribution, open where n is too small.

    With clusters the ranks are those of as many values as there are effective clusters, spread over the sample: right
    where a document's answers are all equal, conservative where they are not.
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
