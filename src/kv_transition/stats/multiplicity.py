"""Holm's adjustment of p-values (Holm 1979), for many families at once.

The tests compare it with statsmodels' `multipletests`, which takes one family at a time and runs the garbage collector
at each call; for thousands of families this takes minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def holm(p: np.ndarray, tests: np.ndarray) -> np.ndarray:
    """Return adjusted p-values of ``p [families, tests]``; only the ``tests`` [families] smallest of a row are used."""
    order = np.argsort(p, axis=1)
    factors = np.maximum(tests[:, None] - np.arange(p.shape[1]), 1)
    stepped = np.maximum.accumulate(np.take_along_axis(p, order, axis=1) * factors, axis=1)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.minimum(stepped, 1), axis=1)
    return adjusted


def levels(p: np.ndarray, alpha: float) -> np.ndarray:
    """Return the level at which the interval of each test of a family ``p [tests]`` agrees with Holm's decision.

    It is alpha / tests (Bonferroni), whose intervals hold simultaneously, except if Holm's procedure rejects and
    Bonferroni's does not: then it is the level of Holm's step. So an interval excludes 0 exactly if the adjusted
    p-value is below alpha.
    """
    tests = len(p)
    rejected = holm(p[None], np.array([tests]))[0] < alpha
    step = np.empty(tests)
    step[np.argsort(p)] = alpha / (tests - np.arange(tests))
    return np.where(rejected & (p >= alpha / tests), step, alpha / tests)


def adjust(rows: Sequence[dict[str, Any]], alpha: float | None = None) -> None:
    """Add ``p_holm`` and the family's size ``tests`` to the rows that have a ``family`` (Holm 1979).

    With ``alpha``, also add ``level``: that of the interval that agrees with the adjusted p-value (see `levels`).
    """
    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "family" in row:
            families.setdefault(row["family"], []).append(row)
    for family in families.values():
        p_values = np.array([row["p_value"] for row in family])
        adjusted = holm(p_values[None], np.array([len(family)]))[0]
        for row, p in zip(family, adjusted, strict=True):
            row["p_holm"], row["tests"] = float(p), len(family)
        if alpha is not None:
            for row, level in zip(family, levels(p_values, alpha), strict=True):
                row["level"] = float(level)
