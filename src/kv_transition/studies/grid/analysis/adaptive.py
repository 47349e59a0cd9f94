"""Adaptive allocation: the bins that need more examples, and the confidence level of each look.

Repeated looks at growing data increase the number of false findings. Therefore alpha is spent over the looks (Lan and
DeMets 1983) by the function of O'Brien-Fleming type: little at first, nearly all at the last look. The keys start, step
and cap determine the looks in advance. The choice of bins that get examples may depend on the data, because the level
of every look holds whatever earlier looks showed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from scipy.optimize import brentq
from scipy.stats import norm

from kv_transition import labels
from kv_transition.errors import UserError
from kv_transition.provenance import rows_to_table
from kv_transition.studies.grid.tables import ALLOCATION

NODES = 400  # nodes of the numerical integration, which give the boundaries four digits
LEAST = 1e-12  # smallest level; an early look with it finds nothing, but its intervals are finite


@dataclass(frozen=True)
class Adaptive:
    """The configuration's ``adaptive`` section: examples of a bin at the first look, at each further look, at most."""

    enabled: bool = False
    start: int = 5
    step: int = 5
    cap: int = 40

    def __post_init__(self) -> None:
        if not (0 < self.start <= self.cap and self.step > 0):
            raise UserError(
                f"adaptive: start {self.start}, step {self.step} and cap {self.cap} must be positive and start no "
                "larger than cap"
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return the examples at each look in a bin that is always extended: start, start + step, ..., cap."""
        return (*range(self.start, self.cap, self.step), self.cap)


def spent(fraction: float, alpha: float) -> float:
    """Return the alpha spent when ``fraction`` of the data is available: 4 - 4 Phi(z_(alpha/4) / sqrt(fraction)).

    This is the function of O'Brien-Fleming type (Lan and DeMets 1983), for each side at alpha / 2.
    """
    return float(4 * norm.sf(norm.isf(alpha / 4) / np.sqrt(min(fraction, 1.0))))


@lru_cache(maxsize=64)
def levels(sizes: tuple[int, ...], alpha: float) -> tuple[float, ...]:
    """Return the nominal two-sided level of each look, such that the probability of an error over all looks is
    ``alpha``.

    The boundaries are those of a Brownian motion observed at the times size / last size, by recursive integration
    (Armitage, McPherson and Rowe 1969): the probability of first crossing the boundary at a look is the alpha spent at
    that look.
    """
    times = np.array(sizes) / sizes[-1]
    shares = np.diff([0.0, *(spent(t, alpha) for t in times)])
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    farthest = float(norm.isf(LEAST / 2))
    found: list[float] = []
    at, mass, before = np.zeros(1), np.ones(1), 0.0  # the motion starts at 0
    for now, share in zip(times, shares, strict=True):
        scale, root = np.sqrt(now - before), np.sqrt(now)

        def too_often(z: float, at=at, mass=mass, scale=scale, root=root, share=share) -> float:
            return float(mass @ (norm.sf((z * root - at) / scale) + norm.cdf((-z * root - at) / scale))) - share

        z = farthest if too_often(farthest) >= 0 else brentq(too_often, 0.0, farthest)
        found.append(float(2 * norm.sf(z)))
        new = nodes * z * root
        mass = weights * z * root * (norm.pdf((new[:, None] - at) / scale) / scale @ mass)
        at, before = new, now
    return tuple(found)


def confidence(adaptive: Adaptive, look: int, base: float = 0.95) -> float:
    """Return the confidence of intervals and tests at ``look`` (from 0), such that all looks together keep ``base``."""
    return 1 - levels(adaptive.sizes, round(1 - base, 12))[look]


def allocate(
    tables: Sequence[pa.Table],
    have: Mapping[tuple[str, int], int],
    available: Mapping[tuple[str, int], int],
    adaptive: Adaptive,
    look: int,
    base: float = 0.95,
) -> pa.Table:
    """Return how many examples each bin gets at the next look (tables.ALLOCATION), one row for every (task, bin).

    Args:
        tables: two tables.TRANSITION of this look: one computed with ``confidence(adaptive, look, base)``, the level of
            claims at this look, and one with ``base``, because an effect may exist that an early look cannot claim.
        have: number of examples of (task, bin) now.
        available: number of examples of (task, bin) in the data.
        adaptive: the ``adaptive`` section.
        look: number of this look, from 0.
        base: the experiment's confidence, over all looks.

    A bin gets more examples (``wanted`` > ``n``) if for any mode, policy and budget the position of onset or collapse
    is open in one of the tables (see `open_bins`), and neither the cap nor the end of the data is reached. If no row
    wants more, this is the last look.
    """
    reasons: dict[tuple[str, int], dict[str, str]] = {}
    for row in (row for table in tables for row in pl.from_arrow(table).filter(detector="definition").to_dicts()):
        name = f"{row['policy']} at {labels.budget(row['budget'])}, {labels.mode(row['mode'])}"
        for bin, why in open_bins(row, base).items():
            reasons.setdefault((row["task"], bin), {}).setdefault(name, f"{name}: {why}")
    sizes, last = adaptive.sizes, look + 1 >= len(adaptive.sizes)
    out = []
    for (task, bin), n in sorted(have.items()):
        limit = min(adaptive.cap, available[task, bin])
        why = list(reasons.get((task, bin), {}).values())
        wanted = n
        if not why:
            reason = "decided in this bin for every policy and budget"
        elif n >= adaptive.cap or last:
            reason = f"the cap of {adaptive.cap} examples or the last look is reached; open for {_several(why)}"
        elif n >= limit:
            reason = f"the data contain no more examples; open for {_several(why)}"
        else:
            wanted = min(n + adaptive.step, limit)
            reason = f"open for {_several(why)}"
        out.append(
            {
                "task": task,
                "bin": bin,
                "look": look,
                "n": n,
                "available": available[task, bin],
                "wanted": wanted,
                "alpha_spent": spent(sizes[look] / sizes[-1], 1 - base),
                "confidence": confidence(adaptive, look, base),
                "reason": reason,
            }
        )
    return rows_to_table(out, ALLOCATION)


def _several(why: Sequence[str]) -> str:
    return why[0] if len(why) == 1 else f"{len(why)} policies and budgets, the first is {why[0]}"


def open_bins(row: Mapping[str, Any], base: float) -> dict[int, str]:
    """Return the bins in which one row of tables.TRANSITION is not decided, with the reasons.

    Onset and collapse each have an interval: the smallest set of bins (or "none") that contains the share ``base`` of
    their bootstrap distribution. A decision requires an interval of one bin. If nothing was found, open bins count as
    undecided, too; and if no onset was found, also the bins before the collapse that have too few examples for any
    test.
    """
    details = json.loads(row["details"])
    bins = details.get("bins", [])
    found: dict[int, str] = {}
    for event in ("onset", "collapse"):
        shares = {b["bin"]: b[f"probability_{event}"] for b in bins} | {None: details.get(f"probability_no_{event}", 1)}
        held = interval(shares, base)
        if len(held) > 1:
            found |= {b: f"the {event} may be at any of {len(held)} positions" for b in held if b is not None}
    if row["onset_bin"] is None:
        before = [b for b in bins if row["collapse_bin"] is None or b["bin"] < row["collapse_bin"]]
        found |= {b["bin"]: "too few examples for any test" for b in before if b["blind"]}
    return found | {b["bin"]: "open" for b in bins if b["open"] and b["full_mean"] > 0}


def interval(shares: Mapping[Any, float], base: float) -> list[Any]:
    """Return the smallest set of positions that contains the share ``base``, the most probable first."""
    held, total = [], 0.0
    for place, share in sorted(shares.items(), key=lambda item: -item[1]):
        held.append(place)
        total += share
        if total >= base - 1e-12:
            break
    return held
