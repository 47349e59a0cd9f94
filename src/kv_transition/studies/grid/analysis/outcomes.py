"""The outcome of a transition as text: its pattern, the reason, and one sentence for readers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kv_transition import labels
from kv_transition.stats import intervals
from kv_transition.studies.grid.analysis.instability import COLLAPSED, Evidence, Point

NEITHER, ONSET, ZONE, COLLAPSE, OPEN = "neither", "onset", "onset and collapse", "collapse", "open"
PATTERNS = (NEITHER, ONSET, ZONE, COLLAPSE, OPEN)
"""patterns that a detector can find; scale.py maps them to the outcome of a policy"""


OPEN_WORDS = "whether it is unstable or collapsed is open"


@dataclass
class Verdict:
    """The result of a detector; ``onset`` and ``collapse`` are positions along the axis, None if there is none."""

    pattern: str
    reason: str
    sentence: str = ""
    onset: int | None = None
    collapse: int | None = None
    onset_probability: float | None = None
    collapse_probability: float | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Axis:
    """The words for the points along an axis."""

    singular: str
    plural: str
    first: str
    to: str
    worse: str
    beyond: str
    measured: str

    @property
    def along_length(self) -> bool:
        return self.singular == "bin"

    def of(self, point: Point) -> int | str:
        return point.bin if self.along_length else point.budget

    def name(self, point: Point) -> str:
        """Return the name of a point: ``0.9–1.1k tokens`` or ``20 %``."""
        return f"{labels.token_range(*point.tokens)} tokens" if self.along_length else labels.budget(point.budget)

    def end(self, point: Point) -> str:
        """Return the name of a point as the end of a range: ``2.0k tokens`` or ``20 %``."""
        return f"{labels.tokens(point.tokens[1])} tokens" if self.along_length else labels.budget(point.budget)


LENGTH = Axis("bin", "bins", "shortest bin", "up to", "longer", "beyond", "lengths")
BUDGET = Axis("budget", "budgets", "largest budget", "down to", "smaller", "below", "budgets")


def key(point: Point, axis: Axis) -> dict[str, Any]:
    return {"bin": point.bin} if axis.along_length else {"budget": point.budget}


@dataclass(frozen=True)
class Finding:
    """Everything that the text needs; ``onset`` and ``collapse`` are positions, -1 for none."""

    points: Sequence[Point]
    seen: Evidence
    p_holm: np.ndarray
    onset: int
    collapse: int
    axis: Axis
    alpha: float

    def mean(self, i: int) -> str:
        b = self.points[i]
        return f"{labels.interval(b.score.mean(), self.seen.low[i], self.seen.high[i])}, {b.label}"

    def against(self, i: int) -> str:
        b = self.points[i]
        value = labels.interval(b.score.mean(), self.seen.low[i], self.seen.high[i])
        return f"{value}, full cache {self.full(i)}, {b.label}"

    @property
    def sound(self) -> int:
        """Return the number of points, from the first on, that are not unstable and whose mean is not below half of
        full's.
        """
        good = self.seen.low >= COLLAPSED * self.seen.full_mean
        stop = next((i for i in (self.onset, self.collapse) if i >= 0), len(self.points))
        return next((i for i in range(stop) if not good[i]), stop)

    @property
    def blind(self) -> list[int]:
        """Return the points at which even failures of all examples would not be significant after Holm."""
        tests = max(1, int((~np.isnan(self.seen.p)).sum()))
        return [i for i, b in enumerate(self.points) if 0.5**b.count * tests >= self.alpha]

    def full(self, i: int) -> str:
        return labels.number(float(self.seen.full_mean[i]))

    def name(self, i: int) -> str:
        return self.axis.name(self.points[i])

    def end(self, i: int) -> str:
        return self.axis.end(self.points[i])

    def sign(self, i: int) -> str:
        """Return the criterion with the smallest p-value at a point, as text."""
        b, which = self.points[i], int(np.nanargmin(self.p_holm[i]))
        p = f"p = {self.p_holm[i, which]:.2g} after Holm"
        if which == 0:
            rates = f"{labels.number(float(b.failed.mean()))} against {labels.number(float(b.full_failed.mean()))}"
            return f"failures {rates} for the full cache, {p}, {b.label}"
        what = ("", "repeats of one example disagree", "the examples differ more than the mean implies")[which]
        return f"{what}, {p}, {b.label}"


def outcome(f: Finding) -> tuple[str, str]:
    """Return the pattern and the reason as text."""
    axis, last = f.axis, len(f.points) - 1
    if f.collapse == 0:
        return COLLAPSE, (
            f"collapsed already {'in the ' if axis.along_length else 'at the '}{axis.first}, {f.name(0)} ({f.mean(0)}, "
            f"against {f.full(0)} for the full cache); a transition, if there is one, lies "
            f"{'below' if axis.along_length else 'above'} the {axis.measured} measured"
        )
    start = ""
    if f.onset >= 0:
        start = f"unstable from {f.name(f.onset)} ({f.sign(f.onset)})"
        start = start if f.onset == 0 else f"{_calm(f, f.onset)}, {start}"
    if f.collapse > 0:
        end = f"collapsed at {f.name(f.collapse)} ({f.mean(f.collapse)}, against {f.full(f.collapse)} for full)"
        if not f.seen.collapsed[f.collapse :].all():
            end += f", though not in every {axis.worse} {axis.singular}"
        if f.onset < 0:
            return COLLAPSE, f"{_calm(f, f.collapse)}, then {end}, with no significant sign before"
        return ZONE, f"{start}, {end}"
    if f.onset >= 0:
        return ONSET, f"{start}, without a collapse {axis.to} {f.end(last)} ({f.mean(last)})"
    open_at = undecided(f)
    if open_at is not None:
        return OPEN, f"{OPEN_WORDS}; {open_at[1]}"
    i = int(np.argmin([b.score.mean() for b in f.points]))
    return NEITHER, (
        f"neither unstable nor collapsed in any of {len(f.points)} {axis.plural}, {_from_to(f)}; "
        f"lowest score {f.mean(i)}, at {f.name(i)}"
    )


def _from_to(f: Finding) -> str:
    first, last = f.points[0], f.points[-1]
    if f.axis.along_length:
        return f"{labels.tokens(first.tokens[0])} to {labels.tokens(last.tokens[1])} tokens"
    return f"{labels.budget(first.budget)} to {labels.budget(last.budget)}"


def _calm(f: Finding, i: int) -> str:
    return f"no instability {f.axis.to} {f.end(i - 1)} ({f.mean(i - 1)})"


def undecided(f: Finding) -> tuple[list[int], str] | None:
    """Return the points at which instability or collapse is undecided, with the reason; None if there are none."""
    if f.blind:
        i = f.blind[0]
        return f.blind, f"{f.points[i].label} at {f.name(i)} is too few for any test to detect"
    nothing = np.flatnonzero(~(f.seen.full_mean > 0)).tolist()
    if nothing:
        i = nothing[0]
        return nothing, f"the full cache itself scores 0 at {f.name(i)} ({f.points[i].label})"
    unsure = np.flatnonzero(f.seen.low < COLLAPSED * f.seen.full_mean).tolist()
    if unsure:
        i = unsure[0]
        half = labels.number(COLLAPSED * float(f.seen.full_mean[i]))
        return unsure, (
            f"at {f.name(i)} the score {f.mean(i)}, may lie on either side of {half}, half of the full cache's"
        )
    return None


def sentence(f: Finding, found: str, why: str) -> str:
    """Return the sentence for readers.

    ``neither unstable nor collapsed up to 2.0k tokens (0.97 [0.91, 0.99], full cache 0.98, n = 40), unstable from 2.0k
    to 4.1k tokens (failures 0.02 -> 0.15 [0.07, 0.29], n = 40), collapsed beyond (...)``. "Neither" covers the points,
    from the first on, that have no significant instability and whose lower bound of the mean is not below half of the
    full cache's. Points between these and the first unstable or collapsed point are called open.
    """
    axis, last, sound = f.axis, len(f.points) - 1, f.sound
    parts = []
    if sound:
        whole = ", all that was measured" if sound > last else ""
        parts.append(f"neither unstable nor collapsed {axis.to} {f.end(sound - 1)}{whole} ({f.against(sound - 1)})")
    if found == OPEN:
        return "; ".join([*parts, why.replace(f"{OPEN_WORDS}; ", "beyond that open: ") if parts else why])
    bad = next((i for i in (f.onset, f.collapse) if i >= 0), last + 1)
    if sound < bad:
        parts.append(f"open {_span(f, sound, bad - 1)} ({f.against(bad - 1)})")
    if f.onset >= 0:
        stop = f.collapse - 1 if f.collapse >= 0 else last
        parts.append(f"unstable {_span(f, f.onset, stop)} ({_rise(f)})")
    if f.collapse == 0:
        parts.append(f"collapsed from the {axis.first} on, {f.name(0)} ({f.against(0)})")
    elif f.collapse > 0:
        parts.append(f"collapsed {axis.beyond} ({f.against(f.collapse)} at {f.name(f.collapse)})")
    elif f.onset >= 0:
        parts.append(f"not collapsed {axis.to} {f.end(last)} ({f.against(last)})")
    return ", ".join(parts)


def _span(f: Finding, start: int, stop: int) -> str:
    """Return a range such as ``from 2.0k to 4.1k tokens``; a bin begins where the one before it ends."""
    if f.axis.along_length and start > 0:
        return f"from {f.end(start - 1).removesuffix(' tokens')} to {f.end(stop)}"
    return f"at {f.name(start)}" if start == stop else f"from {f.name(start)} to {f.end(stop)}"


def _rise(f: Finding) -> str:
    """Return the sign of the onset: the failure rates before and at the onset, or the other criterion."""
    b, which = f.points[f.onset], int(np.nanargmin(f.p_holm[f.onset]))
    if which != 0:
        return f"{('', 'repeats disagree', 'examples differ more than the mean implies')[which]}, {b.label}"
    before = f"full cache {labels.number(float(b.full_failed.mean()))}"
    if f.onset > 0:
        before = labels.number(float(f.points[f.onset - 1].failed.mean()))
    codes = None if b.clusters is None else b.clusters[None]
    rate = intervals.bounded_mean(b.failed[None], 1 - f.alpha, clusters=codes)
    now = labels.interval(rate.estimate[0], rate.low[0], rate.high[0])
    return f"failures {before} -> {now}, {b.label}"
