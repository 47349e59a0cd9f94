"""Holm's adjustment of p-values (Holm 1979), for many families at once.

statsmodels' `multipletests` is what the tests compare it with; it takes one family at a time and collects all garbage
at each call, which at thousands of families costs minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def holm(p: np.ndarray, tests: np.ndarray) -> np.ndarray:
    """Adjusted p-values of ``p [families, tests]``; only the ``tests`` [families] smallest of each row are counted."""
    order = np.argsort(p, axis=1)
    factors = np.maximum(tests[:, None] - np.arange(p.shape[1]), 1)
    stepped = np.maximum.accumulate(np.take_along_axis(p, order, axis=1) * factors, axis=1)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.minimum(stepped, 1), axis=1)
    return adjusted


def adjust(rows: Sequence[dict[str, Any]]) -> None:
    """Add ``p_holm`` and the family's size ``tests`` to the rows that have a ``family`` (Holm 1979)."""
    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "family" in row:
            families.setdefault(row["family"], []).append(row)
    for family in families.values():
        adjusted = holm(np.array([[row["p_value"] for row in family]]), np.array([len(family)]))[0]
        for row, p in zip(family, adjusted, strict=True):
            row["p_holm"], row["tests"] = float(p), len(family)
