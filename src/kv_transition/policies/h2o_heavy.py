"""H2O with heavy hitters only, as in the study of recall and entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from kv_transition.policies.h2o import H2O


@dataclass(frozen=True)
class H2OHeavy(H2O):
    """Spends the whole budget on the entries with the largest sum of received attention.

    Source: the study of recall and entropy; the sums are those of H2O, arXiv 2306.14048.

    Cost: as h2o.
    """

    recent_share: Annotated[float, (0, 1)] = 0.0
    """share of the budget that goes to the newest tokens, rounded down"""
