"""Where, along the length bins, a policy at a budget stops being reliable: the transition zone.

Instability of a bin is any of (a) more failures than the full cache on the same examples, (b) more variance over
repeats of one example than the full cache, (c) more dispersion between examples than the mean implies. *Onset* is the
first significantly unstable bin (Holm over bins and criteria) before *collapse*, the first bin whose mean lies below
half of the full cache's, upper bound included. docs/statistics.md gives the tests and their false alarm rates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from scipy import stats

from kv_transition.analysis import intervals, labels
from kv_transition.analysis.aggregate import FULL, Statistics, example_values, inherited
from kv_transition.provenance import rows_to_table, write_table
from kv_transition.tables import TRANSITION

STABLE, UNSTABLE, ZONE, CLIFF, UNDECIDED = "stable", "unstable", "zone", "cliff", "undecided"
OUTCOMES = (STABLE, UNSTABLE, ZONE, CLIFF, UNDECIDED)
CRITERIA = ("failures", "repeats", "dispersion")
COLLAPSED = 0.5  # of the full cache's mean
HIGH_Z = 1.0
# A full cache that answers nearly all or nearly nothing right cannot say how scores would spread at another mean.
INFORMATIVE = (0.1, 0.9)
METHOD = (
    "onset: exact sign tests of failures and of variance over repeats against the full cache, and a bootstrap z test "
    "of dispersion, Holm over bins and criteria; collapse: upper bound of the mean below half of the full cache's"
)
METHOD_Z = "z-scores over the bins; zone where z_std or z_fail is at least 1 and the mean is not below half of full's"


@dataclass(frozen=True)
class Bin:
    """One length bin of one policy and budget: arrays [examples], policy and full cache on the same examples."""

    bin: int
    tokens: tuple[int, int]
    score: np.ndarray
    failed: np.ndarray
    full_score: np.ndarray
    full_failed: np.ndarray
    score_var: np.ndarray
    full_score_var: np.ndarray

    @property
    def n(self) -> int:
        return len(self.score)

    @property
    def label(self) -> str:
        return labels.token_range(*self.tokens)


@dataclass(frozen=True)
class Evidence:
    """What the bins show, for the sample (arrays [bins]) or for bootstrap samples of it ([samples, bins])."""

    low: np.ndarray
    high: np.ndarray
    full_mean: np.ndarray
    p: np.ndarray  # [..., bins, criteria], NaN where a criterion does not apply

    @property
    def collapsed(self) -> np.ndarray:
        return self.high < COLLAPSED * self.full_mean


@dataclass
class Verdict:
    outcome: str
    reason: str
    onset: int | None = None
    collapse: int | None = None
    onset_probability: float | None = None
    collapse_probability: float | None = None
    details: dict[str, Any] = field(default_factory=dict)


@lru_cache(maxsize=64)
def _sign_table(n: int) -> np.ndarray:
    more, less = np.ogrid[: n + 1, : n + 1]
    return stats.binom.sf(more - 1, more + less, 0.5)


def sign_test_p(more: np.ndarray, less: np.ndarray, n: int) -> np.ndarray:
    """One-sided exact sign test over n examples: how likely is ``more`` or yet more, if either sign is as likely."""
    return _sign_table(n)[more.astype(int), less.astype(int)]


@lru_cache(maxsize=64)
def _weights(n: int, samples: int, seed: int) -> np.ndarray:
    """How often each of n examples is drawn ``[samples + 1, n]``; the first row is the sample itself.

    The same draws serve every policy, so that the policies stay paired.
    """
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=samples)
    return np.vstack([np.ones((1, n)), draws])


def detect(bins: Sequence[Bin], name: str, statistics: Statistics) -> Verdict:
    """The transition of one policy and budget; ``name`` opens the sentence that says why."""
    if not bins:
        return Verdict(UNDECIDED, f"{name}: undecided, because the full cache was not run on the same examples.")
    samples = max(statistics.resamples, 1)
    seen, again = _evidence(bins, statistics, samples)
    unstable, p_holm = _unstable(seen.p[None], statistics.confidence)
    unstable, p_holm = unstable[0], p_holm[0]
    onset, collapse = _first(unstable[None], seen.collapsed[None])
    onset, collapse = int(onset[0]), int(collapse[0])
    onsets, collapses = _first(_unstable(again.p, statistics.confidence)[0], again.collapsed)
    at_onset = [float((onsets == b).mean()) for b in range(len(bins))]
    at_collapse = [float((collapses == b).mean()) for b in range(len(bins))]

    verdict = _judge(bins, seen, p_holm, onset, collapse, name, 1 - statistics.confidence)
    verdict.details = {
        "bins": [
            {
                "bin": b.bin,
                "tokens": list(b.tokens),
                "n": b.n,
                "mean": float(b.score.mean()),
                "mean_low": float(seen.low[i]),
                "mean_high": float(seen.high[i]),
                "full_mean": float(seen.full_mean[i]),
                "failure_rate": float(b.failed.mean()),
                "full_failure_rate": float(b.full_failed.mean()),
                **{f"p_{c}": _number(seen.p[i, j]) for j, c in enumerate(CRITERIA)},
                "p_holm": _number(p_holm[i].min()),
                "unstable": bool(unstable[i]),
                "collapsed": bool(seen.collapsed[i]),
                "probability_onset": at_onset[i],
                "probability_collapse": at_collapse[i],
            }
            for i, b in enumerate(bins)
        ],
        "probability_no_onset": float((onsets < 0).mean()),
        "probability_no_collapse": float((collapses < 0).mean()),
        "bootstrap_samples": samples,
    }
    if onset >= 0:
        verdict.onset, verdict.onset_probability = bins[onset].bin, at_onset[onset]
    if collapse >= 0:
        verdict.collapse, verdict.collapse_probability = bins[collapse].bin, at_collapse[collapse]
    return verdict


def _evidence(bins: Sequence[Bin], statistics: Statistics, samples: int) -> tuple[Evidence, Evidence]:
    """Of the sample itself, and of bootstrap samples that draw examples with replacement within each bin."""
    shape = (samples + 1, len(bins))
    total, squares, coin, full_mean = (np.empty(shape) for _ in range(4))
    p = np.full((*shape, len(CRITERIA)), np.nan)
    n = np.array([b.n for b in bins])
    phi, full_spread, full_n = np.full(shape, np.nan), np.zeros(shape), np.zeros(shape)
    for i, b in enumerate(bins):
        weight = _weights(b.n, samples, statistics.seed + i)
        total[:, i], squares[:, i] = weight @ b.score, weight @ b.score**2
        coin[:, i] = weight @ ~np.isin(b.score, (0, 1)) == 0
        full_mean[:, i] = weight @ b.full_score / b.n
        p[:, i, 0] = sign_test_p(weight @ (b.failed > b.full_failed), weight @ (b.failed < b.full_failed), b.n)
        repeated = ~np.isnan(b.score_var) & ~np.isnan(b.full_score_var)
        if repeated.any():
            more, less = b.score_var > b.full_score_var, b.score_var < b.full_score_var
            p[:, i, 1] = sign_test_p(weight @ more, weight @ less, b.n)
        phi[:, i] = _phi(total[:, i], squares[:, i], b.n)
        full_squares = weight @ b.full_score**2
        of_full = _phi(full_mean[:, i] * b.n, full_squares, b.n)
        if INFORMATIVE[0] <= full_mean[0, i] <= INFORMATIVE[1]:
            full_spread[:, i] = np.where(np.isnan(of_full), 0, of_full * b.n)
            full_n[:, i] = np.where(np.isnan(of_full), 0, b.n)
    low, high = intervals.bounded_mean_from_moments(
        total, squares, np.broadcast_to(n, shape), coin.astype(bool), statistics.confidence
    )
    if full_n[0].any() and not coin.all():
        p[..., 2] = _dispersion_p(phi, full_spread.sum(axis=1), full_n.sum(axis=1), n)
    return (
        Evidence(low[0], high[0], full_mean[0], p[0]),
        Evidence(low[1:], high[1:], full_mean[1:], p[1:]),
    )


def _phi(total: np.ndarray, squares: np.ndarray, n: int) -> np.ndarray:
    mean = total / n
    most = mean * (1 - mean)
    return np.divide(squares / n - mean**2, most, out=np.full(np.shape(total), np.nan), where=most > 1e-12)


def _dispersion_p(phi: np.ndarray, full_spread: np.ndarray, full_n: np.ndarray, n: np.ndarray) -> np.ndarray:
    """One-sided p-values [samples + 1, bins] that ``phi`` exceeds the full cache's: log ratio over its bootstrap error.

    The full cache's phi is taken over all its informative bins together and mixed with the prior at the maximum, as
    for intervals, which keeps the test conservative.
    """
    prior = intervals.PRIOR_OBSERVATIONS
    reference = np.minimum((full_spread + prior) / (full_n + prior), 1)
    excess = np.log(np.where(phi > 0, phi, np.nan)) - np.log(reference)[:, None]
    error = np.array([np.nanstd(bin) if np.isfinite(bin).sum() > 1 else np.nan for bin in excess[1:].T])
    z = np.divide(excess, error, out=np.full(excess.shape, np.nan), where=error > 1e-9)
    return stats.t.sf(z, np.maximum(n - 1, 1))


def _unstable(p: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Which bins are significantly unstable [samples, bins], and the Holm-adjusted p-values behind it."""
    applies = ~np.isnan(p)
    flat = np.where(applies, p, 1.0).reshape(len(p), -1)
    adjusted = _holm(flat, applies.reshape(len(p), -1).sum(axis=1)).reshape(p.shape)
    return (adjusted < 1 - confidence).any(axis=-1), adjusted


def _holm(p: np.ndarray, tests: np.ndarray) -> np.ndarray:
    """Holm's step-down row by row, ``tests`` [rows] of which apply: statsmodels' `multipletests`, for many rows."""
    order = np.argsort(p, axis=1)
    factors = np.maximum(tests[:, None] - np.arange(p.shape[1]), 1)
    stepped = np.maximum.accumulate(np.take_along_axis(p, order, axis=1) * factors, axis=1)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.minimum(stepped, 1), axis=1)
    return adjusted


def _first(unstable: np.ndarray, collapsed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of onset and collapse per sample, -1 for none; an onset counts only before the collapse."""
    count = unstable.shape[1]
    collapse = np.where(collapsed.any(axis=1), collapsed.argmax(axis=1), count)
    early = unstable & (np.arange(count) < collapse[:, None])
    onset = np.where(early.any(axis=1), early.argmax(axis=1), -1)
    return onset, np.where(collapse == count, -1, collapse)


def _judge(
    bins: Sequence[Bin], seen: Evidence, p_holm: np.ndarray, onset: int, collapse: int, name: str, alpha: float
) -> Verdict:
    def mean_at(i: int) -> str:
        value = labels.interval(float(bins[i].score.mean()), float(seen.low[i]), float(seen.high[i]))
        return f"{value}, n = {bins[i].n}"

    def full_at(i: int) -> str:
        return labels.number(float(seen.full_mean[i]))

    def sign_at(i: int) -> str:
        which = int(np.nanargmin(p_holm[i]))
        p = f"p = {p_holm[i, which]:.2g} after Holm"
        b = bins[i]
        if which == 0:
            rates = f"{labels.number(float(b.failed.mean()))} against {labels.number(float(b.full_failed.mean()))}"
            return f"failures {rates} for the full cache, {p}"
        return (
            f"{('', 'repeats of one example disagree', 'the examples differ more than the mean implies')[which]}, {p}"
        )

    def before(i: int) -> str:
        return f"no instability up to {labels.tokens(bins[i - 1].tokens[1])} tokens ({mean_at(i - 1)})"

    if collapse == 0:
        return Verdict(
            CLIFF,
            f"{name}: collapsed already in the shortest bin, {bins[0].label} tokens ({mean_at(0)}, against "
            f"{full_at(0)} for the full cache); a transition, if there is one, lies below the lengths measured.",
        )
    if collapse > 0:
        end = f"collapsed at {bins[collapse].label} tokens ({mean_at(collapse)}, against {full_at(collapse)} for full)"
        if not seen.collapsed[collapse:].all():
            end += ", though not in every longer bin"
        if onset < 0:
            return Verdict(CLIFF, f"{name}: {before(collapse)}, then {end}: a cliff, with no significant sign before.")
        start = f"unstable from {bins[onset].label} tokens ({sign_at(onset)})"
        start = start if onset == 0 else f"{before(onset)}, {start}"
        return Verdict(ZONE, f"{name}: {start}, {end}.")
    if onset >= 0:
        start = f"unstable from {bins[onset].label} tokens ({sign_at(onset)})"
        start = start if onset == 0 else f"{before(onset)}, {start}"
        last = len(bins) - 1
        return Verdict(
            UNSTABLE, f"{name}: {start}, without a collapse up to {labels.tokens(bins[last].tokens[1])} tokens "
            f"({mean_at(last)})."
        )  # fmt: skip
    blind = [i for i in range(len(bins)) if 0.5 ** bins[i].n * max(1, int((~np.isnan(seen.p)).sum())) >= alpha]
    if blind:
        b = bins[blind[0]]
        return Verdict(
            UNDECIDED, f"{name}: undecided; n = {b.n} at {b.label} tokens is too few for any test to detect."
        )
    if not (seen.full_mean > 0).all():
        b = bins[int(np.argmin(seen.full_mean))]
        return Verdict(UNDECIDED, f"{name}: undecided; the full cache itself scores 0 at {b.label} tokens (n = {b.n}).")
    unsure = np.flatnonzero(seen.low < COLLAPSED * seen.full_mean)
    if len(unsure):
        i = int(unsure[0])
        half = labels.number(COLLAPSED * float(seen.full_mean[i]))
        return Verdict(
            UNDECIDED, f"{name}: undecided; at {bins[i].label} tokens the score {mean_at(i)}, may lie on either side "
            f"of {half}, half of the full cache's."
        )  # fmt: skip
    i = int(np.argmin([b.score.mean() for b in bins]))
    return Verdict(
        STABLE, f"{name}: stable over all {len(bins)} bins, {labels.tokens(bins[0].tokens[0])} to "
        f"{labels.tokens(bins[-1].tokens[1])} tokens; lowest score {mean_at(i)}, at {bins[i].label} tokens."
    )  # fmt: skip


def detect_zscore(bins: Sequence[Bin], name: str) -> Verdict:
    """The blueprint's detector: z-scores of spread, failure rate and accuracy drop over the bins."""
    if len(bins) < 2:
        return Verdict(UNDECIDED, f"{name}: undecided; z-scores over the bins need at least two bins.")

    def z(values: list[float]) -> np.ndarray:
        array = np.array(values)
        spread = array.std()
        return (array - array.mean()) / spread if spread > 1e-12 else np.zeros(len(array))

    means = np.array([b.score.mean() for b in bins])
    full = np.array([b.full_score.mean() for b in bins])
    z_std = z([float(b.score.std(ddof=1)) if b.n > 1 else 0.0 for b in bins])
    z_fail, z_drop = z([float(b.failed.mean()) for b in bins]), z(list(full - means))
    collapsed = means < COLLAPSED * full
    high = ((z_std >= HIGH_Z) | (z_fail >= HIGH_Z)) & ~collapsed
    where = np.flatnonzero(high)
    fallen = np.flatnonzero(collapsed)
    details = {
        "bins": [
            {
                "bin": b.bin,
                "z_std": float(z_std[i]),
                "z_fail": float(z_fail[i]),
                "z_acc_drop": float(z_drop[i]),
                "collapsed": bool(collapsed[i]),
                "in_zone": bool(high[i]),
            }
            for i, b in enumerate(bins)
        ]
    }
    collapse = bins[int(fallen[0])].bin if len(fallen) else None
    if not len(where):
        flat = not (z_std.any() or z_fail.any())
        reason = "spread and failures are the same in every bin" if flat else "every bin of high spread has collapsed"
        return Verdict(STABLE if flat else CLIFF, f"{name}: {reason}.", collapse=collapse, details=details)
    first, last = bins[int(where[0])], bins[int(where[-1])]
    details["zone"] = [first.bin, last.bin]
    i = int(where[0])
    reason = (
        f"{name}: z of spread {z_std[i]:.1f}, of failures {z_fail[i]:.1f} at {first.label} tokens (n = {first.n}), "
        f"where the mean has not collapsed."
    )
    return Verdict(ZONE, reason, onset=first.bin, collapse=collapse, details=details)


def transitions(scores: pa.Table, statistics: Statistics) -> pa.Table:
    """Both detectors for every task, mode, policy and budget but the full cache itself (tables.TRANSITION)."""
    frame = example_values(scores).filter(~pl.col("alias"))
    ranges = {
        (task, b): (int(low), int(high))
        for task, b, low, high in frame.group_by("task", "bin")
        .agg(pl.col("token_len").min(), pl.col("token_len").max().alias("last"))
        .iter_rows()
    }
    is_full = pl.col("policy").eq(FULL["policy"]) & pl.col("budget").eq(FULL["budget"])
    # An answer that the machinery could not give has no score; here it is worth nothing, as it is to a reader.
    lost = pl.col("score").is_null() & (pl.col("failed") > 0)
    frame = frame.with_columns(score=pl.when(lost).then(0.0).otherwise(pl.col("score")))
    frame = frame.filter(pl.col("score").is_not_null())
    joined = frame.filter(~is_full).join(
        frame.filter(is_full), on=["task", "mode", "bin", "example_id"], how="left", suffix="_full"
    )
    rows = []
    group = ["task", "mode", "policy", "budget"]
    for key, cells in joined.sort(*group, "bin", "example_id").group_by(group, maintain_order=True):
        task, mode, policy, budget = key
        paired = cells.filter(pl.col("score_full").is_not_null())
        bins = [_bin(int(b), ranges[task, b], part) for (b,), part in paired.group_by("bin", maintain_order=True)]
        name = f"{policy} at {labels.budget(budget)}, {labels.mode(mode)}"
        for detector, verdict, method in (
            ("definition", detect(bins, name, statistics), METHOD),
            ("zscore", detect_zscore(bins, name), METHOD_Z),
        ):
            rows.append(
                {
                    **dict(zip(group, key, strict=True)),
                    "detector": detector,
                    "outcome": verdict.outcome,
                    "onset_bin": verdict.onset,
                    "collapse_bin": verdict.collapse,
                    "onset_probability": verdict.onset_probability,
                    "collapse_probability": verdict.collapse_probability,
                    "n": sum(b.n for b in bins),
                    "method": method,
                    "reason": verdict.reason,
                    "details": json.dumps(verdict.details, sort_keys=True),
                }
            )
    return rows_to_table(rows, TRANSITION)


def _bin(number: int, tokens: tuple[int, int], part: pl.DataFrame) -> Bin:
    def column(name: str) -> np.ndarray:
        return part[name].cast(pl.Float64).fill_null(np.nan).to_numpy()

    return Bin(
        number,
        tokens,
        *(column(c) for c in ("score", "failed", "score_full", "failed_full", "score_var", "score_var_full")),
    )


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def write_transition(scores_path: str, output: str, statistics: Mapping[str, Any]) -> None:
    """The `transition` rule: scores.parquet to transition.parquet."""
    import pyarrow.parquet as pq

    settings = Statistics(**statistics)
    table = transitions(pq.read_table(scores_path), settings)
    write_table(output, table, inherited(scores_path) | {"statistics": dict(statistics)})
