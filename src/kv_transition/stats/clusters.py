"""Sums over clusters (examples that share a document), and the cluster bootstrap.

Every estimate uses sums over clusters, which are independent even if the examples within a cluster are not (Liang and
Zeger 1986). With one example per cluster the results are the usual formulas.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Number of draws in one block of bootstrap samples, small enough for the cache of a processor core.
BLOCK = 1 << 17


@dataclass(frozen=True)
class Moments:
    """Sums over clusters c of n_c examples with sum S_c, each [...]; they are linear, so bootstrap samples have them
    too.

    ``n`` = sum n_c, ``total`` = sum S_c, ``squares`` = sum S_c^2, ``cross`` = sum S_c n_c, ``sizes`` = sum n_c^2.
    """

    n: np.ndarray
    total: np.ndarray
    squares: np.ndarray
    cross: np.ndarray
    sizes: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        return divide(self.total, self.n)

    @property
    def spread(self) -> np.ndarray:
        """Return sum (S_c - n_c mean)^2: with one example per cluster, the sum of squared deviations."""
        mean = self.mean
        return np.maximum(self.squares - 2 * mean * self.cross + mean**2 * self.sizes, 0)

    @property
    def effective(self) -> np.ndarray:
        """Return the effective number of clusters (Kish 1965): n^2 / sum n_c^2."""
        return divide(np.square(self.n, dtype=float), self.sizes)

    @property
    def single(self) -> np.ndarray:
        """Return whether every example is a cluster of its own."""
        return np.asarray(self.sizes) <= np.asarray(self.n)


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a / b, NaN where b is 0."""
    return np.divide(a, b, out=np.full(np.broadcast(a, b).shape, np.nan), where=np.asarray(b) != 0)


def sums(values: np.ndarray, clusters: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of examples and the sum of ``values [cells, n]`` in each cluster: two arrays [cells, clusters].

    ``clusters``: codes 0, 1, ... of the same shape, or None if every example is a cluster of its own. NaN values are
    left out.
    """
    present = ~np.isnan(values)
    if clusters is None:
        return present.astype(float), np.where(present, values, 0.0)
    cells, columns = np.nonzero(present)
    codes = clusters[cells, columns].astype(np.int64)
    width = int(codes.max(initial=-1)) + 1
    flat, shape = cells * width + codes, (len(values), width)
    size = len(values) * width
    count = np.bincount(flat, minlength=size).reshape(shape).astype(float)
    return count, np.bincount(flat, weights=values[cells, columns], minlength=size).reshape(shape)


def moments(values: np.ndarray, clusters: np.ndarray | None = None) -> Moments:
    """Return the moments [cells] of values [cells, n]; NaN values are omitted."""
    count, total = sums(values, clusters)
    return Moments(
        count.sum(axis=1).astype(int),
        total.sum(axis=1),
        (total**2).sum(axis=1),
        (total * count).sum(axis=1),
        (count**2).sum(axis=1),
    )


def number(values: np.ndarray, clusters: np.ndarray | None) -> np.ndarray:
    """Return the number of clusters [cells] with a value."""
    return (sums(values, clusters)[0] > 0).sum(axis=1)


def resample_sums(columns: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Return column sums ``[samples + 1, k]`` of rows ``[clusters, k]`` drawn with replacement; row 0 sums all rows
    once.

    This is the cluster bootstrap (Davison and Hinkley 1997, 3.8): a drawn cluster contributes all of its examples. The
    draws depend only on the seed and the number of rows, so the columns of one call are resampled together, and the
    results of several calls can be compared.
    """
    rows, k = columns.shape
    rng = np.random.Generator(np.random.SFC64(seed))
    out = np.empty((samples + 1, k))
    out[0] = columns.sum(axis=0)
    block = max(1, BLOCK // max(rows, 1))
    for start in range(0, samples, block):
        size = min(block, samples - start)
        draws = rng.integers(0, rows, size=(size, rows), dtype=np.uint32)
        if size > 1:  # one row of the counts for each sample
            draws += np.arange(size, dtype=np.uint32)[:, None] * np.uint32(rows)
        times = np.bincount(draws.ravel(), minlength=size * rows).reshape(size, rows).astype(float)
        out[start + 1 : start + 1 + size] = times @ columns
    return out
