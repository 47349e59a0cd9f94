"""The evidence that a policy is unstable or has collapsed at one point, for the sample and its bootstrap samples.

A point is a length bin at one budget, or a budget in one length bin. It is unstable if (a) it has more failures than
the full cache on the same examples, (b) it has more variance over repeats of one example than the full cache, or (c)
its dispersion between examples exceeds the dispersion that the mean implies. docs/statistics.md describes the tests and
their false alarm rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import special

from kv_transition import labels
from kv_transition.stats import intervals
from kv_transition.stats.clusters import Moments, divide, resample_sums
from kv_transition.stats.multiplicity import holm

CRITERIA = ("failures", "repeats", "dispersion")
COLLAPSED = 0.5  # share of the full cache's mean below which a mean has collapsed
# Range of the full cache's mean in which its spread is informative about the spread at another mean.
INFORMATIVE = (0.1, 0.9)


@dataclass(frozen=True)
class Point:
    """One policy at one budget in one bin: arrays [examples] of policy and full cache on the same examples.

    ``bin``: the length bin. ``tokens``: the range of the bin. ``budget``: as in paths. The variances over repeats are
    NaN for a single answer. ``clusters``: codes of shared documents, or None if each example has its own document.
    """

    bin: int
    tokens: tuple[int, int]
    score: np.ndarray
    failed: np.ndarray
    full_score: np.ndarray
    full_failed: np.ndarray
    score_var: np.ndarray
    full_score_var: np.ndarray
    budget: str = "r1"
    clusters: np.ndarray | None = None

    @property
    def n(self) -> int:
        return len(self.score)

    @cached_property
    def sums(self) -> np.ndarray:
        """Return the sums over the examples of each cluster, ``[clusters, columns]`` (see `_COLUMNS`), which are
        resampled.
        """
        codes = np.arange(self.n) if self.clusters is None else np.unique(self.clusters, return_inverse=True)[1]
        count = int(codes.max(initial=-1)) + 1

        def of(values: np.ndarray) -> np.ndarray:
            return np.bincount(codes, weights=np.nan_to_num(values), minlength=count)

        n, total = of(np.ones(self.n)), of(self.score)
        repeated = ~np.isnan(self.score_var) & ~np.isnan(self.full_score_var)
        failures = of(self.failed) - of(self.full_failed)
        variances = of(np.where(repeated, self.score_var - self.full_score_var, 0))
        columns = {
            "n": n,
            "total": total,
            "squares": total**2,
            "cross": total * n,
            "sizes": n**2,
            "score2": of(self.score**2),
            "graded": of(~np.isin(self.score, (0, 1))),
            "full": of(self.full_score),
            "full2": of(self.full_score**2),
            "failed_more": failures > 1e-12,
            "failed_less": failures < -1e-12,
            "varied_more": variances > 1e-12,
            "varied_less": variances < -1e-12,
            "repeated": of(repeated),
        }
        return np.stack([np.asarray(columns[name], dtype=float) for name in _COLUMNS], axis=1)

    @property
    def count(self) -> int:
        """Return the number of clusters."""
        return len(self.sums)

    @property
    def label(self) -> str:
        """Return ``n = 20``, with the number of documents if several examples belong to one document."""
        return labels.count(self.n, self.count)


_COLUMNS = (
    *("n", "total", "squares", "cross", "sizes", "score2", "graded", "full", "full2"),
    *("failed_more", "failed_less", "varied_more", "varied_less", "repeated"),
)


@dataclass(frozen=True)
class Resampled:
    """A point in the sample and in its bootstrap samples, the sample first: arrays [samples + 1].

    ``low``, ``high``: interval of the mean. ``p``: one-sided p-values [samples + 1, 2] of more failures and of more
    variance over repeats than with the full cache, NaN without repeats. ``spread``, ``full_spread``: variance divided
    by the largest that the mean allows. ``graded``: whether the sample has scores other than 0 and 1. ``clusters``:
    effective number.
    """

    n: np.ndarray
    low: np.ndarray
    high: np.ndarray
    full_mean: np.ndarray
    p: np.ndarray
    spread: np.ndarray
    full_spread: np.ndarray
    graded: bool
    clusters: float


def resampled(points: Sequence[Point], samples: int, seed: int, confidence: float) -> list[Resampled]:
    """Return every point in the sample and in bootstrap samples.

    Clusters are drawn with replacement within each bin. Points of one bin with the same number of clusters share their
    draws, so that policies and budgets stay paired and the draws are made only once.
    """
    out: list[Resampled | None] = [None] * len(points)
    together: dict[tuple[int, int], list[int]] = {}
    for i, point in enumerate(points):
        together.setdefault((point.bin, point.count), []).append(i)
    for (bin, _), members in together.items():
        stacked = resample_sums(np.hstack([points[i].sums for i in members]), samples, seed + bin)
        for i, part in zip(members, np.split(stacked, len(members), axis=1), strict=True):
            out[i] = _resampled(dict(zip(_COLUMNS, np.ascontiguousarray(part.T), strict=True)), confidence)
    return out


def _resampled(column: dict[str, np.ndarray], confidence: float) -> Resampled:
    """Return a point from its column sums [samples + 1]."""
    of = Moments(*(column[name] for name in ("n", "total", "squares", "cross", "sizes")))
    low, high = intervals.bounded_mean_from_moments(of, column["graded"] == 0, confidence)
    p = np.full((len(of.n), 2), np.nan)
    p[:, 0] = sign_test_p(column["failed_more"], column["failed_less"])
    if column["repeated"][0] > 0:
        p[:, 1] = sign_test_p(column["varied_more"], column["varied_less"])
    spread = _phi(of.total, column["score2"], of.n)
    full_spread = np.nan_to_num(_phi(column["full"], column["full2"], of.n))
    graded, clusters = bool(column["graded"][0] > 0), float(of.effective[0])
    return Resampled(of.n, low, high, column["full"] / of.n, p, spread, full_spread, graded, clusters)


@dataclass(frozen=True)
class Evidence:
    """The evidence at points, for the sample (arrays [points]) or its bootstrap samples ([samples, points])."""

    low: np.ndarray
    high: np.ndarray
    full_mean: np.ndarray
    p: np.ndarray  # [..., points, criteria], NaN where a criterion does not apply

    @property
    def collapsed(self) -> np.ndarray:
        return self.high < COLLAPSED * self.full_mean


def evidence(points: Sequence[Resampled], one_full: bool) -> tuple[Evidence, Evidence]:
    """Return the evidence of the sample and of its bootstrap samples, from `resampled`.

    ``one_full``: all points share the full cache's examples (budgets within a bin), so these count only once.
    """
    names = ("n", "low", "high", "full_mean", "spread", "full_spread")
    n, low, high, full_mean, spread, full_spread = (
        np.stack([getattr(of, name) for of in points], axis=1) for name in names
    )
    p = np.full((*n.shape, len(CRITERIA)), np.nan)
    p[..., :2] = np.stack([of.p for of in points], axis=1)
    informative = (full_mean[0] >= INFORMATIVE[0]) & (full_mean[0] <= INFORMATIVE[1])
    if informative.any() and any(of.graded for of in points):
        weight = np.where(informative, n, 0) / (informative.sum() if one_full else 1)
        clusters = np.array([of.clusters for of in points])
        p[..., 2] = _dispersion_p(spread, (full_spread * weight).sum(axis=1), weight.sum(axis=1), clusters)
    return Evidence(low[0], high[0], full_mean[0], p[0]), Evidence(low[1:], high[1:], full_mean[1:], p[1:])


def sign_test_p(more: np.ndarray, less: np.ndarray) -> np.ndarray:
    """Return the p-value of a one-sided exact sign test of ``more`` or more (McNemar 1947)."""
    return special.bdtrc(np.asarray(more) - 1, np.asarray(more + less, dtype=np.int64), 0.5)


def _phi(total: np.ndarray, squares: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Return the variance divided by the largest variance that the mean allows."""
    mean = total / n
    most = mean * (1 - mean)
    return divide(squares / n - mean**2, np.where(most > 1e-12, most, 0))


def _dispersion_p(phi: np.ndarray, full_spread: np.ndarray, full_n: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Return one-sided p-values [samples + 1, points] of the hypothesis that phi does not exceed the full cache's.

    The statistic is the log ratio divided by its bootstrap error. The full cache's phi is computed over all its
    informative points together, with the prior observations at the maximum added as for intervals, which keeps the test
    conservative.
    """
    prior = intervals.PRIOR_OBSERVATIONS
    reference = np.minimum((full_spread + prior) / (full_n + prior), 1)
    excess = np.log(np.where(phi > 0, phi, np.nan)) - np.log(reference)[:, None]
    error = np.array([np.nanstd(point) if np.isfinite(point).sum() > 1 else np.nan for point in excess[1:].T])
    z = np.divide(excess, error, out=np.full(excess.shape, np.nan), where=error > 1e-9)
    return special.stdtr(np.maximum(clusters - 1, 1), -z)


def unstable(p: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Return which points are significantly unstable [samples, points], and the Holm-adjusted p-values."""
    applies = ~np.isnan(p)
    flat = np.where(applies, p, 1.0).reshape(len(p), -1)
    adjusted = holm(flat, applies.reshape(len(p), -1).sum(axis=1)).reshape(p.shape)
    adjusted = np.where(applies, adjusted, np.nan)
    return (np.where(applies, adjusted, 1.0) < 1 - confidence).any(axis=-1), adjusted
