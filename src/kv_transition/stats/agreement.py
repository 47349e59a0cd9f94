"""Agreement of two raters: Cohen's kappa of yes-or-no verdicts, with conversations as clusters."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats
from statsmodels.stats.inter_rater import cohens_kappa

from kv_transition.stats.intervals import finite

METHOD = "cluster-robust delta method with one verdict of each kind"
UNDEFINED = "not defined: one of the two never changes its verdict"


def counts(first: np.ndarray, second: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Return how often both said yes, only the first, only the second, or neither: [clusters, 4] from verdicts [n] of 0
    or 1.
    """
    _, codes = np.unique(clusters, return_inverse=True)
    kind = 2 * (1 - first.astype(int)) + (1 - second.astype(int))
    size = int(codes.max(initial=-1)) + 1
    return np.bincount(codes * 4 + kind, minlength=4 * size).reshape(size, 4)


def kappa(first: np.ndarray, second: np.ndarray, clusters: np.ndarray, confidence: float) -> dict[str, Any]:
    """Return Cohen's kappa (1960) as the columns of a table; null if a rater always gives the same verdict.

    The bounds are kappa -+ t standard errors, computed after one verdict of each of the four kinds is added, each as a
    cluster of its own; without these, perfect agreement would have an interval of length 0. The standard error is that
    of the linearised kappa (Fleiss, Cohen and Everitt 1969) from sums over clusters.
    """
    table = counts(first, second, clusters)
    n, held = len(first), int(table.shape[0])
    row = {"estimate": None, "ci_low": None, "ci_high": None, "n": n, "clusters": held, "method": UNDEFINED}
    if not n or 0 in (first.var(), second.var()):
        return row
    estimate = cohens_kappa(table.sum(axis=0).reshape(2, 2)).kappa
    middle, error = linearised(np.vstack([table, np.eye(4)]))
    half = stats.t.ppf((1 + confidence) / 2, held + 3) * error
    low, high = max(min(middle - half, estimate), -1), min(max(middle + half, estimate), 1)
    return row | {"estimate": finite(estimate), "ci_low": low, "ci_high": high, "method": METHOD}


def linearised(table: np.ndarray) -> tuple[float, float]:
    """Return kappa and its standard error from the counts of each cluster [clusters, 4]."""
    n, clusters = table.sum(), len(table)
    p = table.sum(axis=0).reshape(2, 2) / n
    rows, columns = p.sum(axis=1), p.sum(axis=0)
    observed, expected = np.trace(p), rows @ columns
    # derivative of kappa by the share of each kind of verdict
    gain = np.eye(2) / (1 - expected) - (1 - observed) * (columns[:, None] + rows[None]) / (1 - expected) ** 2
    gain -= (gain * p).sum()
    variance = clusters / (clusters - 1) * ((table @ gain.ravel()) ** 2).sum() / n**2
    return float((observed - expected) / (1 - expected)), float(np.sqrt(variance))
