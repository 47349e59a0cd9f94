"""Inference for comparisons on the same examples: interval and p-value come from the same test.

The test is Student's t after one more pair that contradicts the claim is added. For the claim that the policy is
better, or keeps enough, the policy loses that pair completely; for the claim that it is worse, it gains the pair
completely. Without such a pair, equal answers (with spread 0) would prove that the policies never differ. The interval
contains the values that the test does not reject. So it excludes 0 exactly if p < 1 - confidence, and the interval of a
ratio excludes 1 exactly if that of the difference excludes 0. Coverage and size are in docs/statistics.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import special

from kv_transition.stats.clusters import divide, moments, sums
from kv_transition.stats.intervals import CLUSTERED, Interval

METHOD = "Student t with one more pair lost (lower end) or gained (upper end)"
FIELLER = "Fieller with one more pair lost (lower end) or gained (upper end)"


@dataclass(frozen=True)
class Paired:
    """Mean differences [cells] and the test of them; see `difference`.

    ``sd`` [cells]: standard deviation of a cluster's sum divided by the mean cluster size, or of single differences.
    ``lost`` and ``gained``: mean and standard error [cells] after the additional pair. ``degrees`` [cells]: degrees of
    freedom. ``ends``: the smallest and the largest mean.
    """

    estimate: np.ndarray
    n: np.ndarray
    clusters: np.ndarray
    method: np.ndarray
    sd: np.ndarray
    lost: tuple[np.ndarray, np.ndarray]
    gained: tuple[np.ndarray, np.ndarray]
    degrees: np.ndarray
    ends: tuple[float, float] = (-np.inf, np.inf)

    @property
    def p_above(self) -> np.ndarray:
        """Return one-sided p-values [cells] of the hypothesis that the mean is not above 0."""
        return self._p(*self.lost)

    @property
    def p_below(self) -> np.ndarray:
        """Return one-sided p-values [cells] of the hypothesis that the mean is not below 0."""
        mean, error = self.gained
        return self._p(-mean, error)

    @property
    def p(self) -> np.ndarray:
        """Return two-sided p-values [cells] of the hypothesis that the mean is 0; NaN if there is no pair."""
        return np.minimum(1, 2 * np.minimum(self.p_above, self.p_below))

    def interval(self, confidence: float | np.ndarray) -> Interval:
        """Return the interval of each cell; ``confidence`` may differ between the cells [cells]."""
        t = special.stdtrit(self.degrees, (1 + np.asarray(confidence)) / 2)
        low = np.maximum(self.lost[0] - t * self.lost[1], self.ends[0])
        high = np.minimum(self.gained[0] + t * self.gained[1], self.ends[1])
        low, high = np.fmin(low, self.estimate), np.fmax(high, self.estimate)
        known = self.n > 0
        low, high = np.where(known, low, np.nan), np.where(known, high, np.nan)
        return Interval(self.estimate, low, high, self.n, self.method, self.clusters)

    def decides(self, level: float) -> int | None:
        """Return about how many examples would show the sign of the first cell's mean at a one-sided ``level``; None if
        too many.
        """
        sign, n, clusters = float(np.sign(self.estimate[0])), int(self.n[0]), int(self.clusters[0])
        against = self.ends[0] if sign > 0 else -self.ends[1]
        found = examples(sign * float(self.estimate[0]), float(self.sd[0]), against, level)
        return None if found is None else round(found * n / clusters)

    def one(self, i: int) -> Paired:
        """Return cell ``i`` alone."""
        part = slice(i, i + 1)
        arrays = (self.estimate[part], self.n[part], self.clusters[part], self.method[part], self.sd[part])
        lost, gained = ((mean[part], error[part]) for mean, error in (self.lost, self.gained))
        return Paired(*arrays, lost, gained, self.degrees[part], self.ends)

    def _p(self, mean: np.ndarray, error: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.where(error > 0, mean / error, np.where(mean == 0, 0, np.sign(mean) * np.inf))
        return np.where(self.n > 0, special.stdtr(self.degrees, -t), np.nan)


def difference(values: np.ndarray, clusters: np.ndarray | None = None, ends: tuple[float, float] = (-1, 1)) -> Paired:
    """Return the mean of paired differences ``values [cells, n]`` with its test; NaN for a missing pair.

    ``ends``: the difference of a pair that is lost completely, and of one that is gained completely. ``clusters``:
    codes of shared documents, of the same shape; the additional pair is then a document of mean size, and the variance
    is that between documents.
    """
    count, total = sums(values, clusters)
    n, present = count.sum(axis=1), (count > 0).sum(axis=1)
    size = mean_size(count)
    lost, gained = (with_one_more(count, total, end * size) for end in ends)
    method = np.where(moments(values, clusters).single, METHOD, METHOD + CLUSTERED).astype(object)
    mean = divide(total.sum(axis=1), n)
    squares = np.where(count > 0, (total - count * mean[:, None]) ** 2, 0).sum(axis=1)
    sd = np.sqrt(divide(squares, np.maximum(present - 1, 1))) / size[:, 0]
    # one fewer than the number of values, the additional pair included
    degrees = np.maximum(present, 1)
    return Paired(mean, n.astype(int), present, method, sd, lost, gained, degrees, ends)


def mean_size(count: np.ndarray) -> np.ndarray:
    """Return the mean size of the cluster of an example, as a column [cells, 1]; 1 if there is no example."""
    n = count.sum(axis=1)
    return np.where(n > 0, divide((count**2).sum(axis=1), n), 1)[:, None]


def with_one_more(count: np.ndarray, total: np.ndarray, sum_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard error [cells] of examples in clusters after one more cluster, which is of mean size.

    ``count`` and ``total``: number and sum of the examples of each cluster [cells, clusters]; ``sum_of``: the sum of
    the additional one [cells, 1].
    """
    present = (count > 0).sum(axis=1)
    count, total = np.hstack([count, mean_size(count)]), np.hstack([total, sum_of])
    n = count.sum(axis=1)
    mean = total.sum(axis=1) / n
    squares = ((total - count * mean[:, None]) ** 2).sum(axis=1)
    return mean, np.sqrt(divide(squares * (present + 1), n**2 * present))


POWER = 0.8
_SIZES = np.unique(np.geomspace(2, 100_000, 800).astype(int))


@lru_cache(maxsize=4096)
def _quantiles(level: float) -> np.ndarray:
    return -special.stdtrit(_SIZES, level)


def examples(mean: float, sd: float, against: float, level: float, power: float = POWER) -> int | None:
    """Return about how many pairs would show that the mean is above 0 if ``mean`` and ``sd`` were the true values.

    The power of the one-sided test at ``level`` is computed with the normal approximation. ``against``: the difference
    of the additional pair, below 0. None if more than 100,000 pairs are needed, or if the mean is not above 0.
    """
    if not mean > 0:
        return None
    n = _SIZES
    squares = n * sd**2 + n / (n + 1) * (mean - against) ** 2
    error = np.sqrt(squares / (n * (n + 1)))
    reached = (n * mean + against) / (n + 1) - _quantiles(level) * error > special.ndtri(power) * sd / np.sqrt(n)
    return int(n[reached.argmax()]) if reached.any() else None


def ratio(
    numerator: np.ndarray, denominator: np.ndarray, confidence: float, clusters: np.ndarray | None = None
) -> Interval:
    """Return the mean of one score divided by the mean of another on the same examples, both in [0, 1] ``[cells, n]``.

    Interval of Fieller (1954): all rho for which this module's test does not reject that the mean of ``numerator - rho
    * denominator`` is 0. The pair that is lost is (0, 1), the pair that is gained (1, 0). The upper bound is NaN if the
    test does not exclude a denominator of 0.
    """
    missing = np.isnan(numerator) | np.isnan(denominator)
    count, x = sums(np.where(missing, np.nan, numerator), clusters)
    y = sums(np.where(missing, np.nan, denominator), clusters)[1]
    n, present = count.sum(axis=1).astype(int), (count > 0).sum(axis=1)
    estimate, size = divide(x.sum(axis=1), y.sum(axis=1)), mean_size(count)
    t2 = special.stdtrit(np.maximum(present, 1), (1 + confidence) / 2) ** 2
    low = _bounds(count, x, y, size, (0 * size, size), present, t2)[0]
    high = _bounds(count, x, y, size, (size, 0 * size), present, t2)[1]
    known = np.isfinite(estimate)
    low = np.where(known, np.fmin(np.fmax(low, 0), estimate), np.nan)
    high = np.where(known & ~np.isnan(high), np.fmax(high, estimate), np.nan)
    single = moments(np.where(missing, np.nan, numerator), clusters).single
    method = np.where(single, FIELLER, FIELLER + CLUSTERED).astype(object)
    return Interval(estimate, low, high, n, method, present)


def _bounds(
    count: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    size: np.ndarray,
    pair: tuple[np.ndarray, np.ndarray],
    present: np.ndarray,
    t2: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the range of rho with ``(mean of x - rho y)^2 <= t2 * its variance`` after one more pair; NaN for no upper
    end.

    The condition is quadratic in rho: a rho^2 - 2 b rho + c <= 0. If a <= 0, the test does not exclude a denominator of
    0.
    """
    x, y = np.hstack([x, pair[0]]), np.hstack([y, pair[1]])
    count = np.hstack([count, size])
    m, of = count.sum(axis=1), present + 1
    mean_x, mean_y = x.sum(axis=1) / m, y.sum(axis=1) / m
    off_x, off_y = x - count * mean_x[:, None], y - count * mean_y[:, None]
    scale = of / (np.maximum(of - 1, 1) * m**2)
    var_x, var_y = scale * (off_x**2).sum(axis=1), scale * (off_y**2).sum(axis=1)
    cov = scale * (off_x * off_y).sum(axis=1)
    a, b, c = mean_y**2 - t2 * var_y, mean_x * mean_y - t2 * cov, mean_x**2 - t2 * var_x
    root = np.sqrt(np.maximum(b**2 - a * c, 0))
    # c / (b + root) equals (b - root) / a and is finite for a = 0. Below it the numerator is significantly larger.
    low = np.where(c > 0, divide(c, b + root), 0.0)
    upper = divide(b + root, a)
    # With a < 0 the numerator can be significantly smaller for some rho; it is then so for all larger rho.
    bounded = (a > 0) | ((a < 0) & (b**2 >= a * c) & (mean_x - upper * mean_y < 0) & (upper > 0))
    return low, np.where(bounded, upper, np.nan)
