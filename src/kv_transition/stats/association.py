"""Association of two measurements of decode steps (such as entropy and recall), with examples as clusters.

An example here is an independent unit: a context, if several questions are about it. The steps of an example are
dependent, so all intervals come from the cluster bootstrap. Every statistic is a function of sums over whole examples;
therefore a bootstrap sample is a weight for each example: ``weights [samples + 1, examples]`` from `resample_weights`,
whose first row, all ones, gives the estimate itself. The interval is estimate -+ t * standard error on a scale on which
the estimate is approximately normal (Fisher's z for correlations, the logit for AUROC). The degrees of freedom follow
from the effective number of examples that determine the estimate, which is small if high entropy occurs in few examples
(Carter, Schnepel and Steigerwald 2017).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import special

from kv_transition.stats.clusters import divide, resample_sums

# 2,000 bootstrap samples determine a standard error to about 2 %, which is enough.
SAMPLES = 2000
# Number of values in one block of bootstrap samples of ranks, so that a block stays in the processor's cache.
BLOCK = 200_000
# A variance below this share of the squared range is treated as rounding error.
NOTHING = 1e-10

METHOD = "cluster bootstrap"
NO_ENTROPY = "the entropy does not vary"
NO_RECALL = "the recall does not vary"
NO_STEPS = "no step was observed"
ONE_EXAMPLE = "; no interval from one example"
FEW_EXAMPLES = "; no interval, too few examples for the controls"
RARE = "; no interval, too few examples show it"
SEPARATED = "; no interval, separated completely"

Scale = tuple[Callable, Callable]
IDENTITY: Scale = (np.asarray, np.asarray)
FISHER: Scale = (np.arctanh, np.tanh)
LOGIT: Scale = (special.logit, special.expit)


@dataclass(frozen=True)
class Carriers:
    """The examples that determine an estimate: their number, and their effective number (of examples of equal weight).

    ``spent``: degrees of freedom between examples that the controls use.
    """

    examples: int
    effective: float
    spent: int = 0

    @property
    def degrees(self) -> float:
        return max(min(self.effective, self.examples - self.spent) - 1, 1.0)

    @property
    def inflation(self) -> float:
        """Return the factor that corrects the variance of the bootstrap, which is too small for few examples."""
        few = max(self.effective, 2.0)
        return few / (few - 1) * (self.examples - 1) / (self.examples - 1 - self.spent)


@dataclass(frozen=True)
class Estimate:
    """An estimate with its bounds and its two-sided p-value against no association; NaN if ``method`` gives a reason.

    ``draws`` [samples + 1]: the statistic in each bootstrap sample, the estimate first. ``by``: the examples that
    determine the estimate.
    """

    value: float
    low: float
    high: float
    p: float
    method: str
    draws: np.ndarray | None = None
    by: Carriers | None = None

    @property
    def bounded(self) -> bool:
        return bool(np.isfinite(self.low) and np.isfinite(self.high))


def missing(why: str) -> Estimate:
    return Estimate(np.nan, np.nan, np.nan, np.nan, why)


def resample_weights(examples: int, samples: int, seed: int) -> np.ndarray:
    """Return how often each example is drawn, [samples + 1, examples]; the first row has every example once."""
    return resample_sums(np.eye(examples), min(samples, SAMPLES), seed)


def summarised(
    draws: np.ndarray, by: Carriers, confidence: float, scale: Scale = IDENTITY, null: float = 0.0
) -> Estimate:
    """Return the estimate with its interval from draws [samples + 1]; ``null``: the value that means no association."""
    value = float(draws[0])
    bare = Estimate(value, np.nan, np.nan, np.nan, METHOD, draws, by)
    if by.effective < 1 + 1e-6:
        return replace(bare, method=METHOD + ONE_EXAMPLE)
    if by.examples - by.spent <= 1:
        return replace(bare, method=METHOD + FEW_EXAMPLES)
    forward, back = scale
    with np.errstate(divide="ignore", invalid="ignore"):
        centre, others = float(forward(value)), forward(draws[1:])
    if not np.isfinite(centre):
        return replace(bare, method=METHOD + SEPARATED)
    others = others[np.isfinite(others)]
    if len(others) < (len(draws) - 1) / 2:
        return replace(bare, method=METHOD + RARE)
    error = float(others.std()) * np.sqrt(by.inflation)
    half = special.stdtrit(by.degrees, (1 + confidence) / 2) * error
    away = abs(centre - float(forward(null)))
    p = 2 * special.stdtr(by.degrees, -away / error) if error > 0 else float(away == 0)
    return replace(bare, low=float(back(centre - half)), high=float(back(centre + half)), p=float(p))


@dataclass(frozen=True)
class Moments2:
    """Second moments of x and y after controls in every bootstrap sample: ``xx``, ``xy``, ``yy`` [samples + 1].

    ``by``: the examples that determine x. ``varies``: whether x and y vary after the controls.
    """

    xx: np.ndarray
    xy: np.ndarray
    yy: np.ndarray
    by: Carriers
    varies: tuple[bool, bool]

    def correlation(self, confidence: float) -> Estimate:
        if not all(self.varies):
            return missing(NO_RECALL if self.varies[0] else NO_ENTROPY)
        r = np.clip(divide(self.xy, np.sqrt(np.maximum(self.xx * self.yy, 0))), -1, 1)
        return summarised(r, self.by, confidence, FISHER)

    def slope(self, confidence: float) -> Estimate:
        """Return the least-squares slope of y on x."""
        if not self.varies[0]:
            return missing(NO_ENTROPY)
        return summarised(divide(self.xy, self.xx), self.by, confidence)


def moments2(
    x: np.ndarray,
    ys: Sequence[np.ndarray],
    example: np.ndarray,
    weights: np.ndarray,
    controls: np.ndarray | None = None,
) -> list[Moments2]:
    """Return the second moments of x and each y [steps] around their regressions on ``controls [steps, k]`` (None: on a
    constant).

    Whatever does not depend on y is computed once.
    """
    steps, examples = len(x), weights.shape[1]
    basis = np.ones((steps, 1)) if controls is None else np.column_stack([np.ones(steps), orthonormal(controls)])
    spent = 0
    if basis.shape[1] > 1:
        means = _by_example(basis[:, 1:], example, examples) / np.bincount(example, minlength=examples)[:, None]
        spent = int(np.linalg.matrix_rank(means - means.mean(axis=0), tol=1e-8 * np.sqrt(examples)))
    columns = np.column_stack([x, *ys])
    return _moments2(columns, _size(columns), basis, example, weights, spent)


def moments2_within(
    x: np.ndarray, ys: Sequence[np.ndarray], part: np.ndarray, example: np.ndarray, weights: np.ndarray
) -> list[Moments2]:
    """Return the second moments of x and each y around the means of each ``part`` [steps] of an example.

    Differences between the parts have no effect.
    """
    parts = int(part.max()) + 1
    columns = np.column_stack([x, *ys])
    means = _by_example(columns, part, parts) / np.bincount(part, minlength=parts)[:, None]
    return _moments2(columns - means[part], _size(columns), np.empty((len(x), 0)), example, weights, 0)


def _by_example(columns: np.ndarray, example: np.ndarray, examples: int) -> np.ndarray:
    """Return the sums [examples, k] of columns [steps, k]."""
    return np.stack([np.bincount(example, weights=column, minlength=examples) for column in columns.T], axis=1)


def _size(columns: np.ndarray) -> np.ndarray:
    """Return the scale of the residuals of each column: its range, or a multiple of the rounding error if that is
    larger.
    """
    return np.maximum(np.ptp(columns, axis=0), 1e-9 * np.abs(columns).max(axis=0))


def _moments2(
    columns: np.ndarray, size: np.ndarray, basis: np.ndarray, example: np.ndarray, weights: np.ndarray, spent: int
) -> list[Moments2]:
    """Return the moments of the first column with each of the other columns [steps, 1 + ys] around ``basis``."""
    k = basis.shape[1]
    if k:
        # Take residuals of the whole sample first: they are small numbers, so the fits of the bootstrap are precise.
        columns = columns - basis @ np.linalg.lstsq(basis, columns, rcond=None)[0]
    varies = (columns**2).mean(axis=0) > NOTHING * size**2
    columns = np.where(varies, columns, 0.0)
    starts = np.flatnonzero(np.diff(example, prepend=-1))

    def resampled(products: np.ndarray) -> np.ndarray:
        """Return the sums [samples + 1, ...] over each bootstrap sample of sums over examples [examples, ...]."""
        return (weights @ products.reshape(len(starts), -1)).reshape(len(weights), *products.shape[1:])

    with_x, squares = (np.add.reduceat(part * columns, starts) for part in (columns[:, :1], columns))
    xy, yy = resampled(with_x), resampled(squares)
    if k:
        inner, cross = (
            resampled(np.stack([np.add.reduceat(basis * column[:, None], starts) for column in of.T], axis=2))
            for of in (basis, columns)
        )
        # A bootstrap sample may lack a kind of prompt; its column is then 0, and a small ridge term makes its effect 0.
        fitted = np.linalg.solve(inner + 1e-9 * len(columns) * np.eye(k), cross)
        xy -= np.einsum("ski,skj->sj", cross[:, :, :1], fitted)
        yy -= np.einsum("skj,skj->sj", cross, fitted)
    by = Carriers(len(starts), kish(with_x[:, 0]), spent)
    xx, *xy = np.ascontiguousarray(xy.T)
    pairs = zip(xy, np.ascontiguousarray(yy.T)[1:], varies[1:], strict=True)
    return [Moments2(xx, own, squared, by, (bool(varies[0]), bool(moves))) for own, squared, moves in pairs]


def orthonormal(controls: np.ndarray) -> np.ndarray:
    """Return uncorrelated columns with mean 0 and mean square 1 that span the space of ``controls [steps, k]``."""
    centred = controls - controls.mean(axis=0)
    size = np.sqrt((centred**2).mean(axis=0))
    kept = centred[:, size > 1e-12 * np.maximum(1, np.abs(controls).max(axis=0, initial=0))]
    if not kept.shape[1]:
        return kept
    u, s, _ = np.linalg.svd(kept / np.sqrt((kept**2).mean(axis=0)), full_matrices=False)
    return u[:, s > 1e-7 * s[0]] * np.sqrt(len(controls))


def bent(values: np.ndarray, examples: int) -> np.ndarray:
    """Return a control [steps] as a piecewise linear function with knots at its quantiles: columns [steps, 1 to 10].

    There is one knot for every ten examples, at most nine. With more examples, a straight line would leave a visible
    bias, so more knots are used.
    """
    bends = min(9, examples // 10)
    knots = np.unique(np.quantile(values, np.linspace(0, 1, bends + 2)[1:-1])) if bends else np.empty(0)
    return np.column_stack([values, *(np.maximum(values - knot, 0) for knot in knots)])


def ranks_within(values: np.ndarray, example: np.ndarray) -> np.ndarray:
    """Return the midranks of the steps within each example, centred, divided by the example's number of steps."""
    size = np.bincount(example)[example]
    # midranks among all steps, ordered by example first, minus the number of steps of earlier examples
    _, group, count = np.unique(np.column_stack([example, values]), axis=0, return_inverse=True, return_counts=True)
    before = (np.cumsum(count) - count / 2)[group.ravel()]
    earlier = np.cumsum(np.bincount(example))[example] - size
    return (before - earlier - size / 2) / size


def rank_statistics(
    x: np.ndarray,
    ys: Sequence[np.ndarray],
    events: Sequence[np.ndarray],
    example: np.ndarray,
    weights: np.ndarray,
    confidence: float,
) -> list[tuple[Estimate, Estimate]]:
    """Return for each y Spearman's correlation of x and y, and the AUROC of x for its event [steps] bool.

    Each bootstrap sample is ranked again; the ranks of x are the same for every y.
    """
    if np.ptp(x) == 0:
        return [(missing(NO_ENTROPY), missing(NO_ENTROPY))] * len(ys)
    examples = weights.shape[1]
    of_x, *of_ys = (Ranks(values, example, examples) for values in (x, *ys))
    happened = np.array(events, dtype=float)  # [ys, steps]
    spearman, auroc = np.empty((2, len(ys), len(weights)))
    block = max(1, BLOCK // len(x))
    for start in range(0, len(weights), block):
        part = slice(start, start + block)
        w = weights[part].T  # [examples, samples]
        each = w[example]
        rank_x, xx = of_x.of(w)
        weighted = each * rank_x[of_x.group]
        for i, of_y in enumerate(of_ys):
            rank_y, yy = of_y.of(w)
            spearman[i, part] = divide(_column_sums(weighted, rank_y[of_y.group]), np.sqrt(xx * yy))
        # Mann and Whitney: the mean rank of the steps with the event gives how often they lie above the other steps.
        count = happened @ each
        auroc[:, part] = 0.5 + divide(happened @ weighted, count * (each.sum(axis=0) - count))
    carried = np.bincount(example, weights=of_x.of(np.ones((examples, 1)))[0][of_x.group, 0] ** 2, minlength=examples)
    by = Carriers(examples, kish(carried))
    return [
        (
            missing(NO_RECALL) if np.ptp(y) == 0 else summarised(np.clip(rho, -1, 1), by, confidence, FISHER),
            _auroc(draws, event, example, examples, confidence),
        )
        for y, event, rho, draws in zip(ys, events, spearman, auroc, strict=True)
    ]


def _auroc(draws: np.ndarray, event: np.ndarray, example: np.ndarray, examples: int, confidence: float) -> Estimate:
    if event.all() or not event.any():
        return missing(f"recall is {'always' if event.all() else 'never'} below one half")
    sides = [np.bincount(example[side], minlength=examples) for side in (event, ~event)]
    by = Carriers(examples, min(kish(side) for side in sides))
    return summarised(draws, by, confidence, LOGIT, null=0.5)


def _column_sums(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the sums over rows of products [rows, samples]; exact in any order, because ranks are halves of
    integers.
    """
    return np.einsum("ij,ij->j", a, b)


class Ranks:
    """Midranks of values [steps] in any bootstrap sample of their examples, for each group of equal values.

    ``group`` [steps]: codes of the distinct values in increasing order. The rank of a step is the number of steps with
    smaller values plus half the number of steps with equal values. All ranks are halves of integers and therefore
    exact.
    """

    def __init__(self, values: np.ndarray, example: np.ndarray, examples: int):
        _, self.group = np.unique(values, return_inverse=True)
        self._sizes = np.zeros((int(self.group.max()) + 1, examples))
        np.add.at(self._sizes, (self.group, example), 1.0)

    def of(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the midranks minus their mean [groups, samples], and the sums [samples] of their squares over steps.

        weights [examples, samples]: how often each example is drawn.
        """
        sizes = self._sizes @ weights
        ranks = np.cumsum(sizes, axis=0)
        ranks -= ranks[-1] / 2 + sizes / 2
        return ranks, _column_sums(sizes * ranks, ranks)


def kish(carried: np.ndarray) -> float:
    """Return the effective number of examples: how many of equal weight have the same precision (Kish 1965)."""
    return float(divide(np.sum(carried) ** 2, np.sum(np.square(carried, dtype=float))))
