"""H2O with heavy hitters only: the recall study's form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from kv_transition.policies.h2o import H2O


@dataclass(frozen=True)
class H2OHeavy(H2O):
    """H2O whose whole budget goes to the entries with the highest accumulated attention.

    Source: the study of recall and entropy; the sums are those of H2O, arXiv 2306.14048.

    Cost: as h2o.
    """

    recent_share: Annotated[float, (0, 1)] = 0.0
    """share of the budget that goes to the newest tokens, rounded down"""
