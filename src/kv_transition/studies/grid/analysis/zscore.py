"""The blueprint's detector of a transition zone: z-scores of spread, failure rate and accuracy drop.

One point is nearly always one standard deviation above the others, so this detector also finds zones in flat curves. It
is kept for comparison with the definition.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kv_transition.studies.grid.analysis.instability import COLLAPSED, Point
from kv_transition.studies.grid.analysis.outcomes import COLLAPSE, NEITHER, OPEN, ZONE, Axis, Verdict, key

HIGH_Z = 1.0
METHOD = "z-scores over the {points}; zone where z_std or z_fail is at least 1 and the mean is not below half of full's"


def z_scores(values: Sequence[float]) -> np.ndarray:
    """Return (value - mean) / standard deviation of the values; 0 if they are all equal."""
    array = np.array(values, dtype=float)
    spread = array.std()
    return (array - array.mean()) / spread if spread > 1e-12 else np.zeros(len(array))


def detect(points: Sequence[Point], name: str, axis: Axis) -> Verdict:
    """Return the zone: first to last point that has z_std or z_fail >= 1 and whose mean has not collapsed."""
    if len(points) < 2:
        reason = f"{name}: open; z-scores over the {axis.plural} need at least two {axis.plural}."
        return Verdict(OPEN, reason, sentence=reason)
    means = np.array([b.score.mean() for b in points])
    full = np.array([b.full_score.mean() for b in points])
    z_std = z_scores([float(b.score.std(ddof=1)) if b.n > 1 else 0.0 for b in points])
    z_fail, z_drop = z_scores([float(b.failed.mean()) for b in points]), z_scores(list(full - means))
    collapsed = means < COLLAPSED * full
    high = ((z_std >= HIGH_Z) | (z_fail >= HIGH_Z)) & ~collapsed
    where, fallen = np.flatnonzero(high), np.flatnonzero(collapsed)
    details = {
        axis.plural: [
            {
                **key(b, axis),
                "z_std": float(z_std[i]),
                "z_fail": float(z_fail[i]),
                "z_acc_drop": float(z_drop[i]),
                "collapsed": bool(collapsed[i]),
                "in_zone": bool(high[i]),
            }
            for i, b in enumerate(points)
        ]
    }
    collapse = int(fallen[0]) if len(fallen) else None
    if not len(where):
        flat = not (z_std.any() or z_fail.any())
        why = f"spread and failures are the same in every {axis.singular}"
        if not flat:
            why = f"every {axis.singular} of high spread has collapsed"
        reason = f"{name}: {why} ({points[0].label} in the first)."
        return Verdict(NEITHER if flat else COLLAPSE, reason, sentence=reason, collapse=collapse, details=details)
    i = int(where[0])
    details["zone"] = [axis.of(points[i]), axis.of(points[int(where[-1])])]
    reason = (
        f"{name}: z of spread {z_std[i]:.1f}, of failures {z_fail[i]:.1f} at {axis.name(points[i])} "
        f"({points[i].label}), where the mean has not collapsed."
    )
    return Verdict(ZONE, reason, sentence=reason, onset=i, collapse=collapse, details=details)
